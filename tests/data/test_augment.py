from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from support.datasets import RECIPE, picture

from sp_yolo.data import augment, paste
from sp_yolo.data.augment import Sample, WarpDraws
from sp_yolo.data.canvas import painted


def _sample(height: int = 60, width: int = 80, *, outlined: bool = False) -> Sample:
    boxes = np.array([[10, 10, 30, 40], [50, 20, 70, 50]], np.float32)
    segments = None
    if outlined:
        corners = [[0, 1], [2, 1], [2, 3], [0, 3]]
        segments = [box[corners].reshape(4, 2) for box in boxes]
    return Sample(picture(height, width), np.array([0, 1], np.float32), boxes, segments)


def test_warp_draws_stay_in_their_ranges_and_fill_them() -> None:
    recipe = replace(RECIPE, degrees=10.0, shear=4.0, perspective=0.001, translate=0.2, scale=0.5)
    rng = np.random.default_rng(0)
    draws = np.array([augment.draw_warp(rng, recipe) for _ in range(4000)])
    # perspective x, y; angle; scale (asymmetric); shear x, y; translation x, y
    low = np.array([-0.001, -0.001, -10, 0.5, -4, -4, 0.3, 0.3])
    high = np.array([0.001, 0.001, 10, 1.6, 4, 4, 0.7, 0.7])
    assert (draws >= low).all() and (draws <= high).all()
    np.testing.assert_allclose(draws.min(0), low, atol=2e-2)
    np.testing.assert_allclose(draws.max(0), high, atol=2e-2)


def test_neutral_warp_is_the_identity() -> None:
    sample = _sample()
    warped = augment.warp(sample, WarpDraws())
    np.testing.assert_array_equal(warped.image, sample.image)
    np.testing.assert_allclose(warped.boxes_xyxy, sample.boxes_xyxy)


def test_warp_box_follows_the_painted_rectangle() -> None:
    image = np.zeros((100, 120, 3), np.uint8)
    box = np.array([[40, 30, 80, 60]], np.float32)
    image[30:60, 40:80] = 255
    warped = augment.warp(Sample(image, np.zeros(1, np.float32), box), WarpDraws(angle=20, scale=0.9, shear_x=5))
    ys, xs = np.nonzero(warped.image[..., 0] == 255)
    painted = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    np.testing.assert_allclose(warped.boxes_xyxy[0], painted, atol=1.5)


def test_warp_drops_what_is_hardly_visible_and_keeps_polygons_longer() -> None:
    # moved so that 8 % of a box stays: less than 10 %, more than the 1 % asked of an outlined object
    box = np.array([[0, 20, 50, 40]], np.float32)
    outline = [np.array([[0, 20], [50, 20], [50, 40], [0, 40]], np.float32)]
    draws = WarpDraws(translate_x=0.5 - 46 / 80)
    plain = Sample(picture(60, 80), np.zeros(1, np.float32), box)
    assert len(augment.warp(plain, draws).classes) == 0
    kept = augment.warp(Sample(plain.image, plain.classes, box, outline), draws)
    np.testing.assert_allclose(kept.boxes_xyxy, [[0, 20, 4, 40]], atol=0.1)


def test_mixed_polygons_and_boxes_are_warped_each_in_its_way() -> None:
    sample = _sample(outlined=True)
    assert sample.segments is not None
    diamond = np.array([[60, 20], [70, 35], [60, 50], [50, 35]], np.float32)
    draws = WarpDraws(angle=30)
    only_boxes = augment.warp(_sample(), draws).boxes_xyxy
    sample.segments = [np.empty((0, 2), np.float32), diamond]
    mixed = augment.warp(sample, draws).boxes_xyxy
    np.testing.assert_allclose(mixed[0], only_boxes[0])
    matrix = cv2.getRotationMatrix2D((40, 30), 30, 1.0)  # another way to the same rotation
    turned = diamond @ matrix[:, :2].T + matrix[:, 2]
    np.testing.assert_allclose(mixed[1], [*turned.min(0), *turned.max(0)], atol=0.05)


