"""gamma and its averages, one for the whole model, from what all batches of a step report; eqs. (9) to (14), (20)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.batch import Batch
from sp_yolo.optim.damping import (
    TINY,
    damped_numbers,
    damped_state,
    derived_cap,
    opening_gamma,
    opening_rate,
    wide_dtype,
)
from sp_yolo.optim.settings import reference_lr


def damp(
    model: dict[str, Any], batches: list[Batch], products: list[Tensor], levels: Tensor | None, finite: Tensor | None
) -> None:
    """Update "averages" and "gamma" of the first group, ``model``, in place.

    ``products``: <s, g> of each batch's tensors. ``levels``: ``damping.gamma_levels`` where the numbers stay on the
    device, else None. ``finite`` (0-dim bool): where it is False nothing changes; None: all gradients are.
    """
    moving = moving_groups(batches, levels is not None)
    if not moving:
        return
    averages, gamma = model["averages"], model["gamma"]
    if not model["open"]:
        open_gamma(model, batches)
        return
    groups = [group for batch in batches for group, _, _ in batch.spans]
    lr_ref = reference_lr([group["lr"] for group in groups])
    pairs = [batch.pair(own, lr_ref).to(gamma.device) for batch, own in zip(batches, products, strict=True)]
    pair = pairs[0] if len(pairs) == 1 else torch.stack(pairs).sum(0)
    cap = gamma_cap(moving)
    if levels is None:
        numbers = averages.tolist(), gamma.item(), pair.tolist()
        after = damped_numbers(*numbers, model["rho"], model["growth"], cap / float(lr_ref))
        averages.copy_(torch.tensor(after[0], dtype=averages.dtype))
        gamma.fill_(after[1])
        return
    least = lr_ref.to(gamma.dtype).clamp(min=TINY) if isinstance(lr_ref, Tensor) else lr_ref
    found = damped_state(averages, gamma, pair, levels, cap / least)
    if finite is not None:
        found = torch.where(finite, found[0], averages), torch.where(finite, found[1], gamma)
    # In place: a captured CUDA graph replays on the same memory.
    torch._foreach_copy_([averages, gamma], list(found))


def moving_groups(batches: list[Batch], on_device: bool) -> list[dict[str, Any]]:
    """The groups whose lr is not 0; a tensor is not asked whether it is where the step may not wait (``on_device``)."""
    groups = [group for batch in batches for group, _, _ in batch.spans]
    return [g for g in groups if (isinstance(g["lr"], Tensor) and on_device) or float(g["lr"]) > 0]


def gamma_cap(moving: list[dict[str, Any]]) -> float:
    """rcap of these groups together, eq. (13)."""
    return float(min(group["rcap"] or derived_cap(group["momentum"], group["nesterov"]) for group in moving))


def open_gamma(model: dict[str, Any], batches: list[Batch]) -> None:
    """gamma of the first step that moves."""
    model["gamma"].copy_(_opening(batches, model["gamma"]))
    model["open"] = True


def _opening(batches: list[Batch], gamma: Tensor) -> Tensor:
    """gamma of the first step that moves, eq. (20)."""
    weights, step = torch.zeros_like(gamma), torch.zeros_like(gamma)
    count = 0
    for batch in batches:
        for group, first, last in batch.spans:
            lr = group["lr"]
            if not isinstance(lr, Tensor) and lr == 0:
                continue
            params, size = batch.params[first:last], sum(batch.sizes[first:last])
            length = lr * opening_rate(group["momentum"], group["nesterov"], batch.fisher)
            square = float(size) if batch.fisher else _square(batch.grads[first:last]).to(gamma.device)
            weights, count = weights + _square(params).to(gamma.device), count + size
            step = step + length**2 * square
    return opening_gamma(weights, count, step)


def _square(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm([t.detach() for t in tensors], 2, dtype=dtype)
    return torch.stack(norms).to(wide_dtype(norms[0].device)).square().sum()
