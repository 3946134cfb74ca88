"""A data set and a network small enough to train on in a test, and the program as a user starts it."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.launcher import Program, Runs
from support.networks import MINI
from support.tiny_pictures import pictures

from sp_yolo.data import ensure_toy_dataset


def pytest_configure(config: pytest.Config) -> None:
    """Figures in these tests are a CPU's. A GPU is used where its own tests are asked for by path, or
    CUDA_VISIBLE_DEVICES names one."""
    if not any(word in argument for argument in config.args for word in ("gpu", "triton")):
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: threads of two processes on two cores wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images of 64 px for training, 8 for validation, six classes."""
    return ensure_toy_dataset(tmp_path_factory.mktemp("data") / "toy", train=20, val=8, image_size=64)


@pytest.fixture(scope="session")
def mini_cfg(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cfg") / "mini.yaml"
    path.write_text(MINI)
    return str(path)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


@pytest.fixture
def runs(tmp_path: Path, toy_yaml: Path, mini_cfg: str, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # read by the fork server when it starts
    return Runs(tmp_path, toy_yaml, mini_cfg)


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process have one thread and draw no plots, which take seconds and have tests of their own."""
    torch.set_num_threads(1)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def tiny_npz(tmp_path: Path) -> Path:
    """A classification data set of three classes."""
    (x_train, y_train), (x_test, y_test) = pictures(240, 0), pictures(90, 1)
    path = tmp_path / "tiny.npz"
    np.savez_compressed(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path
