"""Saliency, the l0 proximal operator, the sparsity schedule: pure functions, numbered as in docs/the-method.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.damping import fisher_metric

# Size of the sample that brackets the threshold; up to so many elements are sorted instead.
SAMPLE = 1 << 16
# Elements per block of the ranking, whose scratch stays in cache.
BLOCK = 1 << 18


def saliency(x: Tensor, h: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """S = 0.5 * h * x^2, eq. (5), in the metric diag(h); h = 1 (the order of magnitude) when None."""
    squared = torch.mul(x, x, out=out)
    return squared.mul_(0.5) if h is None else squared.mul_(h).mul_(0.5)


def saliency_matrix(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor | None:
    """h, the diagonal that weighs x^2 in a tensor's saliency; None: ones."""
    if group["saliency"] == "fisher":
        return state["square_avg"]  # type: ignore[no-any-return]
    return 1.0 / fisher_metric(state["square_avg"], group["momentum"]) if group["metric"] == "fisher" else None


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


def keep_masks(saliencies: Sequence[Tensor], count: int, held: int = 0) -> tuple[list[Tensor], Tensor]:
    """Masks that are False at exactly the ``count`` smallest of all saliencies together; ties by index (eqs. 6, 18).

    ``held`` of them are negative: weights that are zero already, which rank before a saliency of 0.
    Returns (bool masks shaped like the saliencies, threshold lambda as a 0-dim tensor: the largest saliency removed).
    One stable sort on an accelerator, which never asks the host, and of few values; on a CPU a sample brackets the
    threshold, so that only the percent inside the bracket is ranked (Floyd and Rivest's selection). Both are exact.
    """
    if count <= 0:
        return [torch.ones_like(s, dtype=torch.bool) for s in saliencies], saliencies[0].new_tensor(-math.inf)
    flat = [s.reshape(-1) for s in saliencies]
    n = sum(s.numel() for s in flat)
    found = None
    if n > SAMPLE and count > held and all(s.device.type == "cpu" for s in flat):
        sample = torch.cat([s[:: n // SAMPLE] for s in flat])
        blocks = (block for s in flat for block in s.split(BLOCK))
        found = keep_blocks(blocks, n, count, *bracket(sample[sample >= 0], (count - held) / (n - held)))
    keep, threshold = found or _keep_sorted(flat, count)
    parts = keep.split([s.numel() for s in flat])
    return [k.to(s.device).view(s.shape) for k, s in zip(parts, saliencies, strict=True)], threshold


def _keep_sorted(flat: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    joined = torch.cat([s.to(flat[0].device) for s in flat])
    ordered, index = torch.sort(joined, stable=True)
    return torch.ones_like(joined, dtype=torch.bool).index_fill_(0, index[:count], False), ordered[count - 1]


def bracket(sample: Tensor, share: float) -> tuple[float, float]:
    """(low, high] that most likely holds the quantile of which the ``sample`` is one.

    Four standard deviations of a random sample's rank to either side.
    """
    size = sample.numel()
    margin = 4 * math.sqrt(max(share * (1 - share), 0) * size) + 4
    first, last = math.floor(share * size - margin), math.ceil(share * size + margin)
    low, high = -math.inf, math.inf
    if first >= 1:
        # The next smaller number: many may be equal to the sample's, and the threshold among them.
        low = torch.nextafter(sample.kthvalue(first).values, sample.new_tensor(-math.inf)).item()
    if last <= size:
        high = sample.kthvalue(last).values.item()
    return low, high


def rank_inside(values: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """(bool mask, False at the ``rank`` smallest values, ties by index; the largest of those); None if there are fewer
    or ``rank`` is not positive, because the bracket missed."""
    if not 0 < rank <= values.numel():
        return None
    threshold = values.kthvalue(rank).values
    stays = values > threshold
    excess = values.numel() - int(stays.count_nonzero()) - rank
    if excess:
        # Too many are equal to the threshold: those with the largest index stay.
        stays[(values == threshold).nonzero().view(-1)[-excess:]] = True
    return stays, threshold


def keep_blocks(blocks: Iterable[Tensor], n: int, count: int, low: float, high: float) -> tuple[Tensor, Tensor] | None:
    """One mask for all ``n`` saliencies, and the threshold, ranking only (low, high]; None if the ``count``-th smallest
    is not in there. The saliencies come as rows of at most BLOCK elements, which are not kept."""
    keep, inside = torch.empty(n, dtype=torch.bool), torch.empty(BLOCK, dtype=torch.bool)
    scratch = torch.empty(2, BLOCK)
    low = max(low, -1.0)  # held weights are below any bracket
    at_most_low, offset = 0, 0
    values, places = [], []
    for block in blocks:
        scratch = scratch.to(block.dtype)
        below, place = _classify(block, low, high, keep[offset : offset + block.numel()], scratch, inside)
        at_most_low += below
        values.append(block[place])
        places.append(place + offset)
        offset += block.numel()
    ranked = rank_inside(torch.cat(values), count - at_most_low)
    if ranked is None:
        return None
    keep[torch.cat(places)] = ranked[0]
    return keep, ranked[1]


def _classify(
    values: Tensor, low: float, high: float, keep: Tensor, scratch: Tensor, inside: Tensor
) -> tuple[int, Tensor]:
    """Number of values <= low, places of those in (low, high]; ``keep`` becomes True above high and for NaN.

    Comparisons write numbers, not bools: on a CPU that is six times faster. For the same reason the few inside are
    found eight at a time.
    """
    n = values.numel()
    at_most_low, at_most_high = torch.le(values, low, out=scratch[0, :n]), torch.le(values, high, out=scratch[1, :n])
    below = int(at_most_low.sum())
    keep.copy_(at_most_high).view(torch.uint8).bitwise_xor_(1)
    inside[n : n + 8] = False
    inside[:n].copy_(at_most_high.sub_(at_most_low))
    words = inside[: -(-n // 8) * 8].view(torch.int64).nonzero()
    places = (words * 8 + torch.arange(8)).view(-1)
    return below, places[inside[places]]
