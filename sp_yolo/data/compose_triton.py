"""The composition of sketches in one pass over the pixels, for CUDA GPUs. The formulas are compose.py's."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sp_yolo.data.sketch import SketchBatch

_BLOCK = 256  # pixels per program


def compose_pixels(batch: SketchBatch, out: Tensor) -> None:
    """``batch``, on the GPU, to ``out`` uint8 [B, H, W, 3] RGB; but for its ``values``, which are put on top later."""
    count, height, width = out.shape[:3]
    grid = (triton.cdiv(height * width, _BLOCK), count)
    layers = batch.pixels, batch.places, batch.inverses, batch.second, batch.shares
    compose_kernel[grid](*layers, batch.tables, out, height, width, BLOCK=_BLOCK)


@triton.jit
def compose_kernel(  # type: ignore[no-untyped-def]
    pixels, places, inverses, second, shares, tables, out, height, width, BLOCK: tl.constexpr
):
    image = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = at < height * width
    x, y = (at % width).to(tl.float32), (at // width).to(tl.float32)
    blue, green, red = _sample(pixels, places, inverses, image, x, y, valid)
    other = tl.load(second + image)
    if other >= 0:
        share = tl.load(shares + image)
        blue2, green2, red2 = _sample(pixels, places, inverses, other.to(tl.int64), x, y, valid)
        blue = tl.floor(blue * share + blue2 * (1 - share))
        green = tl.floor(green * share + green2 * (1 - share))
        red = tl.floor(red * share + red2 * (1 - share))
    b, g, r = blue.to(tl.int32), green.to(tl.int32), red.to(tl.int32)
    value = tl.maximum(tl.maximum(b, g), r)
    spread = value - tl.minimum(tl.minimum(b, g), r)
    saturation = (spread * _over(1044480.0, value) + 2048) >> 12
    hue = tl.where(value == r, g - b, tl.where(value == g, b - r + 2 * spread, r - g + 4 * spread))
    hue = (hue * _over(122880.0, spread) + 2048) >> 12
    hue = tl.where(hue < 0, hue + 180, hue)
    table = tables + image * 768
    h = tl.load(table + hue * 3, mask=valid, other=0).to(tl.float32) / 30
    s = tl.load(table + saturation * 3 + 1, mask=valid, other=0).to(tl.float32) / 255
    v = tl.load(table + value * 3 + 2, mask=valid, other=0).to(tl.float32)
    first = out + (image * height * width + at) * 3
    tl.store(first, _channel(5.0, h, s, v), mask=valid)
    tl.store(first + 1, _channel(3.0, h, s, v), mask=valid)
    tl.store(first + 2, _channel(1.0, h, s, v), mask=valid)


@triton.jit
def _sample(pixels, places, inverses, layer, x, y, valid):  # type: ignore[no-untyped-def]
    """Blue, green and red of a layer at output pixels, rounded."""
    start = tl.load(places + layer * 3)
    height, width = tl.load(places + layer * 3 + 1), tl.load(places + layer * 3 + 2)
    m = inverses + layer * 9
    z = tl.load(m + 6) * x + (tl.load(m + 7) * y + tl.load(m + 8))
    z = tl.where(z == 0, float("inf"), z)
    left, dx = _split((tl.load(m) * x + (tl.load(m + 1) * y + tl.load(m + 2))) / z, width)
    top, dy = _split((tl.load(m + 3) * x + (tl.load(m + 4) * y + tl.load(m + 5))) / z, height)
    upper = pixels + (start + top * width + left) * 3
    lower = upper + width * 3
    blue = _blend(upper, lower, dx, dy, valid)
    green = _blend(upper + 1, lower + 1, dx, dy, valid)
    red = _blend(upper + 2, lower + 2, dx, dy, valid)
    return blue, green, red


@triton.jit
def _split(position, side):  # type: ignore[no-untyped-def]
    position = tl.minimum(tl.maximum(position, 0.0), (side - 1).to(tl.float32))
    before = tl.minimum(tl.floor(position), (side - 2).to(tl.float32))
    return before.to(tl.int64), position - before


@triton.jit
def _blend(upper, lower, dx, dy, valid):  # type: ignore[no-untyped-def]
    a = tl.load(upper, mask=valid, other=0).to(tl.float32)
    b = tl.load(upper + 3, mask=valid, other=0).to(tl.float32)
    c = tl.load(lower, mask=valid, other=0).to(tl.float32)
    d = tl.load(lower + 3, mask=valid, other=0).to(tl.float32)
    a = a + (b - a) * dx
    c = c + (d - c) * dx
    return tl.floor(a + (c - a) * dy + 0.5)


@triton.jit
def _over(number, divisor):  # type: ignore[no-untyped-def]
    return tl.floor(number / tl.maximum(divisor, 1).to(tl.float32) + 0.5).to(tl.int32)


@triton.jit
def _channel(offset, hue, saturation, value):  # type: ignore[no-untyped-def]
    sector = hue + offset
    sector = tl.where(sector >= 6, sector - 6, sector)
    fall = tl.minimum(tl.maximum(tl.minimum(sector, 4 - sector), 0.0), 1.0)
    return (value - value * saturation * fall).to(tl.uint8)
