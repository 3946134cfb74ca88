"""Letterbox and box rescaling equal recorded results of the original YOLOv7."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sp_yolo.boxes import boxes_to_original, letterbox

ORACLE = Path(__file__).parent / "oracle" / "letterbox.npz"


def test_letterbox_sizes_ratios_and_borders() -> None:
    with np.load(ORACLE) as oracle:
        columns, rows = oracle["letterbox_columns"].tolist(), oracle["letterbox_rows"]
    assert len(rows) == 240
    for values in rows:
        row = dict(zip(columns, values.tolist(), strict=True))
        image = np.full((int(row["h"]), int(row["w"]), 3), 255, np.uint8)
        boxed, ratio, pad = letterbox(
            image,
            (int(row["new_h"]), int(row["new_w"])),
            auto=bool(row["auto"]),
            scale_up=bool(row["scaleup"]),
            stride=int(row["stride"]),
        )
        assert boxed.shape[:2] == (row["out_h"], row["out_w"]), row
        assert ratio == pytest.approx(row["ratio_w"], rel=1e-12) == pytest.approx(row["ratio_h"], rel=1e-12)
        assert pad == (row["pad_w"], row["pad_h"]), row
        inner = boxed[int(row["top"]) : boxed.shape[0] - int(row["bottom"])]
        inner = inner[:, int(row["left"]) : boxed.shape[1] - int(row["right"])]
        assert (inner == 255).all(), row
        assert int((boxed == 114).all(axis=2).sum()) == (boxed.size - inner.size) // 3


@pytest.mark.parametrize("example", [0, 1, 2])
@pytest.mark.parametrize("auto", [True, False])
def test_letterbox_pixels(example: int, auto: bool) -> None:
    with np.load(ORACLE) as oracle:
        image = oracle[f"pix{example}_in"]
        expected = oracle[f"pix{example}_out_{'auto' if auto else 'noauto'}"]
    boxed, _, _ = letterbox(image, 64, auto=auto)
    assert boxed.shape == expected.shape
    # OpenCV's bilinear rounding may differ by one level between builds
    assert int(np.abs(boxed.astype(int) - expected.astype(int)).max()) <= 1


@pytest.mark.parametrize("example", [0, 1, 2, 3])
def test_boxes_back_to_the_original(example: int) -> None:
    with np.load(ORACLE) as oracle:
        boxes, expected = oracle["boxes"], oracle[f"scale{example}_out"]
        input_hw, original_hw = (tuple(oracle[f"scale{example}_{key}_hw"].tolist()) for key in ("img1", "img0"))
        ratio_pad = json.loads(str(oracle[f"scale{example}_ratio_and_pad"]))
    back = boxes_to_original(torch.from_numpy(boxes), input_hw, original_hw, ratio_pad)
    np.testing.assert_allclose(back.numpy(), expected, rtol=1e-5, atol=1e-3)
