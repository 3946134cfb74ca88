"""Weights & Biases. WANDB_MODE=offline keeps the run in files, WANDB_PROJECT and its likes are followed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import wandb

from sp_yolo.trackers.callback import Callback, Record, RunStart, is_picture, scalars


class Tracker(Callback):
    def on_start(self, run: RunStart) -> None:
        self._epoch = run.epoch
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.project),
            name=os.environ.get("WANDB_NAME", run.name),
            id=run.identity,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", run.folder),
            config=dict(run.settings),
            settings=wandb.Settings(console="off"),
        )

    def on_epoch(self, record: Record) -> None:
        self._epoch = record["epoch"]
        self._run.log({**scalars(record), "epoch": self._epoch}, step=self._epoch)

    def on_files(self, paths: Sequence[Path]) -> None:
        pictures = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in paths if is_picture(path)}
        pages = {f"pages/{path.stem}": wandb.Html(path.read_text("utf-8")) for path in paths if path.suffix == ".html"}
        self._run.log({**pictures, **pages}, step=self._epoch)

    def on_end(self, summary: Record | None) -> None:
        self._run.summary.update({"best": summary["best"]} if summary else {})
        self._run.finish()
