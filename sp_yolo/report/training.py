"""What a run draws while it goes: the first training batches, validation batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sp_yolo.report import boxes_of_targets, draw_mosaic

BATCHES = 3  # of each kind, as in the original


class RunPictures:
    """Pictures of one run in ``folder``."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)

    def train_batch(self, index: int, batch: Any) -> Path:
        """train_batch<index>.jpg: images as the network sees them, with their labels; returns its path."""
        return self._draw(f"train_batch{index}.jpg", batch, self._truth(batch))

    def val_batch(self, index: int, batch: Any, detections: list[torch.Tensor]) -> None:
        """test_batch<index>_labels.jpg and _pred.jpg; ``detections`` [k, 6] in network input pixels."""
        if index >= BATCHES:
            return
        self._draw(f"test_batch{index}_labels.jpg", batch, self._truth(batch))
        self._draw(f"test_batch{index}_pred.jpg", batch, [rows.float().cpu() for rows in detections])

    def _truth(self, batch: Any) -> list[Any]:
        return list(boxes_of_targets(batch.targets, len(batch.images), tuple(batch.images.shape[2:])))

    def _draw(self, name: str, batch: Any, boxes: list[Any]) -> Path:
        titles = [Path(meta.path).name for meta in batch.metas]
        draw_mosaic(batch.images.cpu(), boxes, self.names, self.folder / name, titles=titles)
        return self.folder / name
