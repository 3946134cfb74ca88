"""Tensors that are stepped together, their state, and what the next step needs to know of this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.damping import newest_weight, pair_map, wide_dtype

# The displacement is kept for one run of n / SHARE of a tensor's n elements, LEAST at least; eq. (22).
SHARE = 16
LEAST = 1024


def run_length(n: int) -> int:
    """Elements of a tensor of ``n`` whose displacement is kept."""
    return min(n, max(LEAST, -(-n // SHARE)))


@dataclass
class Batch:
    """Tensors of one device, dtype and kind of step that have a gradient and have had equally many.

    ``groups``: the parameter group of each, which is asked for lr, momentum and decay at every step. A tensor's state
    holds "step", the number of gradients so far; "momentum_buffer" v and, where metric or saliency need it,
    "square_avg" E[g^2], in the parameter's memory order; "displacement", s = x_k - x_{k-1} on the run of the last step;
    "secant" [5], of ``damping.wide_dtype``, the sums over it scaled up to the tensor: s'D^{-1}s, s's, <s, g>, x'x and
    the number of elements that they stand for (zeros: no pair); while it is pruned "mask" (False: x is held at zero; v
    there has no effect and is cleared when x is set free).
    """

    params: list[Tensor]
    groups: list[dict[str, Any]]
    states: list[dict[str, Any]]
    fixed_run: bool

    def __post_init__(self) -> None:
        first = self.groups[0]
        self.grads: list[Tensor] = [p.grad for p in self.params if p.grad is not None]
        self.fisher = first["metric"] == "fisher"
        self.nesterov, self.decoupled, self.maximize = first["nesterov"], first["decoupled"], first["maximize"]
        self.sizes = [p.numel() for p in self.params]
        self.lengths = [run_length(n) for n in self.sizes]
        # Of its run; at each step another.
        self.places = [-(-n // length) if n else 1 for n, length in zip(self.sizes, self.lengths, strict=True)]
        # (group, first, last + 1): tensors of one group stand beside each other.
        self.spans = self._find_spans()
        # One tensor for all, of which each state holds its part.
        self.s = torch.cat([state["displacement"] for state in self.states])
        wide = wide_dtype(self.s.device)
        self.secants = torch.stack([state["secant"] for state in self.states]).to(wide)
        for state, run, row in zip(self.states, self.s.split(self.lengths), self.secants.unbind(), strict=True):
            state["displacement"], state["secant"] = run, row
        # A step that counts on the device is one tensor for all, which a tensor left out this time must not share.
        step = self.states[0]["step"]
        step = step.clone() if isinstance(step, Tensor) else step
        for state in self.states:
            state["step"] = step
        options: dict[str, Any] = {"dtype": wide, "device": self.s.device}
        scales = [n / max(length, 1) for n, length in zip(self.sizes, self.lengths, strict=True)]
        self.scales = torch.tensor(scales, **options)[:, None]
        self.elements = torch.tensor(self.sizes, **options)
        self._map = torch.tensor(pair_map(), **options)
        self._shares = torch.zeros(len(self.params), 3, **options)
        self._weights_key: Any = None

    @property
    def step(self) -> Any:
        """Gradients that these tensors have had before this step; a tensor on the device when capturable."""
        return self.states[0]["step"]

    def starts(self, ahead: int) -> list[int]:
        """Where the runs begin, in memory order, another place at each step: ``ahead`` 0 this step, -1 the last one."""
        if self.fixed_run:
            return [0] * len(self.sizes)
        step = max(int(self.step) + ahead, 0)
        rows = zip(self.sizes, self.lengths, self.places, strict=True)
        return [min(step % places * length, n - length) for n, length, places in rows]

    def advance(self, finite: Tensor | None = None) -> None:
        """Count the step; on the device only where its gradients were ``finite`` (0-dim bool; None: they were)."""
        if isinstance(self.step, Tensor):
            # In place: a captured CUDA graph counts on.
            self.step.add_(1 if finite is None else finite.to(self.step.device))
            return
        step = self.step + 1
        for state in self.states:
            state["step"] = step

    def newest_weight(self) -> Any:
        return newest_weight(self.step)

    def setting(self, name: str) -> list[Any]:
        """A setting of each tensor's group, as it is now."""
        values = {id(group): group[name] for group in self.groups}
        return [values[id(group)] for group in self.groups]

    def _find_spans(self) -> list[tuple[dict[str, Any], int, int]]:
        found: list[tuple[dict[str, Any], int, int]] = []
        for index, group in enumerate(self.groups):
            if found and found[-1][0] is group:
                found[-1] = (group, found[-1][1], index + 1)
            else:
                found.append((group, index, index + 1))
        return found

    def pair(self, products: Tensor, lr_ref: float | Tensor) -> Tensor:
        """[5], what ``damped_state`` takes, of the tensors that move, eq. (9).

        ``products``: <s, g> on each tensor's run, g the present gradient.
        """
        return torch.cat((self.secants, products[:, None]), 1).view(-1) @ self._weights(lr_ref)

    def _weights(self, lr_ref: float | Tensor) -> Tensor:
        """[6 T, 5]: see ``pair_map``. Made anew only when a rate or a decay changes, without asking the device."""
        rows = [
            (lr_ref / group["lr"] if isinstance(group["lr"], Tensor) or group["lr"] > 0 else 0.0, group)
            for group, _, _ in self.spans
        ]
        key = [(ratio, group["lr"] == 0, group["weight_decay"], group["decoupled"]) for ratio, group in rows]
        tensors = any(isinstance(ratio, Tensor) for ratio, _ in rows)
        if tensors or key != self._weights_key:
            self._weights_key = None if tensors else key
            for (ratio, group), (_, first, last) in zip(rows, self.spans, strict=True):
                part = self._shares[first:last]
                moves = (group["lr"] > 0).to(part.dtype) if isinstance(ratio, Tensor) else float(group["lr"] > 0)
                l2 = 0.0 if group["decoupled"] else group["weight_decay"]
                finite = torch.where(group["lr"] > 0, ratio, 0.0) if isinstance(ratio, Tensor) else ratio
                for column, value in zip(part.unbind(1), (finite, moves, moves * l2), strict=True):
                    column.fill_(value)
            weights = (self._shares @ self._map).view(len(self.params), 6, 5)
            weights[:, 5] *= -self.scales if self.maximize else self.scales
            self._weights_now = weights.view(-1, 5)
        return self._weights_now


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's memory is one run of its elements, in an order that torch names."""
    return (
        tensor.is_contiguous()
        or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        or (tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d))
    )


def like_parameter(tensor: Tensor, param: Tensor) -> Tensor:
    """The tensor in the memory order that the state of ``param`` has; itself, or a view, when it has it already."""
    if is_dense(param):
        if tensor.stride() == param.stride():
            return tensor
        # A dimension of one element may have any stride: one order has several names.
        strides = zip(tensor.stride(), param.stride(), param.shape, strict=True)
        if all(own == other or size == 1 for own, other, size in strides):
            return tensor.as_strided(param.shape, param.stride())
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor as one row in memory order, sharing its memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
