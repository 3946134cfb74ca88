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
