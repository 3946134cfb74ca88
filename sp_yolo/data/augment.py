"""Augmentation as pure functions of a Sample: each ``draw_*`` takes a generator, each application only its draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np

from sp_yolo.config import AugmentRecipe
from sp_yolo.data.canvas import PADDING, Canvas, Tile, painted, visible
from sp_yolo.data.sketch import Sketch

_SEGMENT_POINTS = 1000  # a polygon is resampled to this many, so that clipping it at the border is exact enough
_EPSILON = 1e-16


Picture: TypeAlias = np.ndarray | Tile | Canvas | Sketch  # each has a .shape
Render: TypeAlias = Callable[[Any, np.ndarray, tuple[int, int]], np.ndarray | Sketch]


@dataclass(slots=True)
class Sample:
    """One picture on its way: ``image`` uint8 [H, W, 3] BGR, ``classes`` [n], ``boxes_xyxy`` [n, 4] px.

    The image may be one that is still to be read or painted, or a sketch, of which a device makes the pixels.
    ``segments``: a polygon [k, 2] px per box ([0, 2]: none), or None when no box has one.
    """

    image: Picture
    classes: np.ndarray
    boxes_xyxy: np.ndarray
    segments: list[np.ndarray] | None = None


# ------------------------------------------------------------------------------------------------------ random warp
class WarpDraws(NamedTuple):
    """What a warp draws, in this order: degrees for angle and shear, shares of the output size for the translation."""

    perspective_x: float = 0.0
    perspective_y: float = 0.0
    angle: float = 0.0
    scale: float = 1.0
    shear_x: float = 0.0
    shear_y: float = 0.0
    translate_x: float = 0.5
    translate_y: float = 0.5


def draw_warp(rng: np.random.Generator, recipe: AugmentRecipe) -> WarpDraws:
    """Eight draws; the scale range [1 - s, 1.1 + s] is the original's."""
    u = rng.random(8) * 2 - 1
    perspective, shear, translate, scale = recipe.perspective, recipe.shear, recipe.translate, recipe.scale
    low, high = 1 - scale, 1.1 + scale
    return WarpDraws(
        u[0] * perspective,
        u[1] * perspective,
        u[2] * recipe.degrees,
        low + (u[3] + 1) / 2 * (high - low),
        u[4] * shear,
        u[5] * shear,
        0.5 + u[6] * translate,
        0.5 + u[7] * translate,
    )


def warp_matrix(draws: WarpDraws, input_hw: tuple[int, int], output_hw: tuple[int, int]) -> np.ndarray:
    """Translation x shear x rotation and scale x perspective x centring: float64 [3, 3], input to output pixels."""
    centre = np.eye(3)
    centre[:2, 2] = -input_hw[1] / 2, -input_hw[0] / 2
    perspective = np.eye(3)
    perspective[2, :2] = draws.perspective_x, draws.perspective_y
    rotation = np.eye(3)
    cosine, sine = (draws.scale * f(math.radians(draws.angle)) for f in (math.cos, math.sin))
    rotation[:2, :2] = (cosine, sine), (-sine, cosine)  # a positive angle turns counter-clockwise in the picture
    shear = np.eye(3)
    shear[0, 1], shear[1, 0] = math.tan(math.radians(draws.shear_x)), math.tan(math.radians(draws.shear_y))
    translation = np.eye(3)
    translation[:2, 2] = draws.translate_x * output_hw[1], draws.translate_y * output_hw[0]
    return translation @ shear @ rotation @ perspective @ centre


def warp(sample: Sample, draws: WarpDraws, border_hw: tuple[int, int] = (0, 0), render: Render | None = None) -> Sample:
    """Picture and boxes into input size + 2 border; a box that keeps too little of itself is dropped.

    ``render`` warps the picture: :func:`warp_pixels`, or ``Sketch.warped`` to leave it to a device.
    """
    height, width = sample.image.shape[0] + 2 * border_hw[0], sample.image.shape[1] + 2 * border_hw[1]
    matrix = warp_matrix(draws, sample.image.shape[:2], (height, width))
    image = (render or warp_pixels)(sample.image, matrix, (height, width))
    if not len(sample.classes):
        return Sample(image, sample.classes, sample.boxes_xyxy)
    boxes = _warp_boxes(sample.boxes_xyxy, matrix, width, height)
    smallest_share = np.full(len(boxes), 0.1)
    if sample.segments is not None:
        outlined = np.array([bool(len(segment)) for segment in sample.segments])
        boxes[outlined] = _warp_segments([s for s in sample.segments if len(s)], matrix, width, height)
        smallest_share[outlined] = 0.01
    keep = _keep(sample.boxes_xyxy * draws.scale, boxes, smallest_share)
    return Sample(image, sample.classes[keep], boxes[keep].astype(sample.boxes_xyxy.dtype))


