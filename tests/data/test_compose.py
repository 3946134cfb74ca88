"""Pictures that a device composes are those of the CPU: same draws, same labels, pixels within a few gray levels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support.datasets import RECIPE, picture, yolo_set

from sp_yolo.config import AugmentRecipe, DatasetConfig
from sp_yolo.data import Batch, DetectionDataset, augment, build_loader
from sp_yolo.data import compose as composing
from sp_yolo.data.augment import Sample, WarpDraws
from sp_yolo.data.canvas import Canvas, Tile, painted, visible
from sp_yolo.data.compose import compose
from sp_yolo.data.sketch import Sketch, pack
from sp_yolo.errors import UserError

CPU = torch.device("cpu")
BOX = "0 0.5 0.5 0.2 0.4\n"
DIAMOND = "1 0.5 0.2 0.7 0.5 0.5 0.8 0.3 0.5\n"
PLAIN = replace(RECIPE, mixup=0.0, copy_paste=0.0, paste_in=0.0, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0)
RECIPES = {
    "everything": RECIPE,
    "warp": PLAIN,
    "strong warp": replace(PLAIN, degrees=45.0, shear=10.0, scale=0.9, translate=0.4),
    "perspective": replace(PLAIN, perspective=0.001),
    "horizon": replace(PLAIN, perspective=0.02),
    "colour": replace(PLAIN, hsv_h=0.1, hsv_s=0.7, hsv_v=0.4),
    "mixup": replace(PLAIN, mixup=1.0),
    "copy_paste": replace(PLAIN, copy_paste=1.0),
    "paste_in": replace(RECIPE, paste_in=1.0, mixup=0.0),
    "flips": replace(PLAIN, flipud=0.5, fliplr=0.5),
    "no mosaic": replace(RECIPE, mosaic=0.0),
}


def _photos(root: Path, count: int = 7) -> DatasetConfig:
    """Smooth colours with sharp edges, of several shapes."""
    config = yolo_set(root, {str(n): BOX + DIAMOND * (n % 2) for n in range(count)})
    for n in range(count):
        image = picture(80 + 10 * (n % 3), 170 - 15 * n, n)
        cv2.rectangle(image, (30, 20), (70, 60), (255, 255, 255), 3)
        cv2.circle(image, (50, 50), 25, (0, 30, 200), -1)
        cv2.imwrite(str(root / "images" / f"{n}.png"), image)
    return config


def _batches(config: DatasetConfig, recipe: AugmentRecipe, *, sketches: bool, **options: object) -> list[Batch]:
    dataset = DetectionDataset(config, "train", 128, augment=recipe, batch_size=3, sketches=sketches, **options)  # type: ignore[arg-type]
    loader = build_loader(dataset, batch_size=3, shuffle=True, seed=4)
    return [batch for epoch in range(4) for batch in loader.epoch(epoch)]


def _assert_close(made: torch.Tensor, expected: torch.Tensor) -> None:
    """cv2 5 interpolates exactly; cv2 4 places a pixel to 1/32 px, at an edge of 255 levels 4 in each direction, of
    which the colours make more."""
    difference = (made.int() - expected.int()).abs()
    assert made.shape == expected.shape and int(difference.max()) <= (12 if int(cv2.__version__[0]) > 4 else 32)
    assert float(difference.float().mean()) < 0.25 and float((difference > 3).float().mean()) < 0.01


@pytest.mark.parametrize("name", RECIPES)
def test_the_device_composes_what_the_cpu_paints(tmp_path: Path, name: str) -> None:
    config = _photos(tmp_path)
    pairs = zip(
        _batches(config, RECIPES[name], sketches=True), _batches(config, RECIPES[name], sketches=False), strict=True
    )
    for made, expected in pairs:
        assert torch.equal(made.targets, expected.targets) and made.metas == expected.metas
        assert made.images.dtype == torch.uint8 and made.images.is_contiguous(memory_format=torch.channels_last)
        _assert_close(made.images, expected.images)


def test_rect_batches_are_composed_too(tmp_path: Path) -> None:
    config = _photos(tmp_path)
    pairs = zip(*(_batches(config, RECIPE, sketches=each, rect=True) for each in (True, False)), strict=True)
    shapes = set()
    for made, expected in pairs:
        _assert_close(made.images, expected.images)
        shapes.add(tuple(made.images.shape[2:]))
    assert len(shapes) > 1


def test_interpolation_is_that_of_a_float64_loop() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3)).astype(np.uint8)
    matrix = augment.warp_matrix(WarpDraws(0.01, -0.02, 25, 0.8, 5, 3, 0.45, 0.6), (9, 11), (12, 10))
    made = compose(pack([Sketch.warped(image, matrix, (12, 10))]), CPU)[0].permute(1, 2, 0).numpy()
    inverse, padded = np.linalg.inv(matrix), np.full((99, 111, 3), 114.0)
    padded[45:54, 50:61] = image[..., ::-1]
    for y in range(12):
        for x in range(10):
            u, v, w = inverse @ (x, y, 1)
            u, v = u / w + 50, v / w + 45
            left, top = int(np.floor(u)), int(np.floor(v))
            corners = padded[top : top + 2, left : left + 2]
            weights = np.outer((top + 1 - v, v - top), (left + 1 - u, u - left))
            # hue and saturation lose up to 5 levels in 8 bits, with a neutral table too
            np.testing.assert_allclose(made[y, x], (corners * weights[..., None]).sum((0, 1)), atol=6.5)


def test_beyond_the_picture_all_is_gray() -> None:
    image = np.full((40, 50, 3), 200, np.uint8)
    for shift in ((1, 0), (-1, 0), (0, 1), (0, -1), (30, 30)):  # in picture sizes: nothing is left to be seen
        matrix = np.eye(3)
        matrix[:2, 2] = 52 * shift[0], 42 * shift[1]
        made = compose(pack([Sketch.warped(image, matrix, (40, 50))]), CPU)
        assert (made == 114).all()
    matrix[:2, 2] = 10.5, 0  # a border half way between both
    made = compose(pack([Sketch.warped(image, matrix, (40, 50))]), CPU)[0, 0, 20]
    assert made[:10].tolist() == [114] * 10 and made[10] == 157 and (made[11:] == 200).all()


def test_every_colour_is_changed_as_cv2_does() -> None:
    levels = np.arange(256, dtype=np.uint8)
    identity = np.eye(3)
    factors = np.array([1.013, 1.4, 0.7])
    for blue in range(0, 256, 51):
        image = np.stack(np.meshgrid(levels, levels, levels[blue : blue + 1], indexing="ij"), -1)[:, :, 0, ::-1].copy()
        sketch = augment.hsv(Sketch.warped(image, identity, (256, 256)), factors)
        assert isinstance(sketch, Sketch)
        made = compose(pack([sketch]), CPU)[0].permute(1, 2, 0).numpy()
        expected = painted(augment.hsv(image, factors))[..., ::-1]
        assert np.abs(made.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("perspective", [0.0, 0.0005])
def test_the_window_holds_every_pixel_that_is_looked_at(perspective: float) -> None:
    rng = np.random.default_rng(0)
    recipe = replace(PLAIN, degrees=180.0, shear=20.0, scale=0.9, translate=0.5, perspective=perspective)
    smaller = 0
    for _ in range(300):
        canvas_hw, output_hw = tuple(rng.integers(4, 90, 2)), tuple(rng.integers(4, 60, 2))
        inverse = np.linalg.inv(augment.warp_matrix(augment.draw_warp(rng, recipe), canvas_hw, output_hw))
        x1, y1, x2, y2 = visible(inverse, output_hw, canvas_hw)
        assert x2 - x1 >= 2 and y2 - y1 >= 2 and x1 >= -1 and y1 >= -1 and x2 <= canvas_hw[1] + 1
        grid = np.stack([*np.meshgrid(np.arange(output_hw[1]), np.arange(output_hw[0])), np.ones(output_hw)], -1)
        points = grid @ inverse.T
        points = np.floor(points[..., :2] / points[..., 2:]).reshape(-1, 2)
        looked_at = (points[:, None] + [[0, 0], [1, 0], [0, 1], [1, 1]]).reshape(-1, 2)
        looked_at = looked_at[((looked_at >= 0) & (looked_at < canvas_hw[::-1])).all(1)]
        assert ((looked_at >= (x1, y1)) & (looked_at < (x2, y2))).all()
        smaller += (x2 - x1) * (y2 - y1) < canvas_hw[0] * canvas_hw[1]
    assert smaller > 50


@pytest.mark.parametrize("render", [augment.warp_pixels, Sketch.warped])
def test_tiles_that_are_not_seen_are_not_read(render: augment.Render) -> None:
    read: list[int] = []

    def tile(number: int) -> Tile:
        def load() -> np.ndarray:
            read.append(number)
            return np.full((64, 64, 3), number, np.uint8)

        return Tile((64, 64), load)

    nothing = np.zeros(0, np.float32), np.zeros((0, 4), np.float32)
    mosaic = augment.mosaic4([Sample(tile(number), *nothing) for number in range(4)], 64, (64, 64))
    assert isinstance(mosaic.image, Canvas) and not read
    # scaled by 4, around a point in the upper half: the two upper tiles fill the 64 x 64 output
    draws = WarpDraws(scale=4.0, translate_y=0.5 + 50 / 64)
    warped = augment.warp(mosaic, draws, (-32, -32), render=render)
    image = warped.image
    if isinstance(image, Sketch):
        compose(pack([image]), CPU)
    assert sorted(read) == [0, 1]


def test_work_in_parts_gives_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _photos(tmp_path)
    whole = _batches(config, RECIPE, sketches=True)
    monkeypatch.setattr(composing, "_AT_ONCE", 1)
    for one, other in zip(whole, _batches(config, RECIPE, sketches=True), strict=True):
        assert torch.equal(one.images, other.images)


def test_workers_send_sketches_and_name_what_they_cannot_read(tmp_path: Path) -> None:
    config = _photos(tmp_path)
    dataset = DetectionDataset(config, "train", 128, augment=RECIPE, sketches=True)
    loader = build_loader(dataset, batch_size=3, shuffle=True, seed=4, workers=1)
    expected = _batches(config, RECIPE, sketches=True)
    for batch, alone in zip(loader.epoch(0), expected, strict=False):
        assert torch.equal(batch.images, alone.images) and torch.equal(batch.targets, alone.targets)
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"gone bad")
    with pytest.raises(UserError, match=r"images/\d.png: truncated or not an image") as caught:
        list(loader.epoch(1))
    loader.close()
    assert "\n" not in str(caught.value)
