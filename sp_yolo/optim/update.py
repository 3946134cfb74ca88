"""The dense update of ``mode="robust"`` in torch on a CPU. Its scalars are numbers of the host.

It works in phases, because gamma is one number for the whole model: the products <s, g> of every tensor, the scalars
(``damping.py``), the update of every tensor. Eq. numbers: docs/the-method.md.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.batch import Batch, flat, is_dense, like_parameter
from sp_yolo.optim.damping import FISHER_FLOOR

# Elements that are worked on together: large tensors in blocks, whose arrays stay in cache between the operations;
# small ones several at a time, as a call costs more than their work.
BLOCK = 1 << 18
# A number of steps after which AdamW corrects no mean any more.
MANY = torch.tensor(math.inf, dtype=torch.float32)


@dataclass
class Rows:
    """What is worked on at once: BLOCK elements at most of one tensor or of several.

    ``places``: tensor, first element, last + 1 of each row. ``h``, ``mask``: None where a tensor's state has none.
    """

    places: list[tuple[int, int, int]]
    x: list[Any]
    v: list[Any]
    h: list[Any]
    mask: list[Any]
    directions: list[Tensor]


@dataclass
class Piece:
    """Tensors ``first`` to ``last`` - 1 of the batch, of one group: some of BLOCK elements together, or a larger one.

    In one row their displacements' runs: ``s``, a part of the batch's; ``before``, room for another row; ``factors``,
    for three more; and ``split`` the same by tensor.
    """

    group: dict[str, Any]
    first: int
    last: int
    rows: list[Rows]
    s: Tensor
    before: Tensor
    factors: Tensor
    split: list[tuple[Tensor, Tensor, Tensor]]


class SingleTensor:
    """The single-tensor path as the optimizer runs it."""

    name = "single-tensor"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.dtype = batch.states[0]["momentum_buffer"].dtype
        # A parameter with gaps in memory is worked on as a dense copy.
        self.dense = [p.detach() if is_dense(p) else torch.empty_like(p) for p in batch.params]
        self.gaps = [(p, own) for p, own in zip(batch.params, self.dense, strict=True) if not is_dense(p)]
        self.strides = [own.stride() for own in self.dense]
        self.x = [flat(own) for own in self.dense]
        self.h = [flat(state["square_avg"]) if "square_avg" in state else None for state in batch.states]
        # Kept, as memory that is new to the process costs more than the arithmetic.
        block = min(BLOCK, sum(batch.sizes))
        self.direction, self.root = torch.empty(block, dtype=self.dtype), torch.empty(block, dtype=self.dtype)
        self.pieces = self._cut()
        self.g: list[Tensor] = []
        self.found: list[Tensor] = []

    def _cut(self) -> list[Piece]:
        """All tensors in pieces, in order."""
        batch = self.batch
        portions = [(g, *ends) for g, start, stop in batch.spans for ends in _portions(batch.sizes, start, stop)]
        lengths = [batch.lengths[first:last] for _, first, last in portions]
        longest = max(map(sum, lengths))
        before, factors = torch.empty(longest, dtype=self.dtype), torch.empty(3, longest, dtype=self.dtype)
        pieces = []
        for (group, first, last), own, s in zip(portions, lengths, batch.s.split(list(map(sum, lengths))), strict=True):
            row, rows = before[: len(s)], factors[:, : len(s)]
            split = list(zip(s.split(own), row.split(own), rows.split(own, 1), strict=True))
            pieces.append(Piece(group, first, last, self._rows(first, last), s, row, rows, split))
        return pieces

    def _rows(self, first: int, last: int) -> list[Rows]:
        """The tensors ``first`` to ``last`` - 1 in blocks."""
        batch = self.batch
        parts = [[(i, 0, batch.sizes[i]) for i in range(first, last)]]
        if batch.sizes[first] > BLOCK:
            parts = [[(first, i, min(i + BLOCK, batch.sizes[first]))] for i in range(0, batch.sizes[first], BLOCK)]
        v = [flat(state["momentum_buffer"]) for state in batch.states[first:last]]
        masks = [flat(state["mask"]) if "mask" in state else None for state in batch.states[first:last]]
        columns: tuple[list[Any], ...] = (self.x[first:last], v, self.h[first:last], masks)

        def of(places: list[tuple[int, int, int]]) -> Rows:
            x, own_v, h, mask = (
                [None if column[i - first] is None else column[i - first][start:stop] for i, start, stop in places]
                for column in columns
            )
            sizes = [stop - start for _, start, stop in places]
            return Rows(places, x, own_v, h, mask, list(self.direction[: sum(sizes)].split(sizes)))

        return list(map(of, parts))

    def take(self, check: bool) -> bool:
        """Take this step's gradients; whether all are finite (True when not to ``check``)."""
        batch, grads = self.batch, self.batch.grads
        if [g.stride() for g in grads] != self.strides:
            grads = [like_parameter(g, p) for g, p in zip(grads, batch.params, strict=True)]
        self.g = [g if g.ndim == 1 else flat(g) for g in grads]
        starts, self.found, total = batch.starts(-1), [], 0.0
        for piece in self.pieces:
            runs = self._runs(self.g, piece, starts, piece.before)
            if check:  # the runs are all of the small ones
                large = [self.g[i] for i in range(piece.first, piece.last) if batch.places[i] > 1]
                total += sum(row.sum().item() for row in (runs, *large))
            self.found += [torch.dot(s, g) for s, g, _ in piece.split]
        # A sum is one fast call; where it overflows although every element is finite, each is asked.
        return not check or math.isfinite(total) or all(bool(torch.isfinite(row).all()) for row in self.g)

    def products(self) -> Tensor:
        """<s, g> on each tensor's run, float64."""
        return torch.stack(self.found).double()

    def update(self, gamma: float) -> None:
        """One step of every tensor, eq. (16), and what the next step needs of it."""
        batch, starts, newest = self.batch, self.batch.starts(0), float(self.batch.newest_weight())
        for param, own in self.gaps:
            own.copy_(param)
        sums: list[Tensor] = []
        squares: list[Tensor] = []
        # Backwards: the gradients that ``take`` read last are still in cache.
        for piece in reversed(self.pieces):
            self._runs(self.x, piece, starts, piece.before)
            for rows in reversed(piece.rows):
                self._step(rows, piece.group, gamma, newest)
            # The displacement is measured, not computed: rounding, decay and masks are in it.
            self._runs(self.x, piece, starts, piece.s).sub_(piece.before)
            self._measure(piece, starts)
            sums = [*(torch.mv(factors, s) for s, _, factors in piece.split), *sums]
            squares = [*(torch.dot(before, before) for _, before, _ in piece.split), *squares]
        for param, own in self.gaps:
            param.copy_(own)
        batch.secants[:, :3], batch.secants[:, 3] = torch.stack(sums), torch.stack(squares)
        batch.secants[:, :4] *= batch.scales
        batch.secants[:, 4] = batch.elements
        for group, first, last in batch.spans if batch.fisher else ():
            batch.secants[first:last, 0] /= 1.0 - group["momentum"]
        self.g, self.found = [], []

    def _measure(self, piece: Piece, starts: list[int]) -> None:
        """The factors of s in a secant: s times the root of E[g^2] (or 1), s, g."""
        weighted, own, g = piece.factors
        own.copy_(piece.s)
        if self.batch.fisher:
            self._runs(self.h, piece, starts, weighted).sqrt_().add_(FISHER_FLOOR).mul_(own)
        else:
            weighted.copy_(own)
        self._runs(self.g, piece, starts, g)
        if self.batch.maximize:
            g.neg_()

    def _runs(self, tensors: list[Any], piece: Piece, starts: list[int], out: Tensor) -> Tensor:
        """The runs of a piece's tensors in one row, in ``out``."""
        batch = self.batch
        runs = [
            tensors[i] if batch.places[i] == 1 else tensors[i][starts[i] : starts[i] + batch.lengths[i]]
            for i in range(piece.first, piece.last)
        ]
        return torch.cat(runs, out=out)

    def _step(self, rows: Rows, group: dict[str, Any], gamma: float, newest: float) -> None:
        batch = self.batch
        g = [self.g[i][start:stop] for i, start, stop in rows.places]
        if g[0].dtype != self.dtype:
            g = [row.to(self.dtype) for row in g]
        if batch.maximize:
            g = list(torch._foreach_neg(g))
        setting = float(group["lr"]) * gamma, float(group["momentum"]), float(group["weight_decay"])
        plain = rows.x[0].dtype != self.dtype or (setting[2] and not batch.decoupled)
        if batch.fisher and not plain and rows.x[0].device.type == "cpu" and has_fused_adamw():
            _step_fused(rows, g, newest, *setting, batch.nesterov)
        else:
            for i, own in enumerate(g):
                self._step_plain(rows, i, own, newest, *setting)
        for x, mask in zip(rows.x, rows.mask, strict=True):
            if mask is not None:
                x.mul_(mask.view(torch.uint8))  # as bytes: bool is several times slower

    def _step_plain(
        self, rows: Rows, i: int, g: Tensor, newest: float, rate: float, momentum: float, decay: float
    ) -> None:
        """Eq. (16) of one row without a metric, with L2 decay, or in low precision. ``rate``: lr gamma."""
        batch, x, v, h = self.batch, rows.x[i], rows.v[i], rows.h[i]
        direction, root = self.direction[: x.numel()], self.root[: x.numel()]
        if h is not None:
            h.mul_(1.0 - newest).addcmul_(g, g, value=newest)
        if decay and not batch.decoupled:
            g = torch.add(g, x, alpha=decay, out=root)
        torch.add(g, v, alpha=momentum, out=v)
        torch.add(g, v, alpha=momentum, out=direction) if batch.nesterov else direction.copy_(v)
        if decay and batch.decoupled:
            x.mul_(1.0 - rate * decay)
        if batch.fisher:
            direction.div_(torch.sqrt(h, out=root).add_(FISHER_FLOOR))
            rate *= 1.0 - momentum
        x.add_(direction, alpha=-rate)


