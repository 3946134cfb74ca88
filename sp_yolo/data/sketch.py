"""An augmented picture in numbers: which pixels it is made of and what becomes of them, for a device to compose."""

from __future__ import annotations

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

    ``pixels`` uint8 [P, 3] BGR: the windows, row by row, one after the other; ``places`` int64 [L, 3]: first pixel,
    height, width of each; ``inverses`` float32 [L, 3, 3]; ``mixed`` int64 [m]: the images that have a second layer;
    ``shares`` float32 [m] of their first; ``tables`` uint8 [B, 256, 3]; ``at`` int64 [n] of all B * H * W positions;
    ``values`` uint8 [n, 3] BGR; ``hw``: height and width in px.
    """

    pixels: Tensor
    places: Tensor
    inverses: Tensor
    mixed: Tensor
    shares: Tensor
    tables: Tensor
    at: Tensor
    values: Tensor
    hw: tuple[int, int]


def pack(sketches: Sequence[Sketch]) -> SketchBatch:
    """Paint what the sketches show of their canvases, all into one tensor.

    Raises:
        UserError: an image has become unreadable.
    """
    height, width = sketches[0].shape[:2]
    mixed = [position for position, sketch in enumerate(sketches) if len(sketch.layers) > 1]
    layers = [sketch.layers[0] for sketch in sketches] + [sketches[position].layers[1] for position in mixed]
    places, end = [], 0
    for _, (x1, y1, x2, y2), _ in layers:
        places.append((end, y2 - y1, x2 - x1))
        end += (y2 - y1) * (x2 - x1)
    pixels = _empty(3 * end).view(end, 3)
    for (canvas, window, _), (start, h, w) in zip(layers, places, strict=True):
        canvas.paint(window, pixels[start : start + h * w].view(h, w, 3).numpy())
    neutral = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    tables = np.stack([neutral if sketch.table is None else sketch.table for sketch in sketches])
    patches = [(n * height * width + s.at, s.values) for n, s in enumerate(sketches) if s.at is not None]
    at = np.concatenate([at for at, _ in patches]) if patches else np.zeros(0, np.int64)
    values = np.concatenate([value for _, value in patches]) if patches else np.zeros((0, 3), np.uint8)
    return SketchBatch(
        pixels,
        torch.tensor(places),
        torch.from_numpy(np.stack([layer.inverse for layer in layers]).astype(np.float32)),
        torch.tensor(mixed, dtype=torch.int64),
        torch.tensor([sketches[position].share for position in mixed], dtype=torch.float32),
        torch.from_numpy(tables),
        torch.from_numpy(at),
        torch.from_numpy(values),
        (height, width),
    )


def _empty(size: int) -> Tensor:
    """uint8 [size]; in a loader process of the memory that it will be sent in, as torch's own collate has it."""
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
