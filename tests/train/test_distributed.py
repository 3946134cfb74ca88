"""Two processes under torchrun on a CPU: the numbers of one process; one run, one folder; stopped, resumed together."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.launcher import Program, small

WORLD_RUN = Path(__file__).with_name("world_run.py")


def test_two_processes_train_stop_and_resume(program: Program, toy_yaml: Path, mini_cfg: str) -> None:
    flags = small(toy_yaml, "--cfg", mini_cfg, "--epochs", "400", "--rect", "--set", "lr0=0.001")
    process = program.start(*flags, processes=2)
    run = program.folder / "runs" / "train" / "exp"
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert "stopped by SIGTERM, saved" in out, err
    progress = torch.load(run / "weights" / "last.pt", weights_only=True)["progress"]
    assert progress["iteration"] >= 5
    epochs = str(progress["iteration"] // 5 + 1)
    again = program.run("--resume", str(run), "--epochs", epochs, "--quiet", processes=2)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("training images") == 1
    assert [path.name for path in (program.folder / "runs" / "train").iterdir()] == ["exp"]
    assert json.loads((run / "summary.json").read_text())["final"]["epoch"] == int(epochs) - 1
    assert len((run / "metrics.jsonl").read_text().splitlines()) == int(epochs)


def world_run(program: Program, name: str, processes: int, *flags: str) -> dict[str, Any]:
    """What tests/train/world_run.py writes, of a run of one process or of two under torchrun."""
    done = program.run(f"{name}.pt", *flags, "--name", name, script=WORLD_RUN, processes=processes)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = torch.load(program.folder / f"{name}.pt", weights_only=True)
    return content


def test_two_processes_compute_what_one_does(program: Program, toy_yaml: Path, mini_cfg: str) -> None:
    """The same global batches: losses of each step, weights, detections and mAP agree up to the rounding of float32."""
    flags = small(toy_yaml, "--cfg", mini_cfg, "--amp", "off", "--epochs", "3", "--batch", "4", "--optimizer", "sgd")
    flags += ["--set", "lr0=0.01", "--set", "warmup_epochs=0", "--set", "nominal_batch=8", "--set", "ema_decay=0.5"]
    one, two = world_run(program, "one", 1, *flags), world_run(program, "two", 2, *flags)

    assert len(one["losses"]) == 15
    assert np.allclose(two["losses"], one["losses"], rtol=2e-5, atol=0)
    assert not np.allclose(one["losses"][0], one["losses"][-1], rtol=1e-2)  # something was learned meanwhile
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, rtol=1e-4, atol=2e-6)
    # Batches 2 and 4 of an epoch of 5 close a sum of two, batch 5 is stepped on alone; one bucket each.
    assert (one["exchanges"], two["exchanges"]) == (0, 3 * 3)

    assert len(one["detections"]) == len(two["detections"]) > 100
    for a, b in zip(one["detections"], two["detections"], strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert np.allclose([*a["bbox"], a["score"]], [*b["bbox"], b["score"]], rtol=1e-5, atol=2e-3)
    for a, b in zip(one["records"], two["records"], strict=True):
        for key in ("map50", "map50_95", "precision", "recall"):
            assert abs(a[key] - b[key]) < 1e-3, key
