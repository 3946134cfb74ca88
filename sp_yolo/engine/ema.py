"""Exponential moving average of a model's weights, and of its buffers or not."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
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

    def decay_at(self, updates: int) -> float:
        return self.decay * (1 - math.exp(-updates / self.ramp))

    @torch.no_grad()
    def update(self, model: nn.Module, held: Mapping[Tensor, Tensor] | None = None) -> None:
        """Move the average one step towards ``model``, which must have the structure it was made from.

        ``held``: masks of parameters of ``model`` whose zeros are zeros of the average too, from now on: an average
        alone would keep what the weights were before they were pruned.
        """
        self.updates += 1
        averages, values = [], []
        buffers = () if self.average_buffers else {name for name, _ in self.module.named_buffers()}
        own, theirs = self.module.state_dict(), model.state_dict()
        for (name, average), value in zip(own.items(), theirs.values(), strict=True):
            if not average.dtype.is_floating_point:
                continue
            if name in buffers:
                average.copy_(value)
            else:
                averages.append(average)
                values.append(value.detach())
        torch._foreach_lerp_(averages, values, 1 - self.decay_at(self.updates))
        if held:
            for average, param in zip(self.module.parameters(), model.parameters(), strict=True):
                if param in held:
                    average.mul_(held[param])

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Be a copy of ``model``, whose optimizer averages already."""
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            average.copy_(value)
