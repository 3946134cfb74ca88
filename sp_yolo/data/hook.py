"""An augmentation of the user's own: a Python function that changes one training sample."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sp_yolo.data.augment import Sample
from sp_yolo.data.canvas import painted
from sp_yolo.errors import UserError

Boxes: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]
# (image uint8 [H, W, 3] RGB, boxes x1, y1, x2, y2 px [n, 4], classes [n], generator of this sample) -> the first three
AugmentHook: TypeAlias = Callable[
    [NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64], np.random.Generator], Boxes
]


def find_hook(name: str) -> AugmentHook:
    """The function that ``module:function`` names; a module may lie in the working directory.

    Raises:
        UserError: there is none.
    """
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"--augment-with {name}: must be module:function, such as mine:augment of mine.py")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # not there for the program sp-yolo; for good, because loader processes need it
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--augment-with {name}: {error}") from None
    if not callable(found):
        raise UserError(f"--augment-with {name}: is no function")
    hook: AugmentHook = found
    return hook


def apply_hook(hook: AugmentHook, sample: Sample, rng: np.random.Generator, classes: int, path: str) -> Sample:
    """``sample`` after the hook: of the same size, boxes clipped to it, those with nothing left dropped.

    Raises:
        UserError: the hook failed, or gave something else; names the image of the sample.
    """
    image = np.ascontiguousarray(painted(sample.image)[..., ::-1])
    height, width = image.shape[:2]
    before = f"--augment-with: the function, given the sample of {path},"
    try:
        changed, boxes, labels = hook(image, sample.boxes_xyxy.copy(), sample.classes.astype(np.int64), rng)
        changed, boxes = np.asarray(changed), np.asarray(boxes, np.float32).reshape(-1, 4)
        labels = np.asarray(labels).reshape(-1)
    except Exception as error:  # whatever a user's function raises
        raise UserError(f"{before} failed: {type(error).__name__}: {error}") from None
    if changed.shape != image.shape or changed.dtype != np.uint8:
        raise UserError(f"{before} gave {changed.dtype} {list(changed.shape)}, must be uint8 {list(image.shape)}")
    if len(boxes) != len(labels) or not np.isfinite(boxes).all():
        raise UserError(f"{before} gave {len(boxes)} boxes and {len(labels)} classes, must be as many, and finite")
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise UserError(f"{before} gave a class outside 0..{classes - 1}")
    boxes = boxes.clip(0, np.array([width, height, width, height], np.float32))
    kept = (boxes[:, 2:] - boxes[:, :2] > 0).all(1)
    bgr = np.ascontiguousarray(changed[..., ::-1])
    return replace(sample, image=bgr, boxes_xyxy=boxes[kept], classes=labels[kept].astype(sample.classes.dtype))
