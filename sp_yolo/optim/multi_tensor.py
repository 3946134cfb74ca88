"""The multi-tensor path of the dense update: the accelerator's default. Its scalars stay on the device.

The same three phases as ``update.py``, in multi-tensor operations, without asking the host anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sp_yolo.optim.damping import fisher_damping, parameter_damping
from sp_yolo.optim.saliency import FISHER_DECAY
from sp_yolo.optim.update import CARRIED, Batch


def multi_products(batch: Batch) -> list[Tensor]:
    """<s, g> of each tensor, 0-dim float64."""
    displacements = [s["displacement"] for s in batch.states]
    terms = torch._foreach_mul(displacements, [g.to(s.dtype) for g, s in zip(batch.grads, displacements, strict=True)])
    products = [t.sum(dtype=torch.float64) for t in terms]
    return list(torch._foreach_neg(products)) if batch.maximize else products


def multi_update(batch: Batch, r_gamma: Tensor, gamma: Tensor, finite: Tensor) -> None:
    """``single_update`` in multi-tensor operations. Where ``finite`` (0-dim bool) is False, nothing changes."""
    momenta = [s["momentum_buffer"] for s in batch.states]
    dtype = momenta[0].dtype
    before = [p.to(dtype, copy=True) for p in batch.params]
    grads = [torch.where(finite, g.to(dtype), 0.0) for g in batch.grads]
    if batch.maximize:
        torch._foreach_neg_(grads)
    go = finite.to(dtype)
    for state, g in zip(batch.states, grads, strict=True):
        if "square_avg" in state:
            state["square_avg"].lerp_(g * g, (1 - FISHER_DECAY) * go)
    steered = list(torch._foreach_add(grads, before, alpha=batch.l2)) if batch.l2 else grads
    moved = torch._foreach_mul(momenta, batch.momentum)
    torch._foreach_add_(moved, steered)
    steps = list(torch._foreach_mul(moved, batch.momentum if batch.nesterov else 1.0))
    if batch.nesterov:
        torch._foreach_add_(steps, steered)
    dampings: list[Tensor | None] = [None] * len(before)
    if batch.damping == "diagonal":
        bounds, scalar = batch.damping_bounds, r_gamma.to(dtype)
        dampings = [parameter_damping(x, scalar, bounds) if x.ndim >= 2 else None for x in before]
    elif batch.damping == "fisher":
        for state in batch.states:
            state["square_weight"].lerp_(torch.ones_like(state["square_weight"]), (1 - FISHER_DECAY) * finite.double())
        dampings = [fisher_damping(s["square_avg"], s["square_weight"], batch.momentum) for s in batch.states]
    if batch.damping != "none":
        steps = [step if d is None else step * d for step, d in zip(steps, dampings, strict=True)]
    torch._foreach_mul_(steps, (batch.lr * gamma).to(dtype))
    after = before if not batch.decoupled else torch._foreach_mul(before, batch.shrink)
    after = torch._foreach_sub(after, steps)
    for param, state, x_before, x_after in zip(batch.params, batch.states, before, after, strict=True):
        if "mask" in state:
            x_after = x_after * state["mask"]
        param.copy_(torch.where(finite, x_after, x_before))
    for v, new in zip(momenta, moved, strict=True):
        v.copy_(torch.where(finite, new, v))
    # The rounded parameters, not the computed ones, define s.
    displaced = torch._foreach_sub([p.to(dtype) for p in batch.params], before)
    for state, s, g, damping in zip(batch.states, displaced, grads, dampings, strict=True):
        state["displacement"].copy_(torch.where(finite, s, state["displacement"]))
        squared = s * s
        plain = squared.sum(dtype=torch.float64)
        weighted = plain if damping is None else (squared / damping).sum(dtype=torch.float64)
        for name, value in zip(CARRIED, (weighted, plain, (s * g).sum(dtype=torch.float64)), strict=True):
            # In place: a captured CUDA graph replays on the same memory.
            state[name].copy_(torch.where(finite, value, state[name]))


class MultiTensor:
    """The multi-tensor path as the optimizer runs it."""

    name = "multi-tensor"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def products(self) -> list[Tensor]:
        return multi_products(self.batch)

    def update(self, r_gamma: Tensor, gamma: Tensor, finite: Tensor) -> None:
        device = self.batch.params[0].device
        multi_update(self.batch, r_gamma.to(device), gamma.to(device), finite.to(device))
