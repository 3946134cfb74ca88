"""Saliency, the l0 proximal operator and the sparsity schedule: pure functions (docs/the-method.md, eqs. 5, 6, 16-18)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Decay of E[g^2], the empirical Fisher diagonal that weighs the saliency.
FISHER_DECAY = 0.95
# Below this many elements a plain selection is faster than the bracketed one.
_SMALL = 1 << 16


def saliency(x: Tensor, h: Tensor | None = None) -> Tensor:
    """S = 0.5 * h * x^2, eq. (5), in the metric diag(h); h = 1 (the order of magnitude) when None."""
    squared = x * x
    return squared.mul_(0.5) if h is None else squared.mul_(h).mul_(0.5)


def sigma_at(step: int, sigma: float, start: float, end: float, total_steps: int | None) -> float:
    """sigma_k, eq. (17): the cubic ramp sigma * (1 - (1 - p)^3), p = (k/T - start) / (end - start), clipped to [0, 1].

    ``start == end`` is a jump at ``start``; without a run length sigma is constant.
    """
    if total_steps is None:
        return sigma
    done = step / total_steps
    if done < start:
        return 0.0
    p = 1.0 if end <= start else min((done - start) / (end - start), 1.0)
    return sigma * (1.0 - (1.0 - p) ** 3)


def prox_due(step: int, every: int, start: float, end: float, total_steps: int | None) -> bool:
    """Whether the proximal step is due after step ``step`` (counted from 0): every N steps between start and end of the
    run, and once at the end, so that the last sigma_k is sigma whatever N is. Without a run length: every N steps."""
    if total_steps is None:
        return step % every == 0
    last = math.ceil(end * total_steps)
    return step == last or (step % every == 0 and start * total_steps <= step < last)


def prune_count(sigma: float, n: int) -> int:
    """floor(sigma * n), the number of zeros among n weights."""
    return min(math.floor(sigma * n), n)


def keep_masks(saliencies: Sequence[Tensor], count: int) -> tuple[list[Tensor], Tensor]:
    """Masks that are False at exactly the ``count`` smallest of all saliencies together; ties by index (eqs. 6, 18).

    Returns (bool masks shaped like the saliencies, threshold lambda as a 0-dim tensor: the largest saliency removed).
    Without host synchronisation on an accelerator; on the CPU the selection is bracketed by a sample first.
    """
    if count <= 0:
        reference = saliencies[0]
        return [torch.ones_like(s, dtype=torch.bool) for s in saliencies], reference.new_tensor(-math.inf)
    if any(s.device.type != "cpu" for s in saliencies):
        return _keep_masks_sorted(saliencies, count)
    flat = [s.reshape(-1) for s in saliencies]
    threshold = _kth_smallest(flat, count)
    keep = [~(s <= threshold) for s in flat]  # not s > threshold: a NaN ranks last and stays
    excess = sum(k.numel() - int(k.count_nonzero()) for k in keep) - count
    for s, k in zip(reversed(flat), reversed(keep), strict=True):
        if excess <= 0:
            break
        # Too many are equal to the threshold: those with the largest index stay.
        ties = (s == threshold).nonzero().view(-1)[-excess:]
        k[ties] = True
        excess -= ties.numel()
    return [k.view(s.shape) for k, s in zip(keep, saliencies, strict=True)], threshold


def _keep_masks_sorted(saliencies: Sequence[Tensor], count: int) -> tuple[list[Tensor], Tensor]:
    """The same by one stable sort, which never asks the host."""
    device = saliencies[0].device
    joined = torch.cat([s.reshape(-1).to(device) for s in saliencies])
    ordered, index = torch.sort(joined, stable=True)
    keep = torch.ones_like(joined, dtype=torch.bool).index_fill_(0, index[:count], False)
    parts = keep.split([s.numel() for s in saliencies])
    return [k.view(s.shape).to(s.device) for k, s in zip(parts, saliencies, strict=True)], ordered[count - 1]


def _kth_smallest(flat: Sequence[Tensor], k: int) -> Tensor:
    """The k-th smallest (from 1) of all elements; exact. A sorted sample brackets it, so that only the few percent
    inside the bracket are ranked (Floyd and Rivest's selection); a bracket that misses falls back to ranking all."""
    n = sum(s.numel() for s in flat)
    if n > _SMALL:
        stride = max(n // _SMALL, 1)
        sample = torch.cat([s[::stride] for s in flat]).sort().values
        m = sample.numel()
        margin = 4 * math.isqrt(m)
        position = k * m // n
        low = sample[position - margin] if position >= margin else sample.new_tensor(-math.inf)
        high = sample[position + margin] if position + margin < m else sample.new_tensor(math.inf)
        # Many values may equal the lower end (dead weights, held zeros): they are counted, not ranked.
        below = sum(int((s < low).count_nonzero()) for s in flat)
        up_to = sum(int((s <= low).count_nonzero()) for s in flat)
        if below < k <= up_to:
            return low
        inside = torch.cat([torch.masked_select(s, (s > low) & (s <= high)) for s in flat])
        if up_to < k <= up_to + inside.numel():
            return inside.kthvalue(k - up_to).values
    return torch.cat(list(flat)).kthvalue(k).values