def warp_pixels(picture: Picture, matrix: np.ndarray, output_hw: tuple[int, int]) -> np.ndarray:
    """Through ``matrix`` [3, 3], from input to output pixels. Of a canvas only what can be seen is read."""
    height, width = output_hw
    if isinstance(picture, Canvas):
        image = picture.paint_within(visible(np.linalg.inv(matrix), output_hw, picture.shape))
    else:
        image = painted(picture)
    if image.shape[:2] == output_hw and (matrix == np.eye(3)).all():
        return image
    color = (PADDING, PADDING, PADDING)
    if matrix[2, :2].any():
        return cv2.warpPerspective(image, matrix, (width, height), borderValue=color)
    return cv2.warpAffine(image, matrix[:2], (width, height), borderValue=color)


def _project(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """[..., 2] px through a 3 x 3 matrix."""
    moved = points @ matrix[:2, :2].T + matrix[:2, 2]
    if matrix[2, 0] or matrix[2, 1]:
        moved /= (points @ matrix[2, :2] + matrix[2, 2])[..., None]
    return moved


def _warp_boxes(boxes_xyxy: np.ndarray, matrix: np.ndarray, width: int, height: int) -> np.ndarray:
    """Axis-aligned hulls of the four moved corners, clipped to the output."""
    corners = _project(boxes_xyxy[:, [0, 1, 2, 3, 0, 3, 2, 1]].reshape(-1, 4, 2).astype(np.float64), matrix)
    hulls = np.concatenate((corners.min(1), corners.max(1)), 1)
    return np.clip(hulls, 0, (width, height, width, height))


def _warp_segments(segments: Sequence[np.ndarray], matrix: np.ndarray, width: int, height: int) -> np.ndarray:
    """[n, 4] extents of the parts of closed polygons that lie inside the output; all zero where nothing does."""
    if not segments:
        return np.zeros((0, 4))
    # One interpolation for all: polygon i occupies the knots start[i] .. start[i] + length[i] of a common axis.
    closed = np.concatenate([part for segment in segments for part in (segment, segment[:1])]).astype(np.float64)
    length = np.array([len(segment) for segment in segments])
    start = np.concatenate(([0], np.cumsum(length + 1)[:-1]))
    at = start[:, None] + np.linspace(0, 1, _SEGMENT_POINTS) * length[:, None]
    knots = np.arange(len(closed))
    points = _project(np.stack([np.interp(at, knots, closed[:, axis]) for axis in (0, 1)], -1), matrix)
    inside = np.all((points >= 0) & (points <= (width, height)), axis=-1, keepdims=True)
    low, high = np.where(inside, points, np.inf).min(1), np.where(inside, points, -np.inf).max(1)
    return np.where(inside.any(1), np.concatenate((low, high), 1), 0.0)


def _keep(before_xyxy: np.ndarray, after_xyxy: np.ndarray, smallest_share: np.ndarray) -> np.ndarray:
    """Which warped boxes are still worth learning: over 2 px, enough of the area, not too thin."""
    width_height = before_xyxy[:, 2:] - before_xyxy[:, :2]
    width, height = (after_xyxy[:, 2:] - after_xyxy[:, :2]).T
    share = width * height / (width_height.prod(1) + _EPSILON)
    thinness = np.maximum(width / (height + _EPSILON), height / (width + _EPSILON))
    return (width > 2) & (height > 2) & (share > smallest_share) & (thinness < 20)


# ----------------------------------------------------------------------------------------------------------- mosaic
def draw_mosaic4(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """(yc, xc): where the four tiles meet, in px of the 2s x 2s canvas."""
    y, x = rng.uniform(size / 2, 3 * size / 2, 2)
    return int(y), int(x)


def mosaic4(tiles: Sequence[Sample], size: int, centre_yx: tuple[int, int]) -> Sample:
    """Four tiles around ``centre_yx`` on a 2s x 2s canvas."""
    yc, xc = centre_yx
    corners = []
    for position, tile in enumerate(tiles):
        height, width = tile.image.shape[:2]
        corners.append((xc if position % 2 else xc - width, yc if position > 1 else yc - height))
    return _assemble(tiles, corners, 2 * size)


def draw_mosaic9(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """(yc, xc): top left of the 2s x 2s window, in px of the 3s x 3s canvas."""
    y, x = rng.uniform(0, size, 2)
    return int(y), int(x)


def mosaic9(tiles: Sequence[Sample], size: int, window_yx: tuple[int, int]) -> Sample:
    """Nine tiles in a clockwise spiral, seen through a 2s x 2s window; only the window is ever painted."""
    s, (yc, xc) = size, window_yx
    h0, w0 = tiles[0].image.shape[:2]
    hp = wp = 0
    corners = []
    for position, tile in enumerate(tiles):
        h, w = tile.image.shape[:2]
        x, y = (
            (s, s),
            (s, s - h),
            (s + wp, s - h),
            (s + w0, s),
            (s + w0, s + hp),
            (s + w0 - w, s + h0),
            (s + w0 - wp - w, s + h0),
            (s - w, s + h0 - h),
            (s - w, s + h0 - hp - h),
        )[position]
        corners.append((x - xc, y - yc))
        hp, wp = h, w
    return _assemble(tiles, corners, 2 * s)


def _assemble(tiles: Sequence[Sample], corners: Sequence[tuple[int, int]], side: int) -> Sample:
    """Tiles with their top left at ``corners`` (x, y) on a square canvas, boxes and polygons clipped to it."""
    canvas = Canvas((side, side), [tile.image for tile in tiles], corners)
    shifts = np.repeat(np.array(corners, np.float32), [len(tile.classes) for tile in tiles], axis=0)
    boxes = np.concatenate([tile.boxes_xyxy for tile in tiles]) + np.concatenate((shifts, shifts), 1)
    segments = join_segments(tiles)
    if segments is not None:
        segments = [np.clip(segment + shift, 0, side) for segment, shift in zip(segments, shifts, strict=True)]
    return Sample(canvas, np.concatenate([tile.classes for tile in tiles]), np.clip(boxes, 0, side), segments)


def join_segments(samples: Sequence[Sample]) -> list[np.ndarray] | None:
    """The polygons of several samples, one per box; None when no sample has any."""
    if all(sample.segments is None for sample in samples):
        return None
    none = np.empty((0, 2), np.float32)
    joined: list[np.ndarray] = []
    for sample in samples:
        joined += sample.segments if sample.segments is not None else [none] * len(sample.classes)
    return joined


def mixup(first: Sample, second: Sample, share: float) -> Sample:
    """``share`` of the first picture plus the rest of the second, truncated; the boxes of both."""
    classes = np.concatenate((first.classes, second.classes))
    boxes = np.concatenate((first.boxes_xyxy, second.boxes_xyxy))
    if isinstance(first.image, Sketch) and isinstance(second.image, Sketch):
        return Sample(first.image.blended(second.image, share), classes, boxes)
    blend = painted(first.image) * np.float32(share) + painted(second.image) * np.float32(1 - share)
    return Sample(blend.astype(np.uint8), classes, boxes)


# ----------------------------------------------------------------------------------------------------- colour, flips
def draw_hsv(rng: np.random.Generator, recipe: AugmentRecipe) -> np.ndarray:
    """Three factors around 1 for hue, saturation and value."""
    return 1 + rng.uniform(-1, 1, 3) * (recipe.hsv_h, recipe.hsv_s, recipe.hsv_v)


def hsv(image: Picture, factors: np.ndarray) -> np.ndarray | Sketch:
    """A BGR picture with hue, saturation and value multiplied, through tables of 256."""
    levels = np.arange(256)
    table = np.empty((256, 3), np.uint8)
    table[:, 0] = (levels * factors[0]) % 180
    table[:, 1:] = np.clip(levels[:, None] * factors[1:], 0, 255)
    if isinstance(image, Sketch):
        return replace(image, table=table)
    converted = cv2.cvtColor(painted(image), cv2.COLOR_BGR2HSV)
    return cv2.cvtColor(cv2.LUT(converted, table[None], converted), cv2.COLOR_HSV2BGR)


def flip(sample: Sample, up_down: bool, left_right: bool) -> Sample:
    """Mirror picture and boxes; polygons are not carried on."""
    if not up_down and not left_right:
        return sample
    height, width = sample.image.shape[:2]
    boxes = sample.boxes_xyxy.copy()
    if up_down:
        boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
    if left_right:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    if isinstance(sample.image, Sketch):
        return Sample(sample.image.flipped(up_down, left_right), sample.classes, boxes)
    code = -1 if up_down and left_right else int(left_right)
    return Sample(cv2.flip(painted(sample.image), code), sample.classes, boxes)
