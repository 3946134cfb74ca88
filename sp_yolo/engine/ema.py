"""Exponential moving average of a model's weights and buffers."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class ModelEma(Generic[Model]):
    """Average of every floating-point entry of a model's state_dict (specification, training §4.6).

    update n: d = decay * (1 - exp(-n / ramp)); v <- d * v + (1 - d) * model. Integer buffers keep their first value.
    ``module`` is the averaged model, in eval mode, without gradients.
    """

    def __init__(self, model: Model, decay: float = 0.9999, ramp: float = 2000.0, updates: int = 0) -> None:
        self.module: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.ramp, self.updates = decay, ramp, updates

    def decay_at(self, updates: int) -> float:
        return self.decay * (1 - math.exp(-updates / self.ramp))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards ``model``, which must have the structure it was made from."""
        self.updates += 1
        averages, values = [], []
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if average.dtype.is_floating_point:
                averages.append(average)
                values.append(value.detach())
        torch._foreach_lerp_(averages, values, 1 - self.decay_at(self.updates))
