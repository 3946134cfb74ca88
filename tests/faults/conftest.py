"""One toy set of 24 images and one tiny network for all faults."""

import os
from pathlib import Path

import pytest
from fault_runs import Runs
from mini_network import MINI

from sp_yolo.data import ensure_toy_dataset


@pytest.fixture(scope="session")
def toy_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_toy_dataset(tmp_path_factory.mktemp("data") / "toy", train=18, val=6, image_size=64)


@pytest.fixture
def runs(tmp_path: Path, toy_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the fork server when it starts
    (tmp_path / "mini.yaml").write_text(MINI)
    return Runs(tmp_path, toy_yaml, tmp_path / "mini.yaml")
