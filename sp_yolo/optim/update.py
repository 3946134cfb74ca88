"""The dense update of ``mode="robust"`` tensor by tensor, in torch. Its scalars are numbers of the host.

It works in three phases, because gamma is one number for the whole model: the products <s, g> of every tensor, the
scalars (``damping.py``), the update of every tensor. Eq. numbers: docs/the-method.md.
"""

from __future__ import annotations

import math
from itertools import groupby

import torch
from torch import Tensor

from sp_yolo.optim.batch import LEAST, Batch, flat, is_dense, like_parameter
from sp_yolo.optim.damping import FISHER_FLOOR

# Elements per block: a block's arrays stay in cache between its operations, so that most words move to and from memory
# once per step. Smaller blocks cost more in calls than they save.
BLOCK = 1 << 17
Setting = tuple[float, float, float]  # lr, momentum, weight decay


class SingleTensor:
    """The single-tensor path as the optimizer runs it. Vectors of up to LEAST elements are stepped as one row."""

    name = "single-tensor"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        rows = list(zip(batch.params, batch.states, strict=True))
        self.packed = [i for i, (p, state) in enumerate(rows) if _is_small(p) and "mask" not in state]
        self.large = [i for i, (p, _) in enumerate(rows) if p.numel() and i not in set(self.packed)]
        self.sizes = [batch.sizes[i] for i in self.packed]
        self.s, self.v, self.h = (self._shared(name) for name in ("displacement", "momentum_buffer", "square_avg"))
        longest = max(min(max(batch.sizes, default=0), BLOCK), sum(self.sizes))
        dtype = batch.states[0]["momentum_buffer"].dtype
        self.scratch = torch.empty(longest, dtype=dtype), torch.empty(longest, dtype=dtype)

    def _shared(self, name: str) -> Tensor | None:
        """One row for a state of all packed vectors, of which each state holds its part."""
        states = [self.batch.states[i] for i in self.packed]
        if not states or name not in states[0]:
            return None
        row = torch.cat([state[name] for state in states])
        for state, part in zip(states, row.split(self.sizes), strict=True):
            state[name] = part
        return row

    def products(self, check: bool) -> tuple[Tensor, bool]:
        """<s, g> of each tensor, float64, and whether all gradients are finite (True when not to ``check``)."""
        batch, finite = self.batch, True
        products = [0.0] * len(batch.params)
        starts = batch.starts(-1)
        for i in self.large:
            s, row = batch.states[i]["displacement"], flat(like_parameter(batch.grads[i], batch.params[i]))
            run = row[starts[i] : starts[i] + batch.lengths[i]].to(s.dtype)
            products[i] = torch.dot(s, run).item() * batch.scales[i]
            finite = finite and (not check or _all_finite(row))
        found = torch.tensor(products, dtype=torch.float64)
        if self.packed and self.s is not None:
            g = torch.cat([batch.grads[i] for i in self.packed])
            found[self.packed] = _sums(self.s, g, self.sizes)
            finite = finite and (not check or _all_finite(g))
        return (-found if batch.maximize else found), finite

    def update(self, gamma: Tensor) -> None:
        """One step of every tensor, eq. (16), and what the next step needs of it.

        Backwards: the gradients that ``products`` read last are still in cache.
        """
        batch, rate = self.batch, gamma.item()
        newest, settings, starts = float(batch.newest_weight()), batch.setting_rows(), batch.starts(0)
        sums = [[0.0] * 5] * len(batch.params)
        for i in reversed(self.large):
            sums[i] = self._update_tensor(i, starts[i], rate, newest, settings[i])
        batch.secants.copy_(torch.tensor(sums, dtype=torch.float64))
        if self.packed:
            self._update_packed(rate, newest, settings)

    def _update_tensor(self, i: int, start: int, rate: float, newest: float, setting: Setting) -> list[float]:
        """Step one tensor; returns its secant."""
        batch, param, state = self.batch, self.batch.params[i], self.batch.states[i]
        # A parameter with gaps in memory is worked on as a dense copy.
        x = param if is_dense(param) else torch.empty_like(param).copy_(param)
        row, g = flat(x), flat(like_parameter(batch.grads[i], param))
        v, h, mask = (flat(state[n]) if n in state else None for n in ("momentum_buffer", "square_avg", "mask"))
        assert v is not None
        run = slice(start, start + batch.lengths[i])
        before = row[run].to(v.dtype, copy=True)
        # Backwards, for the same reason as the tensors.
        for first in reversed(range(0, row.numel(), BLOCK)):
            block = slice(first, first + BLOCK)
            square, held = (None if t is None else t[block] for t in (h, mask))
            rows = row[block], g[block], v[block], square, held
            _update_row(batch, rate, newest, setting, *rows, self.scratch)
        if x is not param:
            param.copy_(x)
        # The displacement is measured, not computed: rounding, decay and masks are in it.
        s = torch.sub(row[run], before, out=state["displacement"])
        metric = _metric(h[run], setting[1]) if batch.fisher and h is not None else None
        gradient = g[run].to(s.dtype)
        sums = (torch.dot(s, s if metric is None else s * metric), torch.dot(s, s), torch.dot(s, gradient))
        scaled = [batch.scales[i] * value.item() for value in (*sums, torch.dot(before, before))]
        scaled[2] = -scaled[2] if batch.maximize else scaled[2]
        return [*scaled, float(batch.sizes[i])]

    def _update_packed(self, rate: float, newest: float, settings: list[Setting]) -> None:
        """Vectors of a few elements, of which a network has hundreds: as one row, since a call costs more than its
        work; one row for each setting."""
        batch, s, v, h = self.batch, self.s, self.v, self.h
        assert s is not None and v is not None
        params = [batch.params[i] for i in self.packed]
        x, g = torch.cat(params), torch.cat([batch.grads[i] for i in self.packed])
        before, first = x.to(s.dtype, copy=True), 0
        metric = torch.ones_like(s)
        for setting, own in groupby(zip(self.packed, self.sizes, strict=True), lambda pair: settings[pair[0]]):
            part = slice(first, first + sum(size for _, size in own))
            first = part.stop
            square = None if h is None else h[part]
            _update_row(batch, rate, newest, setting, x[part], g[part], v[part], square, None, self.scratch)
            if batch.fisher and square is not None:
                metric[part] = _metric(square, setting[1])
        torch._foreach_copy_(params, list(x.split(self.sizes)))
        torch.sub(x, before, out=s)
        gradient = (-g if batch.maximize else g).to(s.dtype)
        pairs = ((s, s * metric), (s, s), (s, gradient), (before, before))
        count = torch.tensor(self.sizes, dtype=torch.float64)
        batch.secants[self.packed] = torch.stack([*(_sums(a, b, self.sizes) for a, b in pairs), count], 1)


