"""Each tracker in its offline mode: a run that is interrupted and resumed is one run there, with both epochs."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.trackers import epoch, files, start

from sp_yolo.trackers import in_background


@pytest.fixture
def interrupted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Logs epoch 0 with a tracker, stops; goes on with another one to the end. What failed would have warned."""

    monkeypatch.setattr("sp_yolo.trackers.background.HASTE", 300.0)  # a busy machine

    def log(name: str) -> None:
        for first, summary in ((0, None), (1, {"best": {"epoch": 1, "map50": 0.5}})):
            tracker = in_background(name)
            tracker.on_start(start(tmp_path, first))
            tracker.on_epoch(epoch(first, 0.25 * (first + 1)))
            tracker.on_files(files(tmp_path))
            tracker.on_end(summary)
        assert not [record.getMessage() for record in caplog.records if record.name == "sp_yolo"]

    return log


def test_tensorboard(tmp_path: Path, interrupted: Callable[[str], None]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted("tensorboard")
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [(each.step, each.value) for each in seen.Scalars("metrics/mAP_0.5")] == [(0, 0.25), (1, 0.5)]
    assert "val/cls_loss" not in seen.Tags()["scalars"] and seen.Tags()["images"] == ["results"]


def test_wandb(tmp_path: Path, interrupted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted("wandb")
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    # Two files of one id: `wandb sync` makes one run of them.
    assert len(folders) == 2 and all((folder / "run-1a2b3c4d.wandb").stat().st_size for folder in folders)
    for folder in folders:
        assert {path.suffix for path in folder.glob("files/media/**/*.*")} == {".png", ".html"}
        # Its own process writes the file, and may do so a moment after the run is finished.
        for _ in range(300):
            if b"metrics/mAP_0.5" in (content := (folder / "run-1a2b3c4d.wandb").read_bytes()):
                break
            time.sleep(0.1)
        assert b"metrics/mAP_0.5" in content


def test_mlflow(tmp_path: Path, interrupted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "cells")
    monkeypatch.chdir(tmp_path)
    interrupted("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("cells").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["hyp/lr0"] == "0.01"
    history = client.get_metric_history(run.info.run_id, "metrics/mAP_0.5")
    assert [(each.step, each.value) for each in history] == [(0, 0.25), (1, 0.5)]
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"results.png", "report.html"}


def test_trackio(tmp_path: Path, interrupted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if "trackio" in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)  # the variable is read when it is imported
    trackio = pytest.importorskip("trackio")
    interrupted("trackio")
    (run,) = trackio.Api().runs("project")
    assert run.name == "exp-1a2b3c4d"
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    found = [(step, bytes(text)) for step, text in rows]
    assert [step for step, text in found if b"metrics/mAP_0.5" in text] == [0, 1]
    assert [step for step, text in found if b"pictures/results" in text] == [0, 1]
