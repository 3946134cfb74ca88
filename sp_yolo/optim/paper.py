"""``mode="paper"``: the published update, tensor by tensor, eqs. (1)-(6) of docs/the-method.md."""

from __future__ import annotations

import torch
from torch import Tensor

from sp_yolo.optim.damping import newton_damping
from sp_yolo.optim.saliency import keep_masks, prune_count, saliency
from sp_yolo.optim.update import Batch


def paper_update(batch: Batch, sigma: float, prunable: list[Tensor], finite: Tensor) -> None:
    """One published step of every tensor of the group. Where ``finite`` (0-dim bool) is False, nothing changes.

    As published, y contains the effect of the proximal step, zeros are not held, and lambda is the sigma-quantile of
    each tensor's own saliency.
    """
    for index, param in enumerate(batch.params):
        state = batch.states[index]
        v, s = state["momentum_buffer"], state["displacement"]
        before = param.to(v.dtype, copy=True)
        g = torch.where(finite, batch.grads[index].to(v.dtype), 0.0)
        if batch.maximize:
            g = -g
        if batch.l2:
            g = g + batch.l2 * before
        damping, _ = newton_damping(s, (s * g).sum(dtype=torch.float64) - state["displacement_gradient"])
        moved = batch.momentum * v + g
        direction = g + batch.momentum * moved if batch.nesterov else g
        after = before
        if batch.decoupled and batch.weight_decay:
            after = before * (1 - batch.lr * batch.weight_decay)
        after = after - batch.lr * damping * direction
        count = prune_count(sigma, param.numel()) if any(param is p for p in prunable) else 0
        if count:
            (keep,), _ = keep_masks([saliency(after, 1.0 / damping)], count)
            after = after * keep
        param.copy_(torch.where(finite, after, before))
        v.copy_(torch.where(finite, moved, v))
        displaced = param.to(v.dtype) - before
        s.copy_(torch.where(finite, displaced, s))
        product = (displaced * g).sum(dtype=torch.float64)
        state["displacement_gradient"] = torch.where(finite, product, state["displacement_gradient"])
