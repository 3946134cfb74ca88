"""TensorBoard: event files in the run's folder; a resumed run goes on in the same folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from torch.utils.tensorboard import SummaryWriter

from sp_yolo.trackers.callback import Callback, Record, RunStart, is_picture, scalars


class Tracker(Callback):
    def on_start(self, run: RunStart) -> None:
        self._epoch = run.epoch
        self._writer = SummaryWriter(str(run.folder), purge_step=run.epoch if run.resumed else None)

    def on_epoch(self, record: Record) -> None:
        self._epoch = record["epoch"]
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, self._epoch)
        self._writer.flush()

    def on_files(self, paths: Sequence[Path]) -> None:
        for path in filter(is_picture, paths):
            pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
            self._writer.add_image(path.stem, pixels, self._epoch, dataformats="HWC")

    def on_end(self, summary: Record | None) -> None:
        self._writer.close()
