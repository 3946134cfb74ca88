"""The folder a plug-in test runs in, and a small host in it."""

from pathlib import Path

import fake_host
import pytest


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return fake_host.write_checkout(tmp_path / "yolov7")
