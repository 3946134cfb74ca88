"""The multi-tensor path of the dense update: the accelerator's default. Its scalars stay on the device.

The same three phases as ``update.py`` in multi-tensor operations, without asking the host anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.batch import Batch, flat, like_parameter
from sp_yolo.optim.damping import FISHER_FLOOR


class MultiTensor:
    """The multi-tensor path as the optimizer runs it."""

    name = "multi-tensor"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.device = batch.params[0].device
        self.vs = [state["momentum_buffer"] for state in batch.states]
        self.hs = [state["square_avg"] for state in batch.states if "square_avg" in state]
        self.with_square = [i for i, state in enumerate(batch.states) if "square_avg" in state]
        self.masked = [i for i, state in enumerate(batch.states) if "mask" in state]
        self.dtype = self.vs[0].dtype
        self.s = torch.cat([state["displacement"] for state in batch.states])
        for state, part in zip(batch.states, self.s.split(batch.lengths), strict=True):
            state["displacement"] = part
        # On the device once: a step must not send numbers there and wait.
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        self.scales = torch.tensor(batch.scales, **options)[:, None]
        self.counts = torch.tensor(batch.sizes, **options)[:, None]
        self.one = torch.ones((), dtype=self.dtype, device=self.device)
        self.segments = torch.tensor(batch.lengths, device=self.device)
        self.grads: list[Tensor] = []

    def products(self, check: bool) -> tuple[Tensor, Tensor | None]:
        """<s, g> of each tensor, float64, and whether all gradients are finite (0-dim bool; None: not asked)."""
        batch = self.batch
        self.grads = [like_parameter(g, p) for g, p in zip(batch.grads, batch.params, strict=True)]
        if self.grads[0].dtype != self.dtype:
            self.grads = [g.to(self.dtype) for g in self.grads]
        products = self._sums(self.s[:, None], self._runs(self.grads, batch.starts(-1))[:, None])[:, 0]
        finite = None
        if check:
            filled = [g for g in self.grads if g.numel()]
            finite = (torch.stack(torch._foreach_norm(filled, torch.inf)) < torch.inf).all()  # False for NaN
        return (products.neg_() if batch.maximize else products), finite

    def update(self, gamma: Tensor, finite: Tensor | None) -> None:
        """One step of every tensor. Where ``finite`` is False nothing changes but counters and s, which becomes 0."""
        batch, starts = self.batch, self.batch.starts(0)
        gamma = gamma.to(self.device)
        newest: Any = batch.newest_weight()
        grads = self.grads
        keep: Any = 1.0
        if finite is not None:
            finite = finite.to(self.device)
            grads = _zero_unless(finite, grads)
            keep = finite.to(self.dtype)
            gamma = gamma * keep
        if batch.maximize:
            grads = list(torch._foreach_neg(grads))
        before = self._runs([p.detach() for p in batch.params], starts).to(self.dtype)
        signed = self._runs(grads, starts)
        self._average(grads, newest, keep)
        self._move(grads, gamma.to(self.dtype), keep)
        after = self._runs([p.detach() for p in batch.params], starts).to(self.dtype)
        # The rounded parameters, not the computed ones, define s.
        torch.sub(after, before, out=self.s)
        weighted = self.s * self._metric_runs(starts) if batch.fisher else self.s
        left = torch.stack((weighted, self.s, signed, before), 1)
        right = torch.stack((self.s, self.s, self.s, before), 1)
        torch.cat((self._sums(left, right), self.counts), 1, out=batch.secants)
        self.grads = []

    def _average(self, grads: list[Tensor], newest: Any, keep: Any) -> None:
        """E[g^2]; ``newest``: the weight of this step's. Where ``keep`` is 0 so are the gradients."""
        if not self.hs:
            return
        own = [grads[i] for i in self.with_square] if len(self.hs) < len(grads) else grads
        if isinstance(newest, Tensor):
            squares = torch._foreach_mul(own, own)
            newest = (newest * keep).to(self.dtype)
            torch._foreach_mul_(squares, newest)
            torch._foreach_mul_(self.hs, 1.0 - newest)
            torch._foreach_add_(self.hs, squares)
            return
        factor = torch.add(self.one, keep, alpha=-newest) if isinstance(keep, Tensor) else 1.0 - newest
        torch._foreach_mul_(self.hs, factor)
        torch._foreach_addcmul_(self.hs, own, own, newest)

    def _move(self, grads: list[Tensor], gamma: Tensor, keep: Any) -> None:
        """Eq. (16): v, and x by lr gamma (D d + decay x)."""
        batch = self.batch
        lrs, momenta, decays = (batch.setting(name) for name in ("lr", "momentum", "weight_decay"))
        x = [p.detach() for p in batch.params]
        wide = x if x[0].dtype == self.dtype else [t.to(self.dtype) for t in x]
        decayed = any(decays)
        if decayed and not batch.decoupled:
            grads = list(torch._foreach_add(grads, torch._foreach_mul(wide, decays)))
            if isinstance(keep, Tensor):
                torch._foreach_mul_(grads, keep)
        if isinstance(keep, Tensor):
            # v must stay where the gradient was not finite: momentum 1 there, and a gradient of 0.
            factors = [torch.add(self.one, keep, alpha=m - 1.0) for m in dict.fromkeys(momenta)]
            if len(factors) == 1:
                torch._foreach_mul_(self.vs, factors[0])
            else:
                by_momentum = dict(zip(dict.fromkeys(momenta), factors, strict=True))
                torch._foreach_mul_(self.vs, [by_momentum[m] for m in momenta])
        else:
            torch._foreach_mul_(self.vs, momenta)
        torch._foreach_add_(self.vs, grads)
        if batch.nesterov:
            steps = list(torch._foreach_mul(self.vs, momenta))
            torch._foreach_add_(steps, grads)
        else:
            steps = list(torch._foreach_mul(self.vs, 1.0))
        if batch.fisher:
            roots = torch._foreach_sqrt(self.hs)
            torch._foreach_add_(roots, FISHER_FLOOR)
            torch._foreach_div_(steps, roots)
            torch._foreach_mul_(steps, [1.0 - m for m in momenta])
        if decayed and batch.decoupled:
            torch._foreach_add_(steps, torch._foreach_mul(wide, decays))
        self._scale(steps, lrs, gamma)
        torch._foreach_sub_(wide, steps)
        if self.masked:
            kept = [wide[i] for i in self.masked]
            torch._foreach_mul_(kept, [batch.states[i]["mask"] for i in self.masked])
        if wide is not x:
            torch._foreach_copy_(x, wide)

    def _scale(self, steps: list[Tensor], lrs: list[Any], gamma: Tensor) -> None:
        if not any(isinstance(lr, Tensor) for lr in lrs):
            torch._foreach_mul_(steps, lrs)
            torch._foreach_mul_(steps, gamma)
            return
        for group, first, last in self.batch.spans:
            torch._foreach_mul_(steps[first:last], (group["lr"] * gamma).to(self.dtype).reshape(()))

    def _metric_runs(self, starts: list[int]) -> Tensor:
        """1 / D of eq. (19) on the runs."""
        root = self._runs(self.hs, starts).sqrt_().add_(FISHER_FLOOR)
        momenta = self.batch.setting("momentum")
        if len(set(momenta)) == 1:
            return root.div_(1.0 - momenta[0])
        bounds = [0, *torch.tensor(self.batch.lengths).cumsum(0).tolist()]
        for _, first, last in self.batch.spans:
            root[bounds[first] : bounds[last]].div_(1.0 - momenta[first])
        return root

    def _runs(self, tensors: list[Tensor], starts: list[int]) -> Tensor:
        """The runs of all tensors in one row. Views and one copy."""
        rows = zip(tensors, self.batch.lengths, starts, strict=True)
        return torch.cat([flat(t)[start : start + length] for t, length, start in rows])

    def _sums(self, a: Tensor, b: Tensor) -> Tensor:
        """[T, k] sums of the products a b [M, k] over the run of each tensor, in float64, scaled up to the tensor."""
        return torch.segment_reduce(a.double() * b, "sum", lengths=self.segments, unsafe=True) * self.scales


def _zero_unless(finite: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Copies that are 0 where ``finite`` is False: as whole numbers, for which 0 * NaN is 0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensors[0].element_size()]
    bits = torch._foreach_mul([t.view(kind) for t in tensors], finite.to(kind))
    return [t.view(tensors[0].dtype) for t in bits]