def _portions(sizes: list[int], start: int, stop: int) -> list[tuple[int, int]]:
    """The tensors ``start`` to ``stop`` - 1 as (first, last + 1): some of BLOCK elements together, or one."""
    found: list[tuple[int, int]] = []
    room = -1
    for i in range(start, stop):
        room -= sizes[i]
        if room < 0:
            found.append((i, i + 1))
            room = BLOCK - sizes[i]
        else:
            found[-1] = (found[-1][0], i + 1)
    return found


@functools.cache
def has_fused_adamw() -> bool:
    """Whether this torch has AdamW's fused kernel as ``_step_fused`` calls it: one that is private may change or go."""
    x, g, v, h = (torch.full((1,), value) for value in (1.0, 2.0, 3.0, 4.0))
    rows = Rows([(0, 0, 1)], [x], [v], [h], [None], [torch.empty(1)])
    try:
        _step_fused(rows, [g], 0.5, 0.1, 0.5, 0.2, True)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        return False
    # x - .1 .2 x - .1 (1 - .5) (g + .5 (.5 v + g)) / 2
    return math.isclose(x.item(), 0.88625, rel_tol=1e-5) and h.item() == 4.0 and v.item() == 3.5


def _step_fused(
    rows: Rows, g: list[Tensor], newest: float, rate: float, momentum: float, decay: float, nesterov: bool
) -> None:
    """Eq. (16) in the metric by AdamW's fused kernel, one pass instead of seven. ``rate``: lr gamma.

    E[g^2], decay and division are AdamW's own. Its mean of the gradient, m <- b m + (1 - b) g, is the direction
    a g + c v over a + c when it starts at m = v with b = c / (a + c).
    """
    a, c = (1.0 + momentum, momentum**2) if nesterov else (1.0, momentum)
    length = (1.0 - momentum) * (a + c)
    torch._foreach_copy_(rows.directions, rows.v)
    torch._fused_adamw_(
        rows.x,
        g,
        rows.directions,
        rows.h,
        [],
        [MANY] * len(g),
        lr=rate * length,
        beta1=c / (a + c),
        beta2=1.0 - newest,
        weight_decay=decay / length,
        eps=FISHER_FLOOR,
        amsgrad=False,
        maximize=False,
    )
    for own, v in zip(g, rows.v, strict=True):
        torch.add(own, v, alpha=momentum, out=v)
