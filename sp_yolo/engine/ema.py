"""Exponential moving average of a model's weights, and of its buffers or not."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class ModelEma(Generic[Model]):
    """Average of every floating-point entry of a model's state_dict.

    update n: d = decay * (1 - exp(-n / ramp)); v <- d * v + (1 - d) * model. Integer buffers keep their first value.
    ``average_buffers=False`` takes floating-point buffers (BatchNorm's statistics) as the model has them, as
    torch.optim.swa_utils does. ``module`` is the averaged model, in eval mode, without gradients.
    """

    def __init__(
        self,
        model: Model,
        decay: float = 0.9999,
        ramp: float = 2000.0,
        updates: int = 0,
        *,
        average_buffers: bool = True,
    ) -> None:
        self.module: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.ramp, self.updates, self.average_buffers = decay, ramp, updates, average_buffers
        self._pairs: _Pairs | None = None

    def decay_at(self, updates: int) -> float:
        return self.decay * (1 - math.exp(-updates / self.ramp))

    @torch.no_grad()
    def update(self, model: nn.Module, held: Mapping[Tensor, Tensor] | None = None) -> None:
        """Move the average one step towards ``model``, which must have the structure it was made from.

        ``held``: masks of parameters of ``model`` whose zeros are zeros of the average too, from now on: an average
        alone would keep what the weights were before they were pruned.
        """
        self.updates += 1
        if self._pairs is None or self._pairs.places != _places(self.module, model):
            self._pairs = _Pairs.of(self.module, model, self.average_buffers)
        pairs = self._pairs
        torch._foreach_lerp_(pairs.averages, pairs.values, 1 - self.decay_at(self.updates))
        if pairs.copies:
            torch._foreach_copy_(pairs.copies, pairs.originals)
        if held:
            for average, param in zip(self.module.parameters(), model.parameters(), strict=True):
                if param in held:
                    average.mul_(held[param])

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Be a copy of ``model``, whose optimizer averages already."""
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            average.copy_(value)


@dataclass(frozen=True)
class _Pairs:
    """What is averaged with what, found once: to list hundreds of tensors costs the host more than the update."""

    places: tuple[int, int]
    averages: list[Tensor]
    values: list[Tensor]
    copies: list[Tensor]
    originals: list[Tensor]

    @classmethod
    def of(cls, module: nn.Module, model: nn.Module, average_buffers: bool) -> _Pairs:
        buffers = set() if average_buffers else {name for name, _ in module.named_buffers()}
        pairs = cls(_places(module, model), [], [], [], [])
        for (name, average), value in zip(module.state_dict().items(), model.state_dict().values(), strict=True):
            if average.dtype.is_floating_point:
                (pairs.copies if name in buffers else pairs.averages).append(average)
                (pairs.originals if name in buffers else pairs.values).append(value)
        return pairs


def _places(module: nn.Module, model: nn.Module) -> tuple[int, int]:
    """Where two models lie: one that is moved has its first tensor elsewhere, and all others."""
    first, second = (next((param.data_ptr() for param in each.parameters()), 0) for each in (module, model))
    return first, second
