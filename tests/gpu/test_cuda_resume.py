"""A CUDA run that is killed and resumed with --deterministic ends with the bits of the undisturbed one."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sp_yolo.data import ensure_toy_dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CHECKOUT = Path(__file__).resolve().parents[2]
# train_sp.py that kills itself, as kill -9 does, in the given iteration: after the step, before anything is saved.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from sp_yolo.cli import main_train
from sp_yolo.engine.step import TrainStep

die_in, call = int(sys.argv[2]), TrainStep.__call__

def mortal(step, batch):
    updated = call(step, batch)
    if step.state.progress.iteration == die_in:
        os.kill(os.getpid(), signal.SIGKILL)
    return updated

TrainStep.__call__ = mortal
sys.exit(main_train(sys.argv[3:]))
"""
BATCHES = 4  # per epoch: 16 images


@pytest.fixture(scope="module")
def toy_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_toy_dataset(tmp_path_factory.mktemp("data") / "toy", train=4 * BATCHES, val=4, image_size=128)


def train(folder: Path, *flags: str, die_in: int = -1) -> tuple[int, str]:
    """Exit code and output. ``die_in``: the iteration in which the process is killed, counted from 1."""
    command = [sys.executable, "-c", KILLED, str(CHECKOUT), str(die_in), *flags, "--quiet"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=dict(os.environ), timeout=300)
    return done.returncode, done.stdout + done.stderr


def bits(path: Path) -> dict[str, str]:
    """sha256 of each part of a checkpoint that a run goes on from: its tensors and numbers, in their order."""
    content = torch.load(path, weights_only=True)  # without map_location: nothing in it names a GPU

    def digest(value: object) -> bytes:
        if isinstance(value, torch.Tensor):
            return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        if isinstance(value, dict):
            return b"".join(str(key).encode() + digest(entry) for key, entry in value.items())
        if isinstance(value, list | tuple):
            return b"".join(digest(entry) for entry in value)
        return repr(value).encode()

    losses = [[record[part] for part in ("box", "obj", "cls", "map50")] for record in content["progress"]["records"]]
    parts = {key: content[key] for key in ("model", "ema", "optimizer", "scaler")} | {"losses": losses}
    return {key: hashlib.sha256(digest(value)).hexdigest() for key, value in parts.items()}


@pytest.mark.parametrize(
    ("amp", "saves", "die_in"),
    [("bf16", "0", BATCHES + 2), ("fp16", "1e-9", BATCHES + 2), ("off", "1e-9", 2)],
    ids=["bf16, from the end of an epoch", "fp16, from within an epoch", "float32, in the first epoch"],
)
def test_same_bits_after_a_kill(tmp_path: Path, toy_yaml: Path, amp: str, saves: str, die_in: int) -> None:
    flags = f"--data {toy_yaml} --cfg yolov7-tiny --img 128 --batch 4 --epochs 2 --workers 2 --device 0 --seed 3"
    flags += f" --deterministic --noautoanchor --amp {amp} --save-every {saves} --set lr0=0.002"
    code, output = train(tmp_path, *flags.split(), "--name", "whole")
    assert code == 0, output
    assert "deterministic" in output
    code, output = train(tmp_path, *flags.split(), "--name", "killed", die_in=die_in)
    assert code == -9, output
    runs = tmp_path / "runs" / "train"
    code, output = train(tmp_path, "--resume", str(runs / "killed"))
    assert code == 0, output
    assert "resumed" in output
    assert bits(runs / "killed" / "weights" / "last.pt") == bits(runs / "whole" / "weights" / "last.pt")
    best = [torch.load(runs / name / "weights" / "best.pt", weights_only=True)["ema"] for name in ("killed", "whole")]
    assert all(torch.equal(value, best[1][key]) for key, value in best[0].items())
