"""Two processes under torchrun on a CPU: one run, one folder, the same global batches; stopped and resumed together."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from conftest import CHECKOUT, Program, small


def start(program: Program, *flags: str) -> "subprocess.Popen[str]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(CHECKOUT / "train_sp.py"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=program.folder, env=program.environment, text=True, **pipes)  # type: ignore[call-overload]


def test_two_processes_train_stop_and_resume(program: Program, toy_yaml: Path, mini_cfg: str) -> None:
    process = start(program, *small(toy_yaml, "--cfg", mini_cfg, "--epochs", "400", "--rect", "--set", "lr0=0.001"))
    run = program.folder / "runs" / "train" / "exp"
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert "stopped by signal 15, saved" in out, err
    progress = torch.load(run / "weights" / "last.pt", weights_only=True)["progress"]
    assert progress["iteration"] >= 5
    epochs = str(progress["iteration"] // 5 + 1)
    again = start(program, "--resume", str(run), "--epochs", epochs, "--quiet")
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert out.count("training images") == 1
    assert [path.name for path in (program.folder / "runs" / "train").iterdir()] == ["exp"]
    assert json.loads((run / "summary.json").read_text())["final"]["epoch"] == int(epochs) - 1
    assert len((run / "metrics.jsonl").read_text().splitlines()) == int(epochs)
