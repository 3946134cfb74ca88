"""Detection heads: raw maps in training, decoded boxes in inference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImplicitA(nn.Module):
    """A learned vector added to every position of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.empty(1, channels, 1, 1).normal_(0.0, 0.02))


class ImplicitM(nn.Module):
    """A learned vector that scales every channel of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.empty(1, channels, 1, 1).normal_(1.0, 0.02))


def merge_implicit(weight: Tensor, bias: Tensor, add: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution equal to (conv(x + add)) * scale: W*m and (b + W a)*m.

    weight [O, C, 1, 1], bias [O], add [1, C, 1, 1], scale [1, O, 1, 1].
    """
    factor = scale.view(-1)
    return weight * factor.view(-1, 1, 1, 1), (bias + (weight * add).sum((1, 2, 3))) * factor


def place_cells(raw: Tensor, stride: int, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Corner of each cell of a map [B, na, ny, nx, no] less half a cell, and the stride: [1, na * ny * nx, 2] each.

    In the part of the language that TorchScript knows, for :mod:`sp_yolo.export`.
    """
    na, ny, nx = raw.shape[1], raw.shape[2], raw.shape[3]
    row = torch.arange(ny, device=raw.device, dtype=precision).view(ny, 1).expand(ny, nx)
    column = torch.arange(nx, device=raw.device, dtype=precision).view(1, nx).expand(ny, nx)
    offsets = (torch.stack((column, row), -1) - 0.5).expand(1, na, ny, nx, 2).reshape(1, -1, 2)
    return offsets, torch.full_like(offsets, stride)


class Detect(nn.Module):
    """One biased 1x1 convolution per level.

    ``anchors`` [nl, na, 2] is in grid units, ``anchor_grid`` [nl, 1, na, 1, 1, 2] in input pixels; both are buffers.
    forward: features, fine to coarse -> train(): list of nl raw maps [B, na, ny, nx, no] (views, not contiguous);
    eval(): (decoded [B, sum(na*ny*nx), no] with cx, cy, w, h in input pixels and scores in 0..1, the raw maps).
    """

    auxiliary = False  # whether training yields nl more maps, of auxiliary heads
    place_cells = staticmethod(place_cells)
    anchors: Tensor
    anchor_grid: Tensor

    def __init__(
        self,
        num_classes: int,
        anchors_px: Sequence[Sequence[float]],
        in_channels: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        super().__init__()
        self.nc = num_classes
        self.no = num_classes + 5
        self.nl = len(anchors_px)
        self.na = len(anchors_px[0]) // 2
        self.strides = tuple(strides)
        self.register_buffer("anchors", torch.zeros(self.nl, self.na, 2))
        self.register_buffer("anchor_grid", torch.zeros(self.nl, 1, self.na, 1, 1, 2))
        self.set_anchors(torch.tensor(anchors_px, dtype=torch.float32, device="cpu").view(self.nl, self.na, 2))
        self.m = nn.ModuleList(self._level_convolutions(in_channels[: self.nl]))

    def set_anchors(self, anchors_px: Tensor) -> None:
        """Take [nl, na, 2] anchors in input pixels; levels given coarse to fine are turned round."""
        areas = anchors_px.reshape(-1, 2).prod(1)
        if float(areas[-1] - areas[0]) * (self.strides[-1] - self.strides[0]) < 0:
            anchors_px = anchors_px.flip(0)
        self.anchor_grid.copy_(anchors_px.view_as(self.anchor_grid))
        stride = torch.tensor(self.strides, dtype=anchors_px.dtype, device=anchors_px.device)
        self.anchors.copy_(anchors_px / stride.view(-1, 1, 1))

    def _level_convolutions(self, in_channels: Sequence[int]) -> list[nn.Conv2d]:
        """Biases start at 8 objects per 640 px image, and at 0.6 of an object spread over the classes."""
        convolutions = []
        for channels, stride in zip(in_channels, self.strides, strict=True):
            bias = torch.zeros(self.na, self.no)
            bias[:, 4] = math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] = math.log(0.6 / (self.nc - 0.99))
            convolution: Any = nn.Conv2d(channels, self.na * self.no, 1)
            convolution.bias.data += bias.view(-1)
            convolutions.append(convolution)
        return convolutions

    def _as_map(self, output: Tensor) -> Tensor:
        # A permuted view: with channels_last convolutions the last axis is already contiguous, nothing is copied.
        batch, _, height, width = output.shape
        return output.view(batch, self.na, self.no, height, width).permute(0, 1, 3, 4, 2)

    def _lead_maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [self._as_map(conv(x)) for conv, x in zip(self.m, features, strict=True)]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        maps = self._lead_maps(features)
        return maps if self.training else (self.decode(maps), maps)

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Raw maps of the nl levels -> [B, N, no], level by level, anchor-major, then row, then column.

        Done in float32 at least: half precision cannot place a box inside a 1280 px image.
        """
        precision = torch.promote_types(maps[0].dtype, torch.float32)
        offsets, scales, sizes = [], [], []
        for level, raw in enumerate(maps):
            offset, scale = self.place_cells(raw, self.strides[level], precision)
            offsets.append(offset)
            scales.append(scale)
            shape = (1, self.na, *raw.shape[2:4], 2)
            sizes.append(self.anchor_grid[level].to(precision).expand(shape).reshape(1, -1, 2))
        flat = torch.cat([raw.reshape(raw.shape[0], -1, self.no) for raw in maps], 1).to(precision).sigmoid()
        xy = (flat[..., 0:2] * 2 + torch.cat(offsets, 1)) * torch.cat(scales, 1)
        wh = (flat[..., 2:4] * 2) ** 2 * torch.cat(sizes, 1)
        return torch.cat((xy, wh, flat[..., 4:]), -1)


class IDetect(Detect):
    """Detect with implicit knowledge: output = (conv(x + a)) * m with learned vectors a and m per level."""

    def __init__(
        self,
        num_classes: int,
        anchors_px: Sequence[Sequence[float]],
        in_channels: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        super().__init__(num_classes, anchors_px, in_channels, strides)
        if self.auxiliary:  # here, because the state_dict order is m, m2, ia, im
            self.m2 = nn.ModuleList(self._level_convolutions(in_channels[self.nl :]))
        self.ia = nn.ModuleList(ImplicitA(c) for c in in_channels[: self.nl])
        self.im = nn.ModuleList(ImplicitM(self.na * self.no) for _ in range(self.nl))

    def _lead_maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        # Merging touches a few weights; adding a and multiplying by m would each pass over whole feature maps.
        levels: Iterable[Any] = zip(self.m, self.ia, self.im, strict=True)
        merged = [merge_implicit(conv.weight, conv.bias, add.implicit, scale.implicit) for conv, add, scale in levels]
        return [self._as_map(F.conv2d(x, *level)) for x, level in zip(features, merged, strict=True)]


class IAuxDetect(IDetect):
    """IDetect whose nl further inputs feed auxiliary convolutions, used in training only.

    train(): 2*nl maps, lead first. eval(): as IDetect; auxiliary inputs may be left out.
    """

    auxiliary = True

    def forward(self, features: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        maps = self._lead_maps(features[: self.nl])
        if not self.training:
            return self.decode(maps), maps
        return maps + [self._as_map(conv(x)) for conv, x in zip(self.m2, features[self.nl :], strict=True)]
