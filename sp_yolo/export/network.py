"""What an exported file computes, and what the writer of its format is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sp_yolo.backends import Facts
from sp_yolo.export.end2end import nms_inputs, suppression_inputs
from sp_yolo.models import DetectionModel


@dataclass(frozen=True)
class Job:
    """What the writer of a format is told.

    ``example``: images on the device and in the type that the file takes. ``dynamic``: batch, height and width may
    vary, ``dynamic_batch``: the batch. ``calibration``: float32 images [B, 3, H, W] in 0..1 for INT8, None: not INT8.
    """

    network: Outputs
    example: Tensor
    path: Path
    names: Sequence[str]
    facts: Facts
    dynamic: bool = False
    dynamic_batch: bool = False
    simplify: bool = False
    fp16: bool = False
    calibration: Iterable[np.ndarray] | None = None


class Outputs(nn.Module):
    """The deployed network with what the file shall return: raw maps, decoded boxes, or what NMS takes."""

    def __init__(self, model: DetectionModel, kind: str, max_wh: float) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.max_wh = max_wh

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        decoded, maps = self.model(images)
        return tuple(maps) if self.kind == "maps" else self.of_decoded(decoded)

    def of_decoded(self, decoded: Tensor, label: Tensor | None = None) -> tuple[Tensor, ...]:
        """The outputs made of decoded boxes; ``label``: see ``nms_inputs``."""
        if self.kind == "rows":
            return nms_inputs(decoded, self.max_wh, label)
        return suppression_inputs(decoded) if self.kind == "efficient" else (decoded,)


def facts_of(model: DetectionModel, kind: str, example: Tensor, *, fixed_size: bool, fixed_batch: bool) -> Facts:
    anchors: Any = model.head.anchor_grid.view(model.head.nl, -1).tolist()
    return Facts(
        names=list(model.names),
        strides=[int(stride) for stride in model.head.strides],
        anchors=anchors,
        outputs=kind,
        image_size=[int(side) for side in example.shape[2:]] if fixed_size else None,
        batch=len(example) if fixed_batch else None,
        half=example.dtype == torch.float16,
    )
