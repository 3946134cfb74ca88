"""The layer types of the YOLOv7 family. Attribute names are state_dict keys.

Every block maps [B, C_in, H, W] to [B, C_out, H', W'] and keeps the memory format (NCHW or channels_last) it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# All batch norms of the family; torch's own defaults are 1e-5 and 0.1.
NORM_EPS = 1e-3
NORM_MOMENTUM = 0.03


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=NORM_EPS, momentum=NORM_MOMENTUM)


def activation_module(activation: bool | nn.Module) -> nn.Module:
    """True is SiLU, a module is itself, anything else the identity (the grammar's ``act`` argument)."""
    if isinstance(activation, nn.Module):
        return activation
    # Not in place: autograd needs SiLU's input, so the in-place form would copy it first.
    return nn.SiLU() if activation is True else nn.Identity()


class Conv(nn.Module):
    """Convolution without bias, batch norm, activation. ``padding=None`` keeps the size at stride 1 (kernel // 2)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        activation: bool | nn.Module = True,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn: nn.Module = batch_norm(out_channels)
        self.act = activation_module(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class RepConv(nn.Module):
    """Sum of a 3x3 and a 1x1 branch (and a batch-norm identity where the shapes allow it), then the activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        activation: bool | nn.Module = True,
    ) -> None:
        super().__init__()
        if kernel != 3 or padding not in (None, 1):
            raise ValueError(f"RepConv is 3x3 with padding 1, got kernel {kernel} and padding {padding}")
        same_shape = in_channels == out_channels and stride == 1
        self.rbr_identity = batch_norm(in_channels) if same_shape else None
        self.rbr_dense = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False), batch_norm(out_channels)
        )
        self.rbr_1x1 = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, 0, groups=groups, bias=False), batch_norm(out_channels)
        )
        self.rbr_reparam: nn.Conv2d | None = None  # the one equal convolution, once fused
        self.act = activation_module(activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.rbr_reparam is not None:
            return self.act(self.rbr_reparam(x))
        total = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            total = total + self.rbr_identity(x)
        return self.act(total)


class MP(nn.MaxPool2d):
    """Max pooling that divides the size by ``kernel``."""

    def __init__(self, kernel: int = 2) -> None:
        super().__init__(kernel, kernel)


class SameMaxPool(nn.MaxPool2d):
    """Max pooling that keeps the size (at stride 1)."""

    def __init__(self, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(kernel, stride, kernel // 2)


class Concat(nn.Module):
    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(inputs), self.dim)


class Chuncat(nn.Module):
    """Splits every input in two channel halves; all first halves, then all second halves."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        halves = [x.chunk(2, 1) for x in inputs]
        return torch.cat([first for first, _ in halves] + [second for _, second in halves], 1)


class Shortcut(nn.Module):
    """Sum of two inputs of equal shape."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return inputs[0] + inputs[1]


class ReOrg(nn.Module):
    """[B, C, H, W] -> [B, 4C, H/2, W/2]: the phases (row, col) = (0,0), (1,0), (0,1), (1,1), in this order."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


class SPPCSPC(nn.Module):
    """Spatial pyramid pooling inside a cross-stage-partial block; ``kernels`` are odd and increasing."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shortcut: bool = False,  # these two are in the grammar, and the original ignores them
        groups: int = 1,
        expansion: float = 0.5,
        kernels: Sequence[int] = (5, 9, 13),
    ) -> None:
        super().__init__()
        hidden = int(2 * out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, 1)
        self.cv2 = Conv(in_channels, hidden, 1)
        self.cv3 = Conv(hidden, hidden, 3)
        self.cv4 = Conv(hidden, hidden, 1)
        self.kernels = tuple(kernels)
        if any(k % 2 == 0 for k in self.kernels) or list(self.kernels) != sorted(self.kernels):
            raise ValueError(f"pooling kernels must be odd and increasing, got {list(kernels)}")
        self.cv5 = Conv((1 + len(self.kernels)) * hidden, hidden, 1)
        self.cv6 = Conv(hidden, hidden, 3)
        self.cv7 = Conv(2 * hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [self.cv4(self.cv3(self.cv1(x)))]
        covered = 1
        for kernel in self.kernels:
            # A k-wide maximum of a c-wide maximum is a (k+c-1)-wide one: 5, 9 and 13 cost three 5x5 pools.
            step = kernel - covered + 1
            pooled.append(F.max_pool2d(pooled[-1], step, 1, step // 2))
            covered = kernel
        inner = self.cv6(self.cv5(torch.cat(pooled, 1)))
        return self.cv7(torch.cat((inner, self.cv2(x)), 1))


class DownC(nn.Module):
    """Halves the size on two paths: 1x1 then strided 3x3, and max pooling then 1x1; half of the channels each."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 2) -> None:
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"DownC needs an even number of output channels, got {out_channels}")
        self.cv1 = Conv(in_channels, in_channels, 1)
        self.cv2 = Conv(in_channels, out_channels // 2, 3, kernel)
        self.cv3 = Conv(in_channels, out_channels // 2, 1)
        self.mp = nn.MaxPool2d(kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cv2(self.cv1(x)), self.cv3(self.mp(x))), 1)
