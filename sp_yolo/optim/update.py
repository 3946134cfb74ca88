"""The dense update of ``mode="robust"`` tensor by tensor: the CPU's default. Its scalars are numbers of the host.

It works in three phases, because gamma is one number for the whole model: the products <s, g> of every tensor, the
scalars (``damping.py``), the update of every tensor. Eq. numbers: docs/the-method.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.damping import fisher_damping, parameter_damping
from sp_yolo.optim.saliency import FISHER_DECAY

# Elements per block of the single-tensor path: a block's arrays (1 MiB each) stay in cache between its operations, so
# that most words move to and from memory once per step. Smaller blocks cost more in calls than they save.
BLOCK = 1 << 18
# Vectors of up to so many elements are stepped together.
SMALL = 1 << 12
# What a tensor's state carries to the next secant pair: s'D^{-1}s, s's and <s, g_prev>.
CARRIED = ("displacement_norm", "displacement_square", "displacement_gradient")


@dataclass
class Batch:
    """Tensors of one parameter group, device and dtype that have a gradient, and the group's settings.

    A tensor's state holds "momentum_buffer" v and "displacement" s = x_k - x_{k-1} in the parameter's memory order, and
    what the next secant pair needs of this step: "displacement_norm" s'D^{-1}s, "displacement_square" s's and
    "displacement_gradient" <s, g_prev>, numbers on the host path and 0-dim float64 tensors on the device path. While it
    is pruned also "mask" (False: x is held at zero; v there has no effect and is cleared when x is set free), where
    damping or saliency need it "square_avg" E[g^2], and for the damping "square_weight", the sum of its weights so far.
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
    damping: str
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
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A dense tensor as rows of at most BLOCK elements in memory order, sharing its memory; itself if so small."""
    return flat(tensor).split(BLOCK) if tensor.numel() > BLOCK else (tensor,)


class SingleTensor:
    """The single-tensor path as the optimizer runs it."""

    name = "single-tensor"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        rows = list(zip(batch.params, batch.grads, batch.states, strict=True))
        small = [_is_small(param, grad, state) for param, grad, state in rows]
        self.packed = [row for row, is_small in zip(rows, small, strict=True) if is_small]
        self.large = [row for row, is_small in zip(rows, small, strict=True) if not is_small]

    def products(self) -> list[float]:
        """<s, g> of each tensor. Blocks are summed in float64: float32 loses the sum when |y| << |g|."""
        products = [_product(param, grad, state) for param, grad, state in self.large]
        if self.packed:
            _, grads, states = zip(*self.packed, strict=True)
            s = torch.cat([state["displacement"] for state in states])
            products += _sums(s, torch.cat(grads).to(s.dtype), [g.numel() for g in grads])
        return [-p for p in products] if self.batch.maximize else products

    def update(self, r_gamma: Tensor, gamma: Tensor, finite: Tensor) -> None:
        """One step of every tensor, eqs. (15)-(16), and what the next step needs of it.

        Backwards: the gradients and displacements that ``products`` read last are still in cache.
        """
        if not finite:
            return
        step_size = float(self.batch.lr) * gamma.item()
        if self.packed:
            _update_packed(self.batch, step_size, *map(list, zip(*self.packed, strict=True)))
        for param, grad, state in reversed(self.large):
            _update_tensor(self.batch, step_size, r_gamma.item(), param, grad, state)


def next_square_weight(batch: Batch, state: dict[str, Any]) -> float:
    """The sum of the weights of E[g^2], this step's included, which goes to the state; 1 where D does not need it."""
    if batch.damping != "fisher":
        return 1.0
    state["square_weight"] = FISHER_DECAY * state["square_weight"] + 1 - FISHER_DECAY
    return float(state["square_weight"])


def _is_small(param: Tensor, grad: Tensor, state: dict[str, Any]) -> bool:
    return param.ndim == 1 and param.numel() <= SMALL and not ("mask" in state or "square_avg" in state)


def _product(param: Tensor, grad: Tensor, state: dict[str, Any]) -> float:
    s = state["displacement"]
    rows = zip(flat(s).split(BLOCK), flat(like_parameter(grad, param)).split(BLOCK), strict=True)
    return sum(torch.dot(s_row, g_row.to(s.dtype)).item() for s_row, g_row in rows)