def test_an_empty_sample_passes_every_step() -> None:
    empty = Sample(picture(40, 50), np.zeros(0, np.float32), np.zeros((0, 4), np.float32))
    mosaic = augment.mosaic4([empty] * 4, 50, (50, 50))
    warped = augment.warp(mosaic, WarpDraws(scale=1.2), (-25, -25))
    mixed = augment.mixup(warped, warped, 0.5)
    flipped = augment.flip(mixed, True, True)
    assert flipped.image.shape == (50, 50, 3) and flipped.boxes_xyxy.shape == (0, 4)


def test_mosaic_shows_every_object_where_its_box_says() -> None:
    tiles = []
    for value in (60, 90, 150, 200):
        image = np.full((64, 64, 3), 10, np.uint8)
        image[20:40, 16:48] = value
        tiles.append(Sample(image, np.array([value], np.float32), np.array([[16, 20, 48, 40]], np.float32)))
    mosaic = augment.mosaic4(tiles, 64, (60, 70))
    assert mosaic.classes.tolist() == [60, 90, 150, 200]
    pixels = painted(mosaic.image)
    for value, (x1, y1, x2, y2) in zip(mosaic.classes, mosaic.boxes_xyxy.astype(int), strict=True):
        assert (pixels[y1:y2, x1:x2] == value).all()
        assert (pixels == value).all(2).sum() == (x2 - x1) * (y2 - y1)


def test_what_the_canvas_cuts_off_does_not_count_against_a_box() -> None:
    # 8 % of the object is on the canvas and all of that stays: judged by the whole object it would be dropped
    tile = Sample(picture(64, 64), np.zeros(1, np.float32), np.array([[2, 0, 62, 64]], np.float32))
    empty = Sample(picture(64, 64), np.zeros(0, np.float32), np.zeros((0, 4), np.float32))
    mosaic = augment.mosaic4([tile, empty, empty, empty], 64, (64, 7))
    np.testing.assert_allclose(mosaic.boxes_xyxy, [[0, 0, 5, 64]])
    assert len(augment.warp(mosaic, WarpDraws()).classes) == 1


def test_mosaic9_window_equals_a_cut_from_the_full_canvas() -> None:
    rng = np.random.default_rng(0)
    tiles = []
    for value in range(9):
        height, width = rng.integers(20, 33, 2)
        tiles.append(
            Sample(np.full((height, width, 3), 10 + value, np.uint8), np.zeros(0), np.zeros((0, 4), np.float32))
        )
    whole, moved = (painted(augment.mosaic9(tiles, 32, window).image) for window in ((0, 0), (7, 11)))
    np.testing.assert_array_equal(moved[:-7, :-11], whole[7:, 11:])


def test_mixup_is_the_truncated_mean_of_both() -> None:
    a, b = _sample(), _sample()
    b.image = np.full_like(b.image, 200)
    mixed = augment.mixup(a, b, 0.3)
    exact = np.floor(a.image.astype(np.float64) * 0.3 + 200 * 0.7 + 1e-4)
    assert np.abs(mixed.image - exact).max() <= 1 and (mixed.image == exact).mean() > 0.99
    assert mixed.classes.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("up_down", "left_right"), [(True, False), (False, True), (True, True), (False, False)])
def test_flip_moves_box_and_pixels_together(up_down: bool, left_right: bool) -> None:
    sample = _sample()
    sample.image[:] = 0
    sample.image[10:40, 10:30] = 255
    flipped = augment.flip(sample, up_down, left_right)
    x1, y1, x2, y2 = flipped.boxes_xyxy[0].astype(int)
    assert (flipped.image[y1:y2, x1:x2] == 255).all() and (flipped.image > 0).all(2).sum() == 600


