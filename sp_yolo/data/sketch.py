"""An augmented picture in numbers: which pixels it is made of and what becomes of them, for a device to compose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from sp_yolo.data.canvas import Canvas, Window, visible


class Layer(NamedTuple):
    """A window of a canvas, and ``inverse`` float64 [3, 3] from output pixels to pixels of that window."""

    canvas: Canvas
    window: Window
    inverse: np.ndarray


@dataclass(frozen=True)
class Sketch:
    """A picture of ``shape`` (h, w, 3): ``layers``, one, or two of which the first has ``share``; then the colours are
    changed by ``table`` [256, 3] of hue, saturation and value; then ``values`` uint8 [n, 3] BGR are put at the flat
    positions ``at`` [n]."""

    shape: tuple[int, int, int]
    layers: tuple[Layer, ...]
    share: float = 1.0
    table: np.ndarray | None = None
    at: np.ndarray | None = None
    values: np.ndarray | None = None

    @staticmethod
    def warped(picture: np.ndarray | Canvas, matrix: np.ndarray, output_hw: tuple[int, int]) -> Sketch:
        """``matrix`` [3, 3] leads from input to output pixels."""
        canvas = picture if isinstance(picture, Canvas) else Canvas(picture.shape[:2], [picture], [(0, 0)])
        inverse = np.linalg.inv(matrix)
        window = visible(inverse, output_hw, canvas.shape)
        shift = np.array([[1, 0, -window[0]], [0, 1, -window[1]], [0, 0, 1]])
        return Sketch((*output_hw, 3), (Layer(canvas, window, shift @ inverse),))

    def blended(self, other: Sketch, share: float) -> Sketch:
        return replace(self, layers=(*self.layers, *other.layers), share=share)

    def pasted(self, mask: np.ndarray, overlay: np.ndarray) -> Sketch:
        return replace(self, at=np.flatnonzero(mask), values=overlay[mask])

    def flipped(self, up_down: bool, left_right: bool) -> Sketch:
        height, width = self.shape[:2]
        mirror = np.eye(3)
        if left_right:
            mirror[0] = -1, 0, width - 1
        if up_down:
            mirror[1] = 0, -1, height - 1
        at = self.at
        if at is not None:
            x, y = at % width, at // width
            at = (height - 1 - y if up_down else y) * width + (width - 1 - x if left_right else x)
        layers = tuple(layer._replace(inverse=layer.inverse @ mirror) for layer in self.layers)
        return replace(self, layers=layers, at=at)


class SketchBatch(NamedTuple):
    """Sketches of one size as tensors. The first layers of all images come first, then the second ones.

    ``places`` int64 [L, 3]: first pixel, height, width of each layer's window; ``inverses`` float32 [L, 3, 3];
    ``second`` int32 [B]: each image's second layer, -1: none; ``shares`` float32 [B] of its first; ``tables`` uint8
    [B, 256, 3]; ``at`` int64 [n] of all B * H * W positions; ``values`` uint8 [n, 3] BGR; ``pixels`` uint8 [P, 3] BGR:
    the windows, row by row, one after the other.
    """

    places: Tensor
    inverses: Tensor
    second: Tensor
    shares: Tensor
    tables: Tensor
    at: Tensor
    values: Tensor
    pixels: Tensor


class Parcel(NamedTuple):
    """A :class:`SketchBatch` in one block of bytes, for one transfer to a process and one to a device.

    ``data`` uint8 [size]; ``layout``: type, shape and first byte of each tensor; ``hw``: of the pictures in px.
    """

    data: Tensor
    layout: Sequence[tuple[torch.dtype, Sequence[int], int]]
    hw: tuple[int, int]

    def opened(self, device: torch.device) -> SketchBatch:
        """The tensors on ``device``. A GPU is not waited for if ``data`` is pinned."""
        data = self.data.to(device, non_blocking=True)
        parts = []
        for kind, shape, start in self.layout:
            size = math.prod(shape) * kind.itemsize
            parts.append(data[start : start + size].view(kind).view(*shape))
        return SketchBatch(*parts)


def pack(sketches: Sequence[Sketch]) -> Parcel:
    """Paint what the sketches show of their canvases, all into one block.

    Raises:
        UserError: an image has become unreadable.
    """
    height, width = sketches[0].shape[:2]
    mixed = [position for position, sketch in enumerate(sketches) if len(sketch.layers) > 1]
    layers = [sketch.layers[0] for sketch in sketches] + [sketches[position].layers[1] for position in mixed]
    second = np.full(len(sketches), -1, np.int32)
    second[mixed] = np.arange(len(sketches), len(layers))
    places, end = [], 0
    for _, (x1, y1, x2, y2), _ in layers:
        places.append((end, y2 - y1, x2 - x1))
        end += (y2 - y1) * (x2 - x1)
    neutral = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    patches = [(n * height * width + s.at, s.values) for n, s in enumerate(sketches) if s.at is not None]
    numbers = (
        np.array(places, np.int64),
        np.stack([layer.inverse for layer in layers]).astype(np.float32),
        second,
        np.array([sketch.share for sketch in sketches], np.float32),
        np.stack([neutral if sketch.table is None else sketch.table for sketch in sketches]),
        np.concatenate([at for at, _ in patches]) if patches else np.zeros(0, np.int64),
        np.concatenate([value for _, value in patches]) if patches else np.zeros((0, 3), np.uint8),
    )
    layout: list[tuple[torch.dtype, Sequence[int], int]] = []
    start = 0
    for array in numbers:
        layout.append((torch.from_numpy(array).dtype, array.shape, start))
        start += -(-array.nbytes // 16) * 16
    layout.append((torch.uint8, (end, 3), start))
    data = _empty(start + 3 * end)
    block = data.numpy()
    for array, (_, _, first) in zip(numbers, layout, strict=False):
        block[first : first + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    pixels = block[start:].reshape(end, 3)
    for (canvas, window, _), (first, h, w) in zip(layers, places, strict=True):
        canvas.paint(window, pixels[first : first + h * w].reshape(h, w, 3))
    return Parcel(data, layout, (height, width))


def _empty(size: int) -> Tensor:
    """uint8 [size]; in a loader process of the memory that it will be sent in, as torch's own collate has it."""
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
