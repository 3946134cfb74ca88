"""A data set small enough to train on in a test, and the program as a user starts it."""

from pathlib import Path

import pytest
from mini_network import MINI
from program import Program

from sp_yolo.data import ensure_toy_dataset


@pytest.fixture(scope="session")
def toy_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_toy_dataset(tmp_path_factory.mktemp("data") / "toy", train=20, val=8, image_size=64)


@pytest.fixture(scope="session")
def mini_cfg(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cfg") / "mini.yaml"
    path.write_text(MINI)
    return str(path)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)
