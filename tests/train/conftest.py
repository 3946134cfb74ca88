"""A data set small enough to train on in a test, and the program as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sp_yolo.data import ensure_toy_dataset

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def toy_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_toy_dataset(tmp_path_factory.mktemp("data") / "toy", train=20, val=8, image_size=64)


MINI = """
nc: 6
depth_multiple: 1.0
width_multiple: 1.0
anchors: [[8,8, 12,12, 16,16], [20,20, 28,28, 36,36], [40,40, 50,50, 60,60]]
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [1, 1, Conv, [16, 1, 1]]
  - [2, 1, Conv, [16, 1, 1]]
  - [3, 1, Conv, [16, 1, 1]]
  - [[4, 5, 6], 1, IDetect, [nc, anchors]]
"""


@pytest.fixture(scope="session")
def mini_cfg(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network of 9,000 parameters: what a flag does to a run shows on it as well, in a tenth of the time."""
    path = tmp_path_factory.mktemp("cfg") / "mini.yaml"
    path.write_text(MINI)
    return str(path)


class Program:
    """`train_sp.py` in a process of its own, one thread, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def start(self, *flags: str) -> "subprocess.Popen[str]":
        command = [sys.executable, str(CHECKOUT / "train_sp.py"), *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **pipes)  # type: ignore[call-overload]

    def run(self, *flags: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*flags)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def small(toy_yaml: Path, *more: str) -> list[str]:
    """Flags of a run of seconds."""
    flags = [
        "--data",
        str(toy_yaml),
        "--img",
        "64",
        "--batch",
        "4",
        "--epochs",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    return [*flags, "--quiet", "--noautoanchor", *more]
