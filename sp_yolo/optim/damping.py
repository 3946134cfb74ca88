"""The curvature of SP: pure functions, numbered as in docs/the-method.md. Nothing here touches an optimizer's state.

Every function works on 0-dim tensors without a host synchronisation; nothing branches on a tensor's value.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A squared displacement below the smallest normal float32 carries no information about curvature.
TINY = torch.finfo(torch.float32).tiny
# Decay of E[g^2], the empirical Fisher diagonal.
FISHER_DECAY = 0.95
# Added to the root of E[g^2]: weights that never had a gradient.
FISHER_FLOOR = 1e-8
# The cap stands this far above the quotient that pure gradient noise produces.
CAP_MARGIN = 2.0
# gamma's factor per step where the path no longer descends.
FADE = 0.95
# How far a step may move the weights, relative to their norm, without evidence that it descends.
REACH = 0.01
# Weights count as at least so large (root mean square): a network may start from zeros.
SMALLEST_WEIGHT = 1e-3


def noise_quotient(momentum: float, nesterov: bool = True) -> float:
    """r0(beta), eq. (11): lr * s'y / s's when consecutive gradients are independent noise."""
    if not nesterov:
        return 1.0 - momentum**2
    return (1.0 + momentum) / ((1.0 + momentum) ** 2 + momentum**4 / (1.0 - momentum**2))


def stability_limit(momentum: float, nesterov: bool = True) -> float:
    """Largest stable lr * curvature of the momentum iteration on a quadratic, eq. (12)."""
    return 2.0 * (1.0 + momentum) / (1.0 + 2.0 * momentum if nesterov else 1.0)


def derived_cap(momentum: float, nesterov: bool = True) -> float:
    """rcap, eq. (13): above the noise quotient, below the stability limit."""
    return CAP_MARGIN * noise_quotient(momentum, nesterov)


def rayleigh_quotient(ess: Tensor, esy: Tensor, lr_ref: float | Tensor) -> Tensor:
    """r = lr_ref * Esy / Ess, eq. (10): curvature along the trajectory in units of 1/lr; 0 before the first pair."""
    known = ess > 0
    return torch.where(known, lr_ref * esy / torch.where(known, ess, 1.0), 0.0)


def average_pair(averages: Tensor, pair: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Running averages of (s'D^{-1}s, s'y, s'g), eq. (9): both [3]; returns them and whether the pair counts.

    The first pair replaces the zeros instead of being averaged with them; one without displacement changes nothing.
    """
    accepted = pair[0] > TINY
    # Sums, not torch.where, of numbers: that would be float32.
    weight = (1.0 - rho * (averages[0] > 0).to(pair.dtype)) * accepted
    return torch.lerp(averages, pair, weight), accepted


def opening_gamma(weights: Tensor, count: int, step: Tensor) -> Tensor:
    """gamma of the first step that moves, eq. (20): it moves the weights by REACH of their norm, gamma is at most 1.

    ``weights``: sum of x^2 over ``count`` elements; ``step``: sum of the squares of the step that gamma = 1 would take.
    REACH itself where that is not finite.
    """
    gamma = (REACH**2 * weights.clamp(min=SMALLEST_WEIGHT**2 * count) / step).sqrt().clamp(max=1.0)
    return torch.where(torch.isfinite(step), gamma, REACH)


def opening_rate(momentum: float, nesterov: bool, fisher: bool) -> float:
    """Length of the first direction D d: per element in the Fisher metric (where g / sqrt(g^2) is 1), else per |g|."""
    rate = 1.0 + momentum if nesterov else 1.0
    return rate * (1.0 - momentum) if fisher else rate


def damped_gamma(gamma: Tensor, r: Tensor, cap: float, growth: float, accepted: Tensor, free: Tensor) -> Tensor:
    """gamma = min(r <= cap ? 1 : cap / r, f gamma), eq. (14); f is ``growth``, or FADE where the step is not ``free``.

    Without new evidence (s = 0) f is 1. Negative curvature gives r <= 0 and therefore never more than 1.
    """
    target = torch.where(r > cap, cap / r, 1.0)
    free, accepted = free.to(gamma.dtype), accepted.to(gamma.dtype)
    factor = 1.0 + accepted * (FADE - 1.0 + (growth - FADE) * free)
    return torch.minimum(target, factor * gamma)


def is_free(esg: Tensor, moved: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    """Whether gamma may grow, eq. (21): the averaged path still descends, or the step is within REACH of the weights.

    ``esg``: average of <s, g> with g at the end of s. ``moved``, ``weights``: s's and x'x of the last step over
    ``count`` elements.
    """
    return (esg <= 0) | (moved <= REACH**2 * torch.maximum(weights, SMALLEST_WEIGHT**2 * count))


def newest_weight(step: int | Tensor) -> float | Tensor:
    """Weight of g^2 in its running mean after ``step`` earlier ones: 1 at first, then towards 1 - FISHER_DECAY."""
    return (1.0 - FISHER_DECAY) / (1.0 - FISHER_DECAY ** (step + 1))


def fisher_metric(h: Tensor, momentum: float) -> Tensor:
    """D = B^{-1} of ``metric="fisher"``, eq. (19): (1 - beta) / (sqrt(h) + floor), h the running mean of g^2.

    With the factor 1 - beta, by which momentum multiplies a lasting gradient, lr means what it means to AdamW.
    """
    return (1.0 - momentum) / h.sqrt().add_(FISHER_FLOOR)


def normalised_square(x: Tensor) -> Tensor:
    """u = x^2 / mean(x^2), eq. (7). Scaled by max|x| first, so nothing underflows; 0 everywhere when x is 0."""
    largest = x.abs().amax()
    scaled = x / torch.where(largest > 0, largest, 1.0)
    squared = scaled * scaled
    mean = squared.mean()
    return squared / torch.where(mean > 0, mean, 1.0)


def newton_damping(s: Tensor, sy: Tensor) -> tuple[Tensor, Tensor]:
    """D = B^{-1} of ``mode="paper"``: eqs. (1)-(3) in the scale-free form (8).

    ``s`` is the displacement of one tensor and ``sy`` the 0-dim float64 product s'y. Returns (D, r). With s's > s'y,
    D = 1 + (1 - r) u / q, one Newton step from w = 0; otherwise B = r I, D = 1 / r. D = 1 and r = 0 where s = 0.
    """
    largest = s.abs().amax()
    moved = largest > 0
    scaled = s / torch.where(moved, largest, 1.0)
    # s's is formed from the scaled displacement in the accumulator's precision: s^2 itself may underflow.
    scaled_ss = (scaled * scaled).sum(dtype=sy.dtype)
    ss = scaled_ss * largest.to(sy.dtype) ** 2
    r = torch.where(moved, sy / torch.where(ss > 0, ss, 1.0), 0.0)
    u = normalised_square(s)
    q = (u * u).mean()
    newton = 1.0 + (1.0 - r).to(u.dtype) * u / torch.where(q > 0, q, 1.0)
    scalar = (1.0 / torch.where(r >= 1.0, r, 1.0)).to(u.dtype)
    return torch.where(r < 1.0, newton, scalar), r
