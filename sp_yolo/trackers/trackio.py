"""Trackio: a database in TRACKIO_DIR (default: its cache folder), or a Space, where TRACKIO_SPACE_ID names one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import trackio

from sp_yolo.trackers.callback import Callback, Record, RunStart, is_picture, scalars


class Tracker(Callback):
    def on_start(self, run: RunStart) -> None:
        self._epoch = run.epoch
        project = os.environ.get("TRACKIO_PROJECT", run.project)
        name = f"{run.name}-{run.identity}"  # a run is found again by its name
        self._run = trackio.init(project, name=name, resume="allow", config=dict(run.settings), embed=False)

    def on_epoch(self, record: Record) -> None:
        self._epoch = record["epoch"]
        self._run.log({**scalars(record), "epoch": self._epoch}, step=self._epoch)

    def on_files(self, paths: Sequence[Path]) -> None:
        pictures = {f"pictures/{path.stem}": trackio.Image(path) for path in paths if is_picture(path)}
        self._run.log(pictures, step=self._epoch)
        for path in paths:
            if path.suffix == ".html":
                trackio.save(path, project=self._run.project)

    def on_end(self, summary: Record | None) -> None:
        self._run.finish()
