"""What optimizers that average the weights themselves (Schedule-Free) need of a training loop.

Their gradients are taken at one point and the trained weights are another: ``optimizer.eval()`` puts these into the
model, ``optimizer.train()`` the others back. The learning rate stays constant after the warm-up, no second average is
taken, and BatchNorm's statistics, gathered at the points of the gradients, are computed anew for the trained weights.

Source: Defazio et al., The Road Less Scheduled (2024), and the README of facebookresearch/schedule_free.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

STATISTICS_BATCHES = 50  # that BatchNorm's statistics are computed from, at most


@contextlib.contextmanager
def trained_weights(optimizer: torch.optim.Optimizer, *, leave: bool = False) -> Iterator[None]:
    """Within it the model holds the weights to use, after it those to train on, unless it is to ``leave`` them so.

    Nothing for other optimizers. To the bit: a run that is measured in between is no other run.
    """
    schedule_free: Any = optimizer if is_schedule_free(optimizer) else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters] if schedule_free and not leave else []
    if schedule_free:
        schedule_free.eval()
    try:
        yield
    finally:
        if schedule_free and not leave:
            schedule_free.train()
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    return all(callable(getattr(optimizer, method, None)) for method in ("train", "eval"))


@torch.no_grad()
def recompute_statistics(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Mean and variance of every BatchNorm of ``model``: the average over up to ``STATISTICS_BATCHES`` of ``inputs``.

    ``inputs``: batches [B, 3, H, W] as the network takes them. The model is left in the mode that it was in.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return
    modes, momenta = {layer: layer.training for layer in model.modules()}, [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean of all batches
        layer.train()
    for batch in itertools.islice(inputs, STATISTICS_BATCHES):
        model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    for module, training in modes.items():
        module.training = training
