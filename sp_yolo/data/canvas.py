"""Pictures that are not painted yet, so that only what will be seen of them is read and moved."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

PADDING = 114  # gray value of everything that no image covers

Window: TypeAlias = tuple[int, int, int, int]  # x1, y1, x2, y2 px of a canvas; may reach beyond it


class Tile:
    """An image of known ``shape`` (h, w, 3) that is read when its pixels are first wanted."""

    def __init__(self, size_wh: tuple[int, int], read: Callable[[], np.ndarray]) -> None:
        self.shape = (size_wh[1], size_wh[0], 3)
        self._read = read

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        return self._read()


class Canvas:
    """``tiles``, arrays or :class:`Tile`, with their top left at ``corners`` (x, y) px on a gray ground of ``hw`` px.

    The last one lies on top.
    """

    def __init__(self, hw: tuple[int, int], tiles: Sequence[Any], corners: Sequence[tuple[int, int]]) -> None:
        self.shape = (*hw, 3)
        self._tiles = list(zip(tiles, corners, strict=True))

    def paint(self, window: Window | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """The pixels uint8 [h, w, 3] of ``window`` (None: of all); gray beyond the canvas. Written to ``out`` if given.

        Raises:
            UserError: a tile that can be seen has become unreadable.
        """
        height, width = self.shape[:2]
        left, top, right, bottom = window or (0, 0, width, height)
        if out is None:
            out = np.empty((bottom - top, right - left, 3), np.uint8)
        out[:] = PADDING
        for tile, (x, y) in self._tiles:
            tile_h, tile_w = tile.shape[:2]
            x1, y1 = max(x, left, 0), max(y, top, 0)
            x2, y2 = min(x + tile_w, right, width), min(y + tile_h, bottom, height)
            if x1 < x2 and y1 < y2:
                seen = painted(tile)[y1 - y : y2 - y, x1 - x : x2 - x]
                out[y1 - top : y2 - top, x1 - left : x2 - left] = seen
        return out

    def paint_within(self, window: Window) -> np.ndarray:
        """All of the canvas, of which only the pixels in ``window`` are worth anything."""
        height, width = self.shape[:2]
        out = np.empty((height, width, 3), np.uint8)
        x1, y1, x2, y2 = max(window[0], 0), max(window[1], 0), min(window[2], width), min(window[3], height)
        self.paint((x1, y1, x2, y2), out[y1:y2, x1:x2])
        return out


def painted(picture: object) -> np.ndarray:
    """The pixels, uint8 [h, w, 3] BGR, of an array, a tile or a canvas.

    Raises:
        TypeError: anything else; a sketch has none.
    """
    if isinstance(picture, Tile):
        return picture.pixels
    if isinstance(picture, Canvas):
        return picture.paint()
    if isinstance(picture, np.ndarray):
        return picture
    raise TypeError(f"{type(picture).__name__} has no pixels")


def visible(inverse: np.ndarray, output_hw: tuple[int, int], canvas_hw: Sequence[int]) -> Window:
    """What of a canvas is needed to interpolate an output of which ``inverse`` [3, 3] leads back to the canvas.

    One px more on each side, and none that is further beyond the border of the canvas. At least 2 x 2.
    """
    height, width = output_hw
    corners = np.array([(x, y, 1.0) for x in (0, width - 1) for y in (0, height - 1)]) @ inverse.T
    canvas_h, canvas_w = canvas_hw[:2]
    if corners[:, 2].min() <= 1e-6:  # the horizon of a perspective lies in the picture: everything may be seen
        return -1, -1, canvas_w + 1, canvas_h + 1
    points = corners[:, :2] / corners[:, 2:]
    (left, top), (right, bottom) = points.min(0), points.max(0)
    x1, x2 = _span(left, right, canvas_w)
    y1, y2 = _span(top, bottom, canvas_h)
    return x1, y1, x2, y2


def _span(low: float, high: float, side: int) -> tuple[int, int]:
    start = math.floor(min(max(low - 1, -1), side - 1))
    return start, math.ceil(min(max(high + 2, start + 2), side + 1))
