"""Windows and macOS as far as they can be had on Linux: what only Linux or POSIX has is hidden, workers are spawned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mini_network import MINI

SCRIPT = Path(__file__).with_name("another_machine.py")
PACKAGE = SCRIPT.parents[2] / "sp_yolo"


def on(system: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, "ANOTHER_MACHINE": system, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_every_module_can_be_imported(system: str, tmp_path: Path) -> None:
    done = on(system, tmp_path, "import everything")
    assert done.returncode == 0, done.stderr
    left_out = ("__init__.py", "__main__.py", "plugins/ultralytics.py")
    assert int(done.stdout) == len([*PACKAGE.rglob("*.py")]) - len(left_out)


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_training_with_a_spawned_worker_and_resuming(system: str, toy_yaml: Path, tmp_path: Path) -> None:
    """Two steps, validated and saved; gone on with for two more. The console shows ASCII only."""
    (tmp_path / "mini.yaml").write_text(MINI)
    flags = f"--data {toy_yaml} --cfg mini.yaml --img 64 --batch 9 --epochs 1 --workers 1 --device cpu --noautoanchor"
    done = on(system, tmp_path, *flags.split(" "), "--name", "für", "--quiet")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "train" / "für"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["peak_memory_bytes"] == 0) == (system == "win32")
    done = on(system, tmp_path, "--resume", str(run), "--epochs", "2", "--workers", "1", "--quiet")
    assert done.returncode == 0, done.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (run / "weights").iterdir()) == ["best.pt", "last.prev.pt", "last.pt"]
