"""Windows and macOS as far as they can be had on Linux: what only Linux or POSIX has is hidden, workers are spawned."""

import json
from pathlib import Path

import pytest
from support.launcher import CHECKOUT, Program, small

SCRIPT = Path(__file__).with_name("another_machine.py")
PACKAGE = CHECKOUT / "sp_yolo"


@pytest.fixture(params=["win32", "darwin"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Program:
    return Program(tmp_path, ANOTHER_MACHINE=request.param, PYTHONIOENCODING="ascii")


def test_every_module_can_be_imported(machine: Program) -> None:
    done = machine.run("import everything", script=SCRIPT)
    assert done.returncode == 0, done.stderr
    of_extras = (
        "plugins/ultralytics",
        "hub",
        *(f"trackers/{name}" for name in ("mlflow", "tensorboard", "trackio", "wandb")),
    )
    left_out = ("__init__", "__main__", *of_extras)
    assert int(done.stdout) == len([*PACKAGE.rglob("*.py")]) - len(left_out)


@pytest.mark.slow
def test_training_with_a_spawned_worker_and_resuming(machine: Program, toy_yaml: Path, mini_cfg: str) -> None:
    """Two steps, validated and saved; gone on with for two more. The console shows ASCII only."""
    flags = ("--cfg", mini_cfg, "--batch", "10", "--epochs", "1", "--workers", "1", "--name", "für")
    done = machine.run(*small(toy_yaml, *flags), script=SCRIPT)
    assert done.returncode == 0, done.stderr
    run = machine.folder / "runs" / "train" / "für"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["peak_memory_bytes"] == 0) == (machine.environment["ANOTHER_MACHINE"] == "win32")
    done = machine.run("--resume", str(run), "--epochs", "2", "--workers", "1", "--quiet", script=SCRIPT)
    assert done.returncode == 0, done.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (run / "weights").iterdir()) == [
        "best.pt",
        "best.safetensors",
        "last.prev.pt",
        "last.pt",
    ]
