"""The dense update of ``mode="robust"``: a readable single-tensor path and a multi-tensor path without host syncs.

Both work in three phases, because gamma is one number for the whole model: the products <s, g> of every tensor, the
scalars (``damping.py``), the update of every tensor. Eq. numbers: docs/the-method.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.damping import parameter_damping
from sp_yolo.optim.saliency import FISHER_DECAY

# Elements per block of the single-tensor path: a block's arrays (1 MiB each) stay in cache between its operations, so
# that most words move to and from memory once per step. Smaller blocks cost more in calls than they save.
BLOCK = 1 << 18
# What a tensor's state carries to the next secant pair: s'D^{-1}s, s's and <s, g_prev>.
CARRIED = ("displacement_norm", "displacement_square", "displacement_gradient")


@dataclass
class Batch:
    """Tensors of one parameter group, device and dtype that have a gradient, and the group's settings.

    A tensor's state holds "momentum_buffer" v and "displacement" s = x_k - x_{k-1} in the parameter's memory order, and
    what the next secant pair needs of this step: "displacement_norm" s'D^{-1}s, "displacement_square" s's and
    "displacement_gradient" <s, g_prev>, numbers on the host path and 0-dim float64 tensors on the device path. While it
    is pruned also "mask" (False: x is held at zero; v there has no effect and is cleared by the next proximal step) and
    "square_avg" E[g^2].
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    lr: float | Tensor
    momentum: float
    nesterov: bool
    weight_decay: float
    decoupled: bool
    maximize: bool
    diagonal: bool
    damping_bounds: tuple[float, float]

    @property
    def l2(self) -> float:
        return 0.0 if self.decoupled else self.weight_decay

    @property
    def shrink(self) -> float | Tensor:
        """The factor of decoupled weight decay."""
        return 1.0 - self.lr * self.weight_decay if self.decoupled else 1.0

    def secant_sums(self, products: list[Any]) -> tuple[Any, Any]:
        """(s'D^{-1}s, s'y) of these tensors from <s, g> of each (``products``); numbers or 0-dim tensors.

        y is the change of the regularised gradient, so L2 decay adds wd * s's to <s, g> - <s, g_prev>.
        """
        norm, square, gradient = (total([s[name] for s in self.states]) for name in CARRIED)
        return norm, total(products) - gradient + self.l2 * square


def total(values: list[Any]) -> Any:
    """Sum of numbers, or of 0-dim tensors in one kernel."""
    return torch.stack(values).sum() if isinstance(values[0], Tensor) else sum(values)


# --- single tensor: the CPU's default; scalars are host numbers -------------------------------------------------------


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's memory is one run of its elements, in an order that torch names."""
    return (
        tensor.is_contiguous()
        or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        or (tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d))
    )


def like_parameter(tensor: Tensor, param: Tensor) -> Tensor:
    """The tensor in the memory order that the state of ``param`` has; itself when it has it already."""
    if tensor.stride() == param.stride() and is_dense(param):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor as one row in memory order, sharing its memory."""
    return tensor if tensor.ndim == 1 and tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A dense tensor as rows of at most BLOCK elements in memory order, sharing its memory."""
    row = flat(tensor)
    return row.split(BLOCK) if row.numel() > BLOCK else (row,)


def single_products(batch: Batch) -> list[float]:
    """<s, g> of each tensor. Blocks are summed in float64: float32 loses the sum when |y| << |g|."""
    products = []
    for param, grad, state in zip(batch.params, batch.grads, batch.states, strict=True):
        s = state["displacement"]
        rows = zip(pieces(s), pieces(like_parameter(grad, param)), strict=True)
        total = sum(torch.dot(s_row, g_row.to(s.dtype)).item() for s_row, g_row in rows)
        products.append(-total if batch.maximize else total)
    return products


def single_update(batch: Batch, r_gamma: float, gamma: float) -> None:
    """One step of every tensor, eqs. (15)-(16), and what the next step needs of it."""
    for param, grad, state in zip(batch.params, batch.grads, batch.states, strict=True):
        # A parameter with gaps in memory is worked on as a dense copy.
        x = param if is_dense(param) else torch.empty_like(param).copy_(param)
        tensors = [x, like_parameter(grad, param), state["momentum_buffer"], state["displacement"]]
        optional: list[Tensor | None] = [state.get("mask"), state.get("square_avg"), None]
        if batch.diagonal and x.ndim >= 2:
            wide = x.to(tensors[2].dtype)
            optional[2] = parameter_damping(wide, wide.new_tensor(r_gamma), batch.damping_bounds)
        rows: list[tuple[Any, ...]] = [pieces(t) for t in tensors]
        rows += [(None,) * len(rows[0]) if t is None else pieces(t) for t in optional]
        sums = [_update_piece(batch, gamma, *row) for row in zip(*rows, strict=True)]
        if x is not param:
            param.copy_(x)
        for name, column in zip(CARRIED, zip(*sums, strict=True), strict=True):
            state[name] = sum(column)


def _update_piece(
    batch: Batch,
    gamma: float,
    x: Tensor,
    grad: Tensor,
    v: Tensor,
    s: Tensor,
    mask: Tensor | None,
    square: Tensor | None,
    damping: Tensor | None,
) -> tuple[float, float, float]:
    g = grad.to(v.dtype)
    if batch.maximize:
        g = -g
    if square is not None:
        square.mul_(FISHER_DECAY).addcmul_(g, g, value=1 - FISHER_DECAY)
    s.copy_(x)
    if batch.shrink != 1.0:
        x.mul_(batch.shrink)
    step_size = float(batch.lr) * gamma
    if damping is None and batch.momentum and x.dtype == v.dtype:
        nesterov_step(x, g, v, batch, step_size)
    else:
        regularised = g.add(s, alpha=batch.l2)
        v.mul_(batch.momentum).add_(regularised)
        direction = regularised.add(v, alpha=batch.momentum) if batch.nesterov else v
        x.add_(direction if damping is None else direction * damping, alpha=-step_size)
    if mask is not None:
        x.mul_(mask.view(torch.uint8))  # as bytes: bool is several times slower
    # The displacement is measured, not computed: rounding, decay and masks are in it.
    torch.sub(x, s, out=s)
    plain = torch.dot(s, s).item()
    weighted = plain if damping is None else torch.dot(s, s / damping).item()
    return weighted, plain, torch.dot(s, g).item()


class SingleTensor:
    """The single-tensor path as the optimizer runs it."""

    name = "single-tensor"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def products(self) -> list[float]:
        return single_products(self.batch)

    def update(self, r_gamma: Tensor, gamma: Tensor, finite: Tensor) -> None:
        if finite:
            single_update(self.batch, r_gamma.item(), gamma.item())


def nesterov_step(x: Tensor, g: Tensor, v: Tensor, batch: Batch, step_size: float) -> None:
    """v = beta v + g + wd x; x -= step_size (g + wd x + beta v): one pass by the kernel behind SGD(fused=True)."""
    torch._fused_sgd_(
        [x],
        [g],
        [v],
        weight_decay=batch.l2,
        momentum=batch.momentum,
        lr=step_size,
        dampening=0.0,
        nesterov=batch.nesterov,
        maximize=False,
        is_first_step=False,
    )


# --- multi tensor: the accelerator's default; scalars stay on the device ----------------------------------------------


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
    if batch.diagonal:
        bounds, scalar = batch.damping_bounds, r_gamma.to(dtype)
        dampings = [parameter_damping(x, scalar, bounds) if x.ndim >= 2 else None for x in before]
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
