"""Warp, HSV, mosaics and quad collate against recorded numbers, their random draws scripted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sp_yolo.boxes import cxcywh_to_xyxy
from sp_yolo.data import augment
from sp_yolo.data.augment import Sample, WarpDraws
from sp_yolo.data.collate import collate_quad
from sp_yolo.data.dataset import Item, SampleMeta

ORACLE = np.load(Path(__file__).parent / "oracle" / "augment.npz")


def _warp_input(rows: int | None = None, segments: list[np.ndarray] | None = None) -> Sample:
    targets = ORACLE["warp_targets_cls_xyxy"][:rows]
    return Sample(ORACLE["warp_image"], targets[:, 0], targets[:, 1:], segments)


def _draws(number: int) -> WarpDraws:
    return WarpDraws(*ORACLE[f"warp{number}_draws_perspx_perspy_angle_scale_shearx_sheary_transx_transy"])


@pytest.mark.parametrize("number", range(5))
def test_warp_moves_pixels_and_boxes_as_recorded(number: int) -> None:
    border = tuple(int(value) for value in ORACLE[f"warp{number}_border"])
    warped = augment.warp(_warp_input(), _draws(number), border)  # type: ignore[arg-type]
    expected = ORACLE[f"warp{number}_targets"]
    np.testing.assert_array_equal(warped.classes, expected[:, 0])
    np.testing.assert_allclose(warped.boxes_xyxy, expected[:, 1:], atol=1e-9)
    image = ORACLE[f"warp{number}_image"]
    assert warped.image.shape == image.shape
    # OpenCV versions interpolate slightly differently; a wrong matrix is off by tens of levels on average
    assert np.abs(warped.image.astype(int) - image).mean() < 0.5


def test_warp_takes_the_extent_of_polygons() -> None:
    segments = [ORACLE["warp_seg0"], ORACLE["warp_seg1"]]
    warped = augment.warp(_warp_input(2, segments), _draws(2))
    np.testing.assert_array_equal(warped.classes, ORACLE["warpseg_targets"][:, 0])
    np.testing.assert_allclose(warped.boxes_xyxy, ORACLE["warpseg_targets"][:, 1:], atol=1e-9)


@pytest.mark.parametrize("number", range(2))
def test_hsv(number: int) -> None:
    factors = 1 + ORACLE[f"hsv{number}_draws"] * ORACLE[f"hsv{number}_gains"]
    image = augment.hsv(ORACLE["warp_image"].copy(), factors)
    assert np.abs(image.astype(int) - ORACLE[f"hsv{number}_out"]).max() <= 1


def _tiles(count: int) -> list[Sample]:
    tiles = []
    for (height, width), gray, labels in zip(
        ORACLE["mosaic_tile_hw"], ORACLE["mosaic_tile_gray"], ORACLE["mosaic_labels"], strict=True
    ):
        boxes = cxcywh_to_xyxy(labels[:, 1:] * np.array([width, height, width, height], np.float32))
        tiles.append(Sample(np.full((height, width, 3), gray, np.uint8), labels[:, 0], boxes))
    return tiles[:count]


@pytest.mark.parametrize(("kind", "number"), [(4, 0), (4, 1), (4, 2), (9, 0), (9, 1)])
def test_mosaic(kind: int, number: int) -> None:
    size = int(ORACLE["mosaic_img_size"])
    place = tuple(int(value) for value in ORACLE[f"mosaic{kind}_{number}_yc_xc"])
    assemble = augment.mosaic4 if kind == 4 else augment.mosaic9
    mosaic = augment.warp(assemble(_tiles(kind), size, place), WarpDraws(), (-size // 2, -size // 2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(mosaic.image, ORACLE[f"mosaic{kind}_{number}_img"])
    expected = ORACLE[f"mosaic{kind}_{number}_labels"]
    np.testing.assert_array_equal(mosaic.classes, expected[:, 0])
    np.testing.assert_allclose(mosaic.boxes_xyxy, expected[:, 1:], atol=2e-5)


def test_quad_collate() -> None:
    meta = SampleMeta(0, 1, "", (4, 4), ((1.0, 1.0), (0.0, 0.0)))
    items = [
        Item(np.full((4, 4, 3), k, np.uint8), np.array([[k, 0.5, 0.5, 0.2, 0.2]], np.float32), meta) for k in range(8)
    ]
    batch = collate_quad(items, ORACLE["quad_draws"])
    np.testing.assert_array_equal(batch.images.numpy(), ORACLE["quad_img"])
    np.testing.assert_allclose(batch.targets.numpy(), ORACLE["quad_targets"])
