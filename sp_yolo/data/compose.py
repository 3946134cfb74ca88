"""Sketches -> pictures, in torch on any device, or in one kernel on CUDA GPUs: what cv2 does on the CPU.

The same draws from the same seeds, pixels within a few gray levels: tests/data/test_compose.py says how few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sp_yolo.data.sketch import Parcel, SketchBatch

_AT_ONCE = 1 << 22  # output pixels that torch works on together: bounds the memory
_failed: set[torch.device] = set()  # where the kernel does not work; not tried again


@torch.no_grad()
def compose(parcel: Parcel, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] RGB in channels_last memory, on ``device``. A GPU is not waited for."""
    batch = parcel.opened(device)
    rgb = torch.empty((len(batch.tables), *parcel.hw, 3), dtype=torch.uint8, device=device)
    if not _in_one_kernel(batch, rgb):
        _in_torch(batch, rgb)
    if len(batch.at):
        rgb.view(-1, 3)[batch.at] = batch.values.flip(1)
    return rgb.permute(0, 3, 1, 2)


def _in_one_kernel(batch: SketchBatch, rgb: Tensor) -> bool:
    """False where there is no Triton, no compiler for its launcher, or a card that it does not know."""
    if not rgb.is_cuda or torch.version.hip is not None or rgb.device in _failed:
        return False
    try:
        from sp_yolo.data.compose_triton import compose_pixels

        with torch.cuda.device(rgb.device):
            compose_pixels(batch, rgb)
    except Exception:  # each fails in its own way
        _failed.add(rgb.device)
        return False
    return True


def _in_torch(batch: SketchBatch, rgb: Tensor) -> None:
    count, height, width = rgb.shape[:3]
    layers = len(batch.places)
    pictures = torch.empty((layers, height, width, 3), dtype=torch.uint8, device=rgb.device)
    step = max(_AT_ONCE // (height * width), 1)
    for start in range(0, layers, step):
        _sample(batch, slice(start, start + step), pictures[start : start + step])
    if layers > count:
        mixed = (batch.second < 0).int().argsort(stable=True)[: layers - count]  # a GPU is not asked which they are
        share = batch.shares[mixed, None, None, None]
        both = pictures[mixed] * share + pictures[count:] * (1 - share)
        pictures[mixed] = both.to(torch.uint8)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        _recolour(pictures[part], batch.tables[part], rgb[part])


def _sample(batch: SketchBatch, part: slice, out: Tensor) -> None:
    """Bilinear, from the windows of some layers to ``out`` uint8 [k, H, W, 3]. What lies beyond a window is like its
    border, which is gray where the canvas ends."""
    first, height, width = (batch.places[part, column, None, None] for column in range(3))
    m = batch.inverses[part, :, :, None, None]
    xs = torch.arange(out.shape[2], dtype=torch.float32, device=out.device)
    ys = torch.arange(out.shape[1], dtype=torch.float32, device=out.device)[:, None]
    x, y, z = (m[:, row, 0] * xs + (m[:, row, 1] * ys + m[:, row, 2]) for row in range(3))
    z = z.masked_fill_(z == 0, torch.inf)
    left, dx = _split(x.div_(z), width)
    top, dy = _split(y.div_(z), height)
    at = first + top * width + left
    width = width.expand_as(at)
    pixels = batch.pixels
    upper = torch.lerp(pixels[at].float(), pixels[at + 1].float(), dx)
    at += width
    lower = torch.lerp(pixels[at].float(), pixels[at + 1].float(), dx)
    out.copy_(torch.lerp(upper, lower, dy).add_(0.5))


def _split(position: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """Positions clamped to a window -> the pixel before, int64 [k, H, W], and the way to the next, [k, H, W, 1]."""
    position = torch.minimum(position.clamp_(min=0), (side - 1).float())
    before = torch.minimum(position.floor(), (side - 2).float())
    return before.long(), (position - before)[..., None]


def _recolour(bgr: Tensor, tables: Tensor, rgb: Tensor) -> None:
    """Through hue (0 to 179), saturation and value (0 to 255), each looked up in ``tables`` [k, 256, 3], to ``rgb``.

    As OpenCV converts 8 bits: with 12 binary places to hue and saturation, and truncated on the way back.
    """
    b, g, r = bgr.int().unbind(3)
    value = torch.maximum(torch.maximum(b, g), r)
    spread = value - torch.minimum(torch.minimum(b, g), r)
    saturation = (spread * _over(255 << 12, value) + 2048) >> 12
    hue = torch.where(value == r, g - b, torch.where(value == g, b - r + 2 * spread, r - g + 4 * spread))
    hue = (hue * _over(30 << 12, spread) + 2048) >> 12
    hue += 180 * (hue < 0)
    offsets = 256 * torch.arange(len(tables), dtype=torch.int32, device=bgr.device)[:, None, None]
    looked_up = zip(tables.reshape(-1, 3).unbind(1), (hue, saturation, value), strict=True)
    hue, saturation, value = (column[(offsets + index).long()].float()[..., None] for column, index in looked_up)
    sector = torch.arange(5, 0, -2, device=bgr.device) + hue / 30  # of red, green and blue
    sector -= 6 * (sector >= 6)
    fall = torch.minimum(sector, 4 - sector).clamp_(0, 1)
    rgb.copy_(value - value * (saturation / 255) * fall)


def _over(number: int, divisor: Tensor) -> Tensor:
    """``number`` / ``divisor`` int32, rounded; a divisor of 0 only ever meets a factor of 0."""
    return (number / divisor.clamp(min=1).float()).round_().int()
