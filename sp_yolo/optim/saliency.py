"""Saliency, the l0 proximal operator, the sparsity schedule: pure functions, numbered as in docs/the-method.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Decay of E[g^2], the empirical Fisher diagonal that weighs the saliency.
FISHER_DECAY = 0.95
# Size of the sample that brackets the threshold; up to so many elements are ranked without a bracket.
SAMPLE = 1 << 16


def saliency(x: Tensor, h: Tensor | None = None) -> Tensor:
    """S = 0.5 * h * x^2, eq. (5), in the metric diag(h); h = 1 (the order of magnitude) when None."""
    squared = x * x
    return squared.mul_(0.5) if h is None else squared.mul_(h).mul_(0.5)


def last_prox(end: float, total_steps: int) -> int:
    """The step (counted from 0) of the last proximal step, at which sigma_k is sigma."""
    return min(math.ceil(end * total_steps), total_steps - 1)


def sigma_at(step: int, sigma: float, start: float, end: float, total_steps: int | None) -> float:
    """sigma_k, eq. (17): the cubic ramp sigma * (1 - (1 - p)^3), p = (k/T - start) / (end - start), clipped to [0, 1].

    ``start == end`` is a jump at ``start``; without a run length sigma is constant.
    """
    if total_steps is None or step >= last_prox(end, total_steps):
        return sigma
    p = max((step / total_steps - start) / (end - start), 0.0)
    return sigma * (1.0 - (1.0 - p) ** 3)


def prox_due(step: int, every: int, start: float, end: float, total_steps: int | None) -> bool:
    """Whether the proximal step is due after step ``step`` (counted from 0): every N steps between start and end of the
    run, and once at the end, so that the last sigma_k is sigma whatever N is. Without a run length: every N steps."""
    if total_steps is None:
        return step % every == 0
    last = last_prox(end, total_steps)
    return step == last or (step % every == 0 and start * total_steps <= step < last)


def prune_count(sigma: float, n: int) -> int:
    """floor(sigma * n), the number of zeros among n weights."""
    return min(math.floor(sigma * n), n)


def keep_masks(saliencies: Sequence[Tensor], count: int) -> tuple[list[Tensor], Tensor]:
    """Masks that are False at exactly the ``count`` smallest of all saliencies together; ties by index (eqs. 6, 18).

    Returns (bool masks shaped like the saliencies, threshold lambda as a 0-dim tensor: the largest saliency removed).
    One stable sort on an accelerator, which never asks the host; on a CPU a sample brackets the threshold, so that only
    the few percent inside the bracket are ranked (Floyd and Rivest's selection). Both are exact.
    """
    if count <= 0:
        return [torch.ones_like(s, dtype=torch.bool) for s in saliencies], saliencies[0].new_tensor(-math.inf)
    flat = [s.reshape(-1) for s in saliencies]
    if any(s.device.type != "cpu" for s in flat):
        keep, threshold = _keep_sorted(flat, count)
    else:
        keep, threshold = _keep_bracketed(flat, count, *_bracket(flat, count))
    return [k.view(s.shape) for k, s in zip(keep, saliencies, strict=True)], threshold


def _keep_sorted(flat: Sequence[Tensor], count: int) -> tuple[list[Tensor], Tensor]:
    joined = torch.cat([s.to(flat[0].device) for s in flat])
    ordered, index = torch.sort(joined, stable=True)
    keep = torch.ones_like(joined, dtype=torch.bool).index_fill_(0, index[:count], False)
    parts = keep.split([s.numel() for s in flat])
    return [k.to(s.device) for k, s in zip(parts, flat, strict=True)], ordered[count - 1]


def _bracket(flat: Sequence[Tensor], count: int) -> tuple[Tensor | None, Tensor | None]:
    """(low, high] that most likely holds the ``count``-th smallest, from a sorted sample; None is unbounded."""
    n = sum(s.numel() for s in flat)
    if n <= SAMPLE:
        return None, None
    sample = torch.cat([s[:: n // SAMPLE] for s in flat]).sort().values
    margin = 4 * math.isqrt(sample.numel())
    position = count * sample.numel() // n
    low = sample[position - margin] if position >= margin else None
    return low, sample[position + margin] if position + margin < sample.numel() else None


def _keep_bracketed(
    flat: Sequence[Tensor], count: int, low: Tensor | None, high: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Masks and threshold, ranking only (low, high]; all, should the ``count``-th smallest not be in there."""
    # not s <= low, instead of s > low: a NaN ranks last.
    above = [(s <= (-math.inf if low is None else low)).logical_not_() for s in flat]
    keep = [
        torch.zeros_like(a) if high is None else (s <= high).logical_not_() for a, s in zip(above, flat, strict=True)
    ]
    at_most_low = sum(a.numel() - int(a.count_nonzero()) for a in above)
    places = [(a ^ k).nonzero().view(-1) for a, k in zip(above, keep, strict=True)]
    inside = torch.cat([s[place] for s, place in zip(flat, places, strict=True)])
    rank = count - at_most_low
    if not 0 < rank <= inside.numel():
        return _keep_bracketed(flat, count, None, None)
    threshold = inside.kthvalue(rank).values
    stays = (inside <= threshold).logical_not_()
    excess = inside.numel() - int(stays.count_nonzero()) - rank
    if excess:
        # Too many are equal to the threshold: those with the largest index stay.
        stays[(inside == threshold).nonzero().view(-1)[-excess:]] = True
    for k, place, stay in zip(keep, places, stays.split([p.numel() for p in places]), strict=True):
        k[place] = stay
    return keep, threshold