def _sums(a: Tensor, b: Tensor, sizes: list[int]) -> list[float]:
    """<a, b> of each of the runs of ``sizes`` elements, in float64."""
    return torch.segment_reduce(a.double() * b, "sum", lengths=torch.tensor(sizes)).tolist()


def _update_tensor(
    batch: Batch, step_size: float, r_gamma: float, param: Tensor, grad: Tensor, state: dict[str, Any]
) -> None:
    # A parameter with gaps in memory is worked on as a dense copy.
    x = param if is_dense(param) else torch.empty_like(param).copy_(param)
    tensors = [x, like_parameter(grad, param), state["momentum_buffer"], state["displacement"]]
    optional: list[Tensor | None] = [state.get("mask"), state.get("square_avg"), None]
    if batch.damping == "diagonal" and x.ndim >= 2:
        wide = x.to(tensors[2].dtype)
        optional[2] = parameter_damping(wide, wide.new_tensor(r_gamma), batch.damping_bounds)
    rows: list[tuple[Any, ...]] = [pieces(t) for t in tensors]
    rows += [(None,) * len(rows[0]) if t is None else pieces(t) for t in optional]
    square_weight = next_square_weight(batch, state)
    sums = [0.0, 0.0, 0.0]
    for x_row, g_row, v_row, s_row, mask, square, damping in reversed(list(zip(*rows, strict=True))):
        g = g_row.to(s_row.dtype)
        damping = _update_row(batch, step_size, x_row, g, v_row, s_row, mask, square, damping, square_weight)
        moved = flat(s_row)
        squared = torch.dot(moved, moved).item()
        sums[0] += squared if damping is None else torch.dot(moved, flat(s_row / damping)).item()
        sums[1] += squared
        sums[2] += torch.dot(moved, flat(g)).item()
    if x is not param:
        param.copy_(x)
    sums[2] = -sums[2] if batch.maximize else sums[2]
    state.update(zip(CARRIED, sums, strict=True))


def _update_packed(
    batch: Batch, step_size: float, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
) -> None:
    """Vectors of a few elements, of which a network has hundreds: as one row, since a call costs more than its work."""
    sizes = [param.numel() for param in params]
    momenta, displacements = ([state[name] for state in states] for name in ("momentum_buffer", "displacement"))
    x, v = torch.cat(params), torch.cat(momenta)
    g, s = torch.cat(grads).to(v.dtype), torch.empty_like(v)
    _update_row(batch, step_size, x, g, v, s, None, None, None)
    for tensors, row in ((params, x), (momenta, v), (displacements, s)):
        torch._foreach_copy_(tensors, row.split(sizes))
    squares, products = _sums(s, s, sizes), _sums(s, -g if batch.maximize else g, sizes)
    for state, square, product in zip(states, squares, products, strict=True):
        state.update(zip(CARRIED, (square, square, product), strict=True))


def _update_row(
    batch: Batch,
    step_size: float,
    x: Tensor,
    g: Tensor,
    v: Tensor,
    s: Tensor,
    mask: Tensor | None,
    square: Tensor | None,
    damping: Tensor | None,
    square_weight: float = 1.0,
) -> Tensor | None:
    """Update dense rows in place; s becomes the displacement. Returns D (None: 1). ``g`` has the state's dtype."""
    if square is not None:
        square.mul_(FISHER_DECAY).addcmul_(g, g, value=1 - FISHER_DECAY)
        if batch.damping == "fisher":
            damping = fisher_damping(square, square_weight, batch.momentum)
    s.copy_(x)
    if batch.shrink != 1.0:
        x.mul_(batch.shrink)
    if damping is None and batch.momentum and x.dtype == v.dtype:
        _nesterov_step(batch, step_size, x, g, v)
    else:
        regularised = torch.add(-g if batch.maximize else g, s, alpha=batch.l2)
        v.mul_(batch.momentum).add_(regularised)
        direction = regularised.add(v, alpha=batch.momentum) if batch.nesterov else v
        x.add_(direction if damping is None else direction * damping, alpha=-step_size)
    if mask is not None:
        x.mul_(mask.view(torch.uint8))  # as bytes: bool is several times slower
    # The displacement is measured, not computed: rounding, decay and masks are in it.
    torch.sub(x, s, out=s)
    return damping


def _nesterov_step(batch: Batch, step_size: float, x: Tensor, g: Tensor, v: Tensor) -> None:
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
        maximize=batch.maximize,
        is_first_step=False,
    )
