"""The l0 proximal operator over groups of entries, eqs. (23) and (24): what is removed together, and when.

A group is one row of several tensors, such as a channel: a row of a convolution's weight, its batch norm's weight and
bias. Which rows belong together, and what a group costs, is told; nothing here knows of networks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sp_yolo.optim.damping import wide_dtype
from sp_yolo.optim.saliency import saliency, saliency_matrix

# Tensors whose rows belong together: group i of the family is row ``start`` + i of each slice.
Family = Sequence[tuple[Tensor, slice]]


class Cost(Protocol):
    """What groups cost. ``kept`` float64 [families]: how many groups of each family there are."""

    def total(self, kept: Tensor) -> float:
        """The cost of all; it falls where a group goes."""

    def each(self, kept: Tensor) -> Tensor:
        """The cost of one group of each family beside the others, float64 [families]."""


class Number:
    """Every group costs one."""

    def total(self, kept: Tensor) -> float:
        return float(kept.sum())

    def each(self, kept: Tensor) -> Tensor:
        return torch.ones_like(kept)


@dataclass(frozen=True)
class Removal:
    """Remove groups of ``families`` until ``share`` of the ``cost`` is gone; without one every group costs one.

    At least ``least`` groups of a family stay (one number, or one for each family), a multiple of ``block`` where any
    goes: some programs compute eight channels in the time of one.
    """

    families: Sequence[Family]
    share: float
    cost: Cost | None = None
    least: int | Sequence[int] = 1
    block: int = 1

    def check(self, groups: Iterable[dict[str, Any]]) -> None:
        """Raises ValueError unless an optimizer of these parameter groups can do it."""
        for group in groups:
            if group["mode"] != "robust":
                raise ValueError(f"groups of entries are removed in mode 'robust', not {group['mode']!r}")
            if group["sigma"]:
                raise ValueError(f"groups of entries and single entries (sigma={group['sigma']:g}) cannot both go")
            if group["total_steps"] is None or not group["held"]:
                raise ValueError("to remove groups of entries give total_steps, the steps of the run, and held=True")
        for name, holds, rule in (
            ("share", 0 < self.share < 1, "in (0, 1)"),
            ("least", min(_one_each(self.least, self.families)) >= 1, ">= 1"),
            ("block", self.block >= 1, ">= 1"),
        ):
            if not holds:
                raise ValueError(f"invalid {name}: {getattr(self, name)} (must be {rule})")
        owned = {id(param) for group in groups for param in group["params"]}
        for number, family in enumerate(self.families):
            if not family or len({len(tensor[rows]) for tensor, rows in family}) != 1:
                raise ValueError(f"family {number}: its slices must have equally many rows, and there must be one")
            if not all(id(tensor) in owned for tensor, _ in family):
                raise ValueError(f"family {number}: a tensor is no parameter of this optimizer")
        largest = self.largest_share()
        if self.share > largest:
            raise ValueError(f"a share of {self.share:g} cannot be removed: {largest:.3f} at most")

    @property
    def costs(self) -> Cost:
        return Number() if self.cost is None else self.cost

    def sizes(self) -> Tensor:
        return torch.tensor([len(family[0][0][family[0][1]]) for family in self.families], dtype=torch.float64)

    def largest_share(self) -> float:
        """The share of the cost that is gone when every family is at its least."""
        sizes = self.sizes()
        leasts = _one_each(self.least, self.families)
        left = [_floor(int(n), least, self.block) for n, least in zip(sizes, leasts, strict=True)]
        floor = torch.tensor(left, dtype=torch.float64)
        whole = self.costs.total(sizes)
        return 1 - self.costs.total(floor) / whole if whole else 0.0


def remove(
    removal: Removal, share: float, owners: Mapping[int, dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]
) -> bool:
    """The proximal step: zero and hold groups until ``share`` of the cost is gone. Whether any went.

    ``owners``: the parameter group of each tensor, by identity. Families with a tensor that has no state, as it never
    had a gradient, wait.
    """
    alive = [_alive(family, states) for family in removal.families]
    kept = torch.tensor([int(mask.sum()) for mask in alive], dtype=torch.float64)
    budget = (1 - share) * removal.costs.total(removal.sizes())
    if removal.costs.total(kept) <= budget:
        return False
    scores = [_saliencies(family, owners, states) for family in removal.families]
    ready = [i for i, score in enumerate(scores) if score is not None]

    def total(left: Tensor) -> float:
        return removal.costs.total(kept.index_copy(0, torch.tensor(ready), left))

    rows = [score.masked_fill(~alive[i], math.inf) for i, score in enumerate(scores) if score is not None]
    prices = removal.costs.each(kept)[ready]
    gone, threshold = choose(rows, prices, total, budget, removal.least, removal.block)
    for i, index in zip(ready, gone, strict=True):
        if len(index):
            _zero(removal.families[i], index, states)
    next(iter(owners.values()))["group_threshold"] = threshold
    return any(map(len, gone))


def choose(
    scores: Sequence[Tensor],
    prices: Tensor,
    total: Callable[[Tensor], float],
    budget: float,
    least: int | Sequence[int] = 1,
    block: int = 1,
) -> tuple[list[Tensor], float]:
    """Eq. (24): the groups that go so that ``total`` of what is left is at most ``budget``, and lambda.

    ``scores`` [n] of each family: S of each group, infinite where it is gone already. ``prices`` [families]: c of one
    group. ``total``: the cost of so many groups left, float64 [families]. They go in the order of S / c, ties by index;
    of each family ``least`` stay (one number, or one for each), and a multiple of ``block`` where any goes. lambda is
    the largest S / c removed.

    So the rest minimises sum_removed S + lambda sum_kept c over all supports of such sizes: it is the proximal operator
    of lambda times the cost, in the metric of the saliency. Where not even the least of all fits, that is left.
    """
    orders = [score.argsort(stable=True) for score in scores]
    present = [int(score.isfinite().sum()) for score in scores]
    ratios, sizes, places = [], [], []
    leasts = _one_each(least, scores)
    for place, (score, order, n) in enumerate(zip(scores, orders, present, strict=True)):
        ends = [0, *range(n % block or block, n - leasts[place] + 1, block)]
        sums = torch.cat((torch.zeros(1, dtype=torch.float64), score[order[:n]].double().cumsum(0)))[ends].tolist()
        for (before, low), (end, high) in itertools.pairwise(zip(ends, sums, strict=True)):
            ratios.append((high - low) / ((end - before) * float(prices[place])))
            sizes.append(end - before)
            places.append(place)
    ranking = torch.tensor(ratios, dtype=torch.float64).argsort(stable=True)
    steps = torch.tensor(sizes, dtype=torch.float64)[ranking]
    owner = torch.tensor(places, dtype=torch.int64)[ranking]
    there = torch.tensor(present, dtype=torch.float64)

    def left(count: int) -> Tensor:
        return there.index_add(0, owner[:count], -steps[:count])

    low, high = 0, len(ranking)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if total(left(middle)) <= budget else (middle + 1, high)
    removed = (there - left(low)).long().tolist()
    gone = [order[:count] for order, count in zip(orders, removed, strict=True)]
    return gone, float(ratios[int(ranking[low - 1])]) if low else -math.inf


def _one_each(least: int | Sequence[int], families: Sequence[object]) -> list[int]:
    return [least] * len(families) if isinstance(least, int) else list(least)


def _floor(n: int, least: int, block: int) -> int:
    """How many of ``n`` groups are left when all that may go are gone."""
    ends = range(n % block or block, n - least + 1, block)
    return n - ends[-1] if len(ends) else n


def _alive(family: Family, states: Mapping[Tensor, dict[str, Any]]) -> Tensor:
    """bool [n] on the host: the groups that are not held at zero."""
    tensor, rows = min(family, key=lambda pair: pair[0].numel())
    mask: Tensor | None = states[tensor].get("mask") if tensor in states else None
    if mask is None:
        return torch.ones(len(tensor[rows]), dtype=torch.bool)
    return mask[rows].reshape(len(mask[rows]), -1).any(1).cpu()


def _saliencies(
    family: Family, owners: Mapping[int, dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]
) -> Tensor | None:
    """S of each group, eq. (23), float64 [n] on the host; None where a tensor has no state."""
    total = torch.zeros(len(family[0][0][family[0][1]]), dtype=torch.float64)
    for tensor, rows in family:
        if tensor not in states:
            return None
        h = saliency_matrix(owners[id(tensor)], states[tensor])
        x = tensor.detach()[rows].to(states[tensor]["momentum_buffer"].dtype)
        score = saliency(x, None if h is None else h[rows]).reshape(len(x), -1)
        total += score.sum(1, dtype=wide_dtype(tensor.device)).cpu().double()
    return total


def _zero(family: Family, index: Tensor, states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Zero the groups ``index`` and what moves them, and hold them."""
    for tensor, rows in family:
        state = states[tensor]
        if "mask" not in state:
            state["mask"] = torch.ones_like(tensor, dtype=torch.bool)
        where = (rows.start + index).to(tensor.device)
        for own in (state["mask"], tensor, state["momentum_buffer"]):
            own.index_fill_(0, where, 0)
