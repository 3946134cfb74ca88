"""The kernel against the torch version: what test_compose_triton.py runs, on a GPU or in Triton's interpreter.

Triton must be imported with TRITON_INTERPRET set for the latter, so that it is another process there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.datasets import RECIPE, yolo_set

from sp_yolo.config import AugmentRecipe
from sp_yolo.data import DetectionDataset
from sp_yolo.data.compose import _in_torch, compose
from sp_yolo.data.compose_triton import compose_pixels
from sp_yolo.data.sketch import Parcel, pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROW = "0 0.5 0.5 0.2 0.4\n"
NO_MOSAIC = replace(RECIPE, mosaic=0.0, perspective=0.001, degrees=40.0)


def _sketches(root: Path, recipe: AugmentRecipe, size: int = 50, count: int = 5, **options: object) -> Parcel:
    config = yolo_set(root, {str(n): ROW for n in range(count)})
    dataset = DetectionDataset(config, "train", size, augment=recipe, sketches=True, **options)  # type: ignore[arg-type]
    return pack([dataset.item(index).image for index in range(count)])


@pytest.mark.parametrize("recipe", [replace(RECIPE, mixup=0.5), replace(RECIPE, perspective=0.02), NO_MOSAIC])
def test_the_kernel_makes_what_torch_makes(tmp_path: Path, recipe: AugmentRecipe) -> None:
    """50 x 50 px: not a whole number of blocks."""
    batch = _sketches(tmp_path, recipe).opened(DEVICE)
    expected = torch.empty((5, 50, 50, 3), dtype=torch.uint8, device=DEVICE)
    made = torch.full_like(expected, 77)
    _in_torch(batch, expected)
    compose_pixels(batch, made)
    difference = (made.int() - expected.int()).abs()
    # a GPU contracts products and sums, which can move a rounded level by one, and a hue behind it a few more
    assert int(difference.max()) <= 6 and float((difference > 0).float().mean()) < 0.02
    assert len(np.unique(made.cpu())) > 50


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_gpu_composes_what_the_cpu_does_without_being_waited_for(tmp_path: Path) -> None:
    parcel = _sketches(tmp_path, replace(RECIPE, mixup=0.5), size=320)
    pinned = parcel._replace(data=parcel.data.pin_memory())
    compose(pinned, DEVICE)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    made = compose(pinned, DEVICE)
    torch.cuda.set_sync_debug_mode("default")
    difference = (made.cpu().int() - compose(parcel, torch.device("cpu")).int()).abs()
    assert int(difference.max()) <= 8 and float(difference.float().mean()) < 0.1
