"""``mode="paper"``: the published update of one tensor, eqs. (1)-(6) of docs/the-method.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.damping import newton_damping, wide_dtype
from sp_yolo.optim.saliency import keep_masks, prune_count, saliency
from sp_yolo.optim.settings import prunable_params


def paper_update(group: dict[str, Any], param: Tensor, state: dict[str, Any], finite: Tensor) -> None:
    """One published step. Where ``finite`` (0-dim bool) is False, nothing changes.

    As published, y contains the effect of the proximal step, zeros are not held, and lambda is the sigma-quantile of
    the tensor's own saliency. State: "momentum_buffer" v, "displacement" s and "displacement_gradient" <s, g_prev>.
    """
    wide = wide_dtype(param.device)
    if not state:
        dtype = torch.promote_types(param.dtype, torch.float32)
        state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)
        state["displacement"] = torch.zeros_like(param, dtype=dtype)
        state["displacement_gradient"] = torch.zeros((), dtype=wide, device=param.device)
    v, s, grad = state["momentum_buffer"], state["displacement"], param.grad
    assert grad is not None
    before = param.to(v.dtype, copy=True)
    g = torch.where(finite, grad.to(v.dtype), 0.0)
    if group["maximize"]:
        g = -g
    if group["weight_decay"] and not group["decoupled"]:
        g = g + group["weight_decay"] * before
    damping, _ = newton_damping(s, (s * g).sum(dtype=wide) - state["displacement_gradient"])
    moved = group["momentum"] * v + g
    direction = g + group["momentum"] * moved if group["nesterov"] else g
    after = before
    if group["weight_decay"] and group["decoupled"]:
        after = before * (1 - group["lr"] * group["weight_decay"])
    after = after - group["lr"] * damping * direction
    prunable = group["sigma"] > 0 and any(param is p for p in prunable_params(group))
    count = prune_count(group["sigma"], param.numel()) if prunable else 0
    if count:
        (keep,), _ = keep_masks([saliency(after, 1.0 / damping)], count)
        after = after * keep
    param.copy_(torch.where(finite, after, before))
    v.copy_(torch.where(finite, moved, v))
    displaced = param.to(v.dtype) - before
    s.copy_(torch.where(finite, displaced, s))
    product = (displaced * g).sum(dtype=wide)
    state["displacement_gradient"].copy_(torch.where(finite, product, state["displacement_gradient"]))
