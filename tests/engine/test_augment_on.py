"""Where training pictures are warped and coloured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.datasets import RECIPE, yolo_set

from sp_yolo.config import DataOptions
from sp_yolo.data.sketch import Sketch
from sp_yolo.engine.splits import open_training_split
from sp_yolo.runtime.device import Compute
from sp_yolo.runtime.distributed import World


@pytest.mark.parametrize(
    ("device", "options", "compat", "sketched"),
    [
        ("cpu", {}, False, False),
        ("cuda", {}, False, True),
        ("cuda", {"augment_on": "cpu"}, False, False),
        ("cpu", {"augment_on": "device"}, False, True),
        ("cuda", {}, True, False),  # the original's pixels
        ("cuda", {"quad": True}, False, False),  # joins pixels
        ("cuda", {"rect": True}, False, True),
    ],
)
def test_a_gpu_augments_unless_told_otherwise(
    tmp_path: Path, device: str, options: dict[str, object], compat: bool, sketched: bool
) -> None:
    config = yolo_set(tmp_path, {str(n): "0 0.5 0.5 0.2 0.4\n" for n in range(4)})
    split = open_training_split(
        replace(DataOptions(), **options),  # type: ignore[arg-type]
        config,
        RECIPE,
        image_size=64,
        batch_size=4,
        epochs=1,
        stride=32,
        seed=0,
        workers=0,
        compat=compat,
        compute=Compute(torch.device(device), None, ""),
        world=World(),
    )
    assert isinstance(split.data.item(0).image, Sketch) == sketched
