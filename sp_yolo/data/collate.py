"""Items of one size -> a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sp_yolo.data.dataset import Item, SampleMeta
from sp_yolo.data.sketch import Parcel, Sketch, pack


class Batch(NamedTuple):
    """``images`` uint8 [B, 3, H, W] RGB, in channels_last memory, on the CPU unless a device composed them; ``targets``
    float32 [n, 6]: image index in the batch, class, normalised cx, cy, w, h; ``metas``: one per image."""

    images: Tensor
    targets: Tensor
    metas: list[SampleMeta]


class Sketched(NamedTuple):
    """A batch of which a device makes the pixels."""

    sketches: Parcel
    targets: Tensor
    metas: list[SampleMeta]


def collate(items: Sequence[Item]) -> Batch | Sketched:
    """Stack images of one size; column 0 of the targets is the position in the batch."""
    labels = [np.insert(item.labels, 0, position, axis=1) for position, item in enumerate(items)]
    targets, metas = torch.from_numpy(np.concatenate(labels)), [item.meta for item in items]
    sketches = [item.image for item in items if isinstance(item.image, Sketch)]
    if sketches:
        return Sketched(pack(sketches), targets, metas)
    return Batch(torch.from_numpy(np.stack([item.image for item in items])).permute(0, 3, 1, 2), targets, metas)


def collate_quad(items: Sequence[Item], draws: Sequence[float] | np.ndarray) -> Batch:
    """Each four images become one of twice the size: the first enlarged (draw < 0.5), or all four tiled.

    Images 0 and 1 stand one above the other on the left, 2 and 3 on the right. ``draws``: one per group.
    """
    images, targets, metas = [], [], []
    for group, draw in enumerate(draws):
        four = items[4 * group : 4 * group + 4]
        if draw < 0.5:
            height, width = four[0].image.shape[:2]
            chw = torch.from_numpy(four[0].image).permute(2, 0, 1)[None].float()
            large = functional.interpolate(chw, size=(2 * height, 2 * width), mode="bilinear", align_corners=False)
            images.append(large[0].to(torch.uint8).permute(1, 2, 0).numpy())
            labels = four[0].labels
        else:
            left, right = (np.concatenate((four[at].image, four[at + 1].image)) for at in (0, 2))
            images.append(np.concatenate((left, right), 1))
            shifts = np.array([(0, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 1, 0, 0, 0), (0, 1, 1, 0, 0)], np.float32)
            labels = np.concatenate([item.labels + shift for item, shift in zip(four, shifts, strict=True)])
            labels = labels * np.array([1, 0.5, 0.5, 0.5, 0.5], np.float32)
        targets.append(np.insert(labels, 0, group, axis=1))
        metas.append(four[0].meta)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return Batch(stacked, torch.from_numpy(np.concatenate(targets)), metas)