def test_hsv_leaves_gray_and_neutral_alone() -> None:
    image = picture(20, 30)
    assert np.abs(augment.hsv(image.copy(), np.ones(3)).astype(int) - image).max() <= 5  # 8-bit hue is coarse
    gray = np.full((4, 4, 3), 90, np.uint8)
    np.testing.assert_array_equal(augment.hsv(gray.copy(), np.array([1.5, 1.5, 1.0])), gray)


# ------------------------------------------------------------------------------------------------------------- pasting
def test_copy_paste_mirrors_pixels_box_and_polygon() -> None:
    sample = _sample(outlined=True)
    assert sample.segments is not None
    # the mirror image of object 0 is at x 50..70: hidden by object 1 unless that moves away
    sample.boxes_xyxy[1] = [34, 50, 46, 58]
    pasted = paste.copy_paste(sample, [0])
    np.testing.assert_allclose(pasted.boxes_xyxy[2], [50, 10, 70, 40])
    assert pasted.classes.tolist() == [0, 1, 0] and pasted.segments is not None and len(pasted.segments) == 3
    # Dark source pixels are left out; the inner part (contours include their border) must match
    source, target = sample.image[12:38, 12:28][:, ::-1], pasted.image[12:38, 52:68]
    assert (target[source > 0] == source[source > 0]).all()
    outside = np.ones((60, 80), bool)
    outside[9:42, 48:72] = False
    np.testing.assert_array_equal(pasted.image[outside], sample.image[outside])


def test_copy_paste_spares_other_objects() -> None:
    sample = _sample(outlined=True)  # object 1 lies where the mirror image of object 0 would
    assert len(paste.copy_paste(sample, [0]).classes) == 2


def test_copy_paste_draws_without_repetition_and_only_outlined() -> None:
    sample = _sample(outlined=True)
    assert sample.segments is not None
    rng = np.random.default_rng(0)
    assert sorted(paste.draw_copy_paste(rng, sample, 1.0)) == [0, 1]
    sample.segments[0] = np.empty((0, 2), np.float32)
    assert paste.draw_copy_paste(rng, sample, 1.0).tolist() == [1]
    assert len(paste.draw_copy_paste(rng, _sample(), 1.0)) == 0


def test_paste_in_covers_no_object_and_labels_what_it_pastes() -> None:
    rng = np.random.default_rng(1)
    crop = paste.Crop(7.0, np.full((40, 30, 3), 255, np.uint8), np.ones((40, 30), bool))
    image = np.zeros((200, 240, 3), np.uint8)
    kept = np.array([[20, 20, 120, 120]], np.float32)
    for _ in range(5):
        result = paste.paste_in(Sample(image, np.zeros(1, np.float32), kept), [crop], rng)
        assert len(result.classes) > 1 and set(result.classes[1:].tolist()) == {7.0}
        painted = np.zeros((200, 240), bool)
        for x1, y1, x2, y2 in result.boxes_xyxy[1:].astype(int):
            painted[y1:y2, x1:x2] = True
            assert min(x2 - x1, y2 - y1) > 10 and x2 <= 240 and y2 <= 200
        np.testing.assert_array_equal((result.image == 255).all(2), painted)
    covered = paste.covered(np.array([20, 20, 120, 50]), kept)
    np.testing.assert_allclose(covered, [0.3])


def test_crops_hold_the_object_and_its_mask() -> None:
    sample = _sample(outlined=True)
    crops = paste.collect_crops(lambda: sample, np.random.default_rng(0))
    assert len(crops) >= 30
    for crop in crops:
        x1, y1, x2, y2 = sample.boxes_xyxy[int(crop.label)].astype(int)
        np.testing.assert_array_equal(crop.image, sample.image[y1:y2, x1:x2])
        assert crop.mask.all()
    assert paste.collect_crops(_sample, np.random.default_rng(0)) == []
