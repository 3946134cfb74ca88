"""What a run draws while it goes: the first training batches, validation batches, TensorBoard scalars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sp_yolo.report import boxes_of_targets, draw_mosaic

BATCHES = 3  # of each kind, as in the original


class RunPictures:
    """Pictures of one run in ``folder``; scalars for TensorBoard when that package is installed."""

    def __init__(self, folder: Path, names: Sequence[str], *, tensorboard: bool = True) -> None:
        self.folder, self.names = folder, list(names)
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:  # also what a folder of that name or an ancient version ends in
                return
            self._writer = SummaryWriter(str(folder))

    def train_batch(self, index: int, batch: Any) -> None:
        """train_batch<index>.jpg: images as the network sees them, with their labels."""
        self._draw(f"train_batch{index}.jpg", batch, self._truth(batch))

    def val_batch(self, index: int, batch: Any, detections: list[torch.Tensor]) -> None:
        """test_batch<index>_labels.jpg and _pred.jpg; ``detections`` [k, 6] in network input pixels."""
        if index >= BATCHES:
            return
        self._draw(f"test_batch{index}_labels.jpg", batch, self._truth(batch))
        self._draw(f"test_batch{index}_pred.jpg", batch, [rows.float().cpu() for rows in detections])

    def scalars(self, record: Mapping[str, Any]) -> None:
        """One epoch under the original's TensorBoard tags, but for x/lr_<group>."""
        if self._writer is None:
            return
        tags = {f"train/{part}_loss": record[part] for part in ("box", "obj", "cls")}
        tags |= {f"val/{part}_loss": record[f"val_{part}"] for part in ("box", "obj", "cls")}
        tags |= {"metrics/precision": record["precision"], "metrics/recall": record["recall"]}
        tags |= {"metrics/mAP_0.5": record["map50"], "metrics/mAP_0.5:0.95": record["map50_95"]}
        tags |= {f"x/lr_{name}": value for name, value in record["lr"].items()}
        for tag, value in tags.items():
            if not math.isnan(value):  # not validated in this epoch
                self._writer.add_scalar(tag, value, record["epoch"])
        self._writer.flush()

    def _truth(self, batch: Any) -> list[Any]:
        return list(boxes_of_targets(batch.targets, len(batch.images), tuple(batch.images.shape[2:])))

    def _draw(self, name: str, batch: Any, boxes: list[Any]) -> None:
        titles = [Path(meta.path).name for meta in batch.metas]
        draw_mosaic(batch.images.cpu(), boxes, self.names, self.folder / name, titles=titles)
