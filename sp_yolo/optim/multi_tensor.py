"""The multi-tensor path of the dense update: the accelerator's default. Its scalars stay on the device.

The same three phases as ``update.py`` in multi-tensor operations, without asking the host anything.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.batch import Batch, flat, like_parameter
from sp_yolo.optim.damping import FISHER_FLOOR

# Elements of a run that are summed in one go.
PIECE = 256
# Types of devices on which torch sums segments; on others each element is told its own.
SEGMENTED = ("cpu", "cuda")
# Of a tensor: steps that ask whether there was a finite gradient before.
FIRST_STEPS = 32


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
        # On the device once: a step must not send numbers there and wait.
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.zero, self.one = torch.zeros((), **options), torch.ones((), **options)
        self.rate = torch.empty((), **options)
        self.wide_dtype = batch.scales.dtype
        # A run is summed in pieces, then their sums: a GPU's segment_reduce gives a whole segment to one thread.
        pieces = [[PIECE] * (n // PIECE) + [n % PIECE] * (n % PIECE > 0) for n in batch.lengths]
        self.pieces = torch.tensor([n for piece in pieces for n in piece], device=self.device)
        self.segments = torch.tensor([len(piece) for piece in pieces], device=self.device)
        if self.device.type not in SEGMENTED:
            tensors = torch.arange(len(batch.lengths))
            self.segments = tensors.repeat_interleave(torch.tensor(batch.lengths)).to(self.device)
        # Of sums whose last is the number of elements.
        self.scales = batch.scales.expand(-1, 5)
        self.bounds = [0, *accumulate(batch.lengths)]
        # Of the step that is under way; ``wide``: the parameters in the state's precision.
        self.grads: list[Tensor] = []
        self.wide: list[Tensor] = []
        self.signed = self.before = self.zero
        # Whether a gradient was finite yet; asked in the first steps only.
        self.started: Tensor | None = None

    def take(self, check: bool) -> Tensor | None:
        """Take this step's gradients; whether all are finite (0-dim bool; None: not asked)."""
        batch = self.batch
        self.grads = [like_parameter(g, p) for g, p in zip(batch.grads, batch.params, strict=True)]
        if self.grads[0].dtype != self.dtype:
            self.grads = [g.to(self.dtype) for g in self.grads]
        filled = [g for g in self.grads if g.numel()]
        if not check or not filled:
            return None
        return (torch.stack(torch._foreach_norm(filled, torch.inf)) < torch.inf).all()  # False for NaN

    def products(self, finite: Tensor | None) -> Tensor:
        """<s, g> on each tensor's run. Where ``finite`` is False, the gradients are 0 from here on."""
        batch = self.batch
        if finite is not None:
            self.grads = _zero_unless(finite.to(self.device), self.grads)
        self.wide = [p.detach() for p in batch.params]
        if self.wide[0].dtype != self.dtype:
            self.wide = [t.to(self.dtype) for t in self.wide]
        last, now = batch.starts(-1), batch.starts(0)
        runs, self.signed, self.before = self._runs((self.grads, last), (self.grads, now), (self.wide, now))
        return self._sums(batch.s[:, None].to(self.wide_dtype) * runs[:, None])[:, 0]

    def update(self, gamma: Tensor, finite: Tensor | None) -> None:
        """One step of every tensor. Where ``finite`` is False nothing changes but counters and s, which becomes 0."""
        batch = self.batch
        finite = None if finite is None else finite.to(self.device)
        self._set_rate(gamma.to(self.device), finite)
        if batch.maximize:
            self.grads = list(torch._foreach_neg(self.grads))
            self.signed.neg_()
        self._average(self._newest(finite), finite)
        steps = self._directions(finite)
        roots = self._move(steps)
        rows = (self.wide, roots) if batch.fisher else (self.wide,)
        after, *root = self._runs(*((row, batch.starts(0)) for row in rows))
        # The rounded parameters, not the computed ones, define s.
        s = torch.sub(after, self.before, out=batch.s)
        weighted = self._weighted(s, root[0]) if batch.fisher else s
        one = self.one.expand_as(s)
        left, right = (weighted, s, self.signed, self.before, one), (s, s, s, self.before, one)
        sums = self._sums(torch.stack(left, 1).to(self.wide_dtype) * torch.stack(right, 1))
        torch.mul(sums, self.scales, out=batch.secants)
        self.grads, self.wide = [], []

    def _set_rate(self, gamma: Tensor, finite: Tensor | None) -> None:
        """``rate``: gamma; 0 where the gradients are not finite; times lr where that is a tensor (of one group)."""
        self.rate.copy_(gamma) if finite is None else torch.mul(gamma, finite, out=self.rate)
        lr = self.batch.groups[0]["lr"]
        if isinstance(lr, Tensor):
            self.rate.mul_(lr.reshape(()))

    def _newest(self, finite: Tensor | None) -> Any:
        """The weight of this step's g^2. The first finite gradient's is 1, also after others, which the host counts."""
        step, newest = self.batch.step, self.batch.newest_weight()
        if finite is None or isinstance(step, Tensor) or step >= FIRST_STEPS:
            return newest
        if step == 0:
            self.started = finite
            return newest
        if self.started is None:  # the tensors come from elsewhere; then the same arithmetic, for the same bits
            self.started = self.one > 0
        newest = torch.add(self.one, self.started, alpha=newest - 1.0)
        self.started = self.started | finite
        return newest

    def _average(self, newest: Any, finite: Tensor | None) -> None:
        """E[g^2]; ``newest``: the weight of this step's."""
        if not self.hs:
            return
        own = [self.grads[i] for i in self.with_square] if len(self.hs) < len(self.grads) else self.grads
        if isinstance(newest, Tensor):
            # By its root: the weight of a captured step is on the device, where addcmul takes none.
            newest = newest.to(self.dtype)
            kept = 1.0 - newest if finite is None else torch.addcmul(self.one, newest, finite, value=-1)
            own = list(torch._foreach_mul(own, newest.sqrt()))
            torch._foreach_mul_(self.hs, kept)
            torch._foreach_addcmul_(self.hs, own, own)
            return
        torch._foreach_mul_(self.hs, 1.0 - newest if finite is None else torch.add(self.one, finite, alpha=-newest))
        torch._foreach_addcmul_(self.hs, own, own, newest)

    def _directions(self, finite: Tensor | None) -> list[Tensor]:
        """v moves on; the directions g + beta v, or v."""
        batch, grads = self.batch, self.grads
        decays = batch.setting("weight_decay")
        if any(decays) and not batch.decoupled:
            grads = list(torch._foreach_add(grads, torch._foreach_mul(self.wide, decays)))
            if finite is not None:
                torch._foreach_mul_(grads, finite.to(self.dtype))
        steps: list[Tensor] = []
        for momentum, first, last in self._stretches():
            vs, own = self.vs[first:last], grads[first:last]
            # v must stay where the gradient was not finite: momentum 1 there, and a gradient of 0.
            kept: Any = momentum if finite is None else torch.add(self.one, finite, alpha=momentum - 1.0)
            torch._foreach_mul_(vs, kept)
            torch._foreach_add_(vs, own)
            steps += torch._foreach_add(own, vs, alpha=momentum) if batch.nesterov else torch._foreach_mul(vs, 1.0)
        return steps

    def _move(self, steps: list[Tensor]) -> list[Tensor]:
        """Eq. (16): x by lr gamma (D d + decay x), by the directions ``steps``; the roots of E[g^2] in the metric."""
        batch, wide = self.batch, self.wide
        lrs, momenta, decays = (batch.setting(name) for name in ("lr", "momentum", "weight_decay"))
        lengths = [1.0 - m for m in momenta] if batch.fisher else [1.0] * len(steps)
        rates = [-n if isinstance(lr, Tensor) else -lr * n for lr, n in zip(lrs, lengths, strict=True)]
        decayed = any(decays) and batch.decoupled
        roots: list[Tensor] = []
        if batch.fisher:
            roots = list(torch._foreach_sqrt(self.hs))
            torch._foreach_add_(roots, FISHER_FLOOR)
            if decayed:
                torch._foreach_addcmul_(steps, wide, roots, [d / n for d, n in zip(decays, lengths, strict=True)])
            torch._foreach_mul_(steps, self.rate)
            torch._foreach_addcdiv_(wide, steps, roots, rates)
        else:
            if decayed:
                torch._foreach_add_(steps, torch._foreach_mul(wide, decays))
            torch._foreach_mul_(steps, self.rate)
            torch._foreach_mul_(steps, rates)
            torch._foreach_add_(wide, steps)
        if self.masked:
            kept = [wide[i] for i in self.masked]
            torch._foreach_mul_(kept, [batch.states[i]["mask"] for i in self.masked])
        if batch.params[0].dtype != self.dtype:
            params = [p.detach() for p in batch.params]
            torch._foreach_copy_(params, wide)
            torch._foreach_copy_(wide, params)
        return roots

    def _weighted(self, s: Tensor, root: Tensor) -> Tensor:
        """D^{-1} s, D^{-1} of eq. (19) from the roots on the runs."""
        parts = []
        for momentum, first, last in self._stretches():
            run = slice(self.bounds[first], self.bounds[last])
            parts.append(torch.addcmul(self.zero, s[run], root[run], value=1.0 / (1.0 - momentum)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stretches(self) -> list[tuple[float, int, int]]:
        """(momentum, first, last + 1) of tensors beside each other that share it."""
        found: list[tuple[float, int, int]] = []
        for group, first, last in self.batch.spans:
            if found and found[-1][0] == group["momentum"]:
                found[-1] = (group["momentum"], found[-1][1], last)
            else:
                found.append((group["momentum"], first, last))
        return found

    def _runs(self, *rows: tuple[list[Tensor], list[int]]) -> tuple[Tensor, ...]:
        """The runs of all tensors in one row, for each of (tensors, starts). Views and one copy."""
        runs = [
            flat(t)[start : start + length]
            for tensors, starts in rows
            for t, length, start in zip(tensors, self.batch.lengths, starts, strict=True)
        ]
        parts: tuple[Tensor, ...] = torch.cat(runs).split(self.bounds[-1])
        return parts

    def _sums(self, products: Tensor) -> Tensor:
        """[T, k]: sums of the products [M, k] over the run of each tensor."""
        if self.device.type not in SEGMENTED:
            return products.new_zeros(len(self.batch.lengths), products.shape[1]).index_add_(0, self.segments, products)
        parts = torch.segment_reduce(products, "sum", lengths=self.pieces, unsafe=True)
        return torch.segment_reduce(parts, "sum", lengths=self.segments, unsafe=True)


def _zero_unless(finite: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Copies that are 0 where ``finite`` is False: as whole numbers, for which 0 * NaN is 0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensors[0].element_size()]
    bits = torch._foreach_mul([t.view(kind) for t in tensors], finite.to(kind))
    return [t.view(tensors[0].dtype) for t in bits]
