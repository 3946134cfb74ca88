"""From the loader's uint8 batch to what the network eats, and how often an image is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from sp_yolo.backends import ExportedModel
from sp_yolo.models import DetectionModel
from sp_yolo.runtime.device import Compute


def to_input(images: torch.Tensor, compute: Compute) -> torch.Tensor:
    """uint8 [B,3,H,W], on the CPU or already there -> float [B,3,H,W] in 0..1 on the device, channels_last."""
    moved = images.to(compute.device, non_blocking=True)
    return moved.contiguous(memory_format=torch.channels_last).float().div_(255)


def size_grid(model: DetectionModel | ExportedModel) -> int:
    """Sides of input images are multiples of it, in px: the stride of the coarsest level, 32 at least."""
    return max(int(model.stride.max()), 32)


def round_up(size: int, grid: int) -> int:
    """The smallest multiple of ``grid`` that is not below ``size``."""
    return -(-size // grid) * grid


def rescale(images: torch.Tensor, image_size: int, grid: int, seed: int, iteration: int) -> torch.Tensor:
    """--multi-scale: resize to between half and one and a half ``image_size`` px, in multiples of ``grid``.

    Drawn from (seed, iteration): the same for an iteration whenever it is run.
    """
    rng = np.random.default_rng((seed, iteration))
    wanted = max(int(rng.integers(image_size // 2, image_size * 3 // 2 + grid)) // grid, 1) * grid
    height, width = images.shape[2:]
    factor = wanted / max(height, width)
    if factor == 1:
        return images
    shape = [math.ceil(side * factor / grid) * grid for side in (height, width)]
    return functional.interpolate(images, size=shape, mode="bilinear", align_corners=False)


def class_weights(labels: Sequence[np.ndarray], classes: int) -> list[float]:
    """--class-weights: of each class the root of how much rarer it is than others, 1 on average over the labels.

    ``labels``: [n, 5] per image, class first. A class without labels has 1.
    """
    counts = np.bincount(np.concatenate([label[:, 0] for label in labels]).astype(int), minlength=classes)
    weights = np.where(counts > 0, np.maximum(counts, 1) ** -0.5, 0.0)
    scale = counts.sum() / max((counts * weights).sum(), 1e-12)
    return np.where(counts > 0, weights * scale, 1.0).tolist()  # type: ignore[no-any-return]


def image_weights(labels: Sequence[np.ndarray], class_map: Sequence[float]) -> np.ndarray:
    """--image-weights: the odds of each image, [images]; those with classes of low AP come more often.

    ``labels``: [n, 5] per image, class first. ``class_map``: AP of each class so far.
    """
    classes = len(class_map)
    counts = np.stack([np.bincount(label[:, 0].astype(int), minlength=classes) for label in labels])
    inverse = 1 / np.maximum(counts.sum(0), 1)
    class_weights = inverse / inverse.sum() * classes
    odds = counts @ (class_weights * (1 - np.asarray(class_map)) ** 2 / classes)
    return odds if odds.any() else np.ones(len(labels))  # every class is perfect, or nothing is labelled