def _is_small(param: Tensor) -> bool:
    return param.ndim == 1 and 0 < param.numel() <= LEAST and param.is_contiguous()


def _all_finite(row: Tensor) -> bool:
    # A sum is one fast call; where it overflows although every element is finite, each is asked.
    return math.isfinite(row.sum().item()) or bool(torch.isfinite(row).all())


def _sums(a: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
    """<a, b> of each of the runs of ``sizes`` elements, in float64."""
    return torch.segment_reduce(a.double() * b, "sum", lengths=torch.tensor(sizes))


def _metric(h: Tensor, momentum: float) -> Tensor:
    """1 / D of eq. (19)."""
    return h.sqrt().add_(FISHER_FLOOR).div_(1.0 - momentum)


def _update_row(
    batch: Batch,
    rate: float,
    newest: float,
    setting: Setting,
    x: Tensor,
    g: Tensor,
    v: Tensor,
    h: Tensor | None,
    mask: Tensor | None,
    scratch: tuple[Tensor, Tensor],
) -> None:
    """Eq. (16) on dense rows, in place. ``rate``: gamma; ``newest``: weight of g^2 in its mean; ``scratch``: two rows
    at least as long, as memory that is new to the process costs more than the arithmetic."""
    lr, momentum, decay = setting
    direction, root = (row[: x.numel()] for row in scratch)
    g = g.to(v.dtype)
    g = -g if batch.maximize else g
    if h is not None:
        h.mul_(1.0 - newest).addcmul_(g, g, value=newest)
    if decay and not batch.decoupled:
        g = torch.add(g, x, alpha=decay, out=root)
    torch.add(g, v, alpha=momentum, out=v)
    torch.add(g, v, alpha=momentum, out=direction) if batch.nesterov else direction.copy_(v)
    if decay and batch.decoupled:
        x.mul_(1.0 - lr * rate * decay)
    if batch.fisher and h is not None:
        torch.sqrt(h, out=root).add_(FISHER_FLOOR)
        if x.dtype == v.dtype:
            x.addcdiv_(direction, root, value=-lr * rate * (1.0 - momentum))
        else:
            x.add_(direction.div_(root), alpha=-lr * rate * (1.0 - momentum))
    else:
        x.add_(direction, alpha=-lr * rate)
    if mask is not None:
        x.mul_(mask.view(torch.uint8))  # as bytes: bool is several times slower
