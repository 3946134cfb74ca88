"""The curvature of SP: pure functions, numbered as in docs/the-method.md. Nothing here touches an optimizer's state.

Every function works on 0-dim tensors without a host synchronisation; nothing branches on a tensor's value.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A squared displacement below the smallest normal float32 carries no information about curvature.
TINY = torch.finfo(torch.float32).tiny
# Added to the root of E[g^2]: weights that never had a gradient.
FISHER_FLOOR = 1e-8
# The cap stands this far above the quotient that pure gradient noise produces.
CAP_MARGIN = 1.3


def noise_quotient(momentum: float, nesterov: bool = True) -> float:
    """r0(beta), eq. (11): lr * s'y / s's when consecutive gradients are independent noise."""
    if not nesterov:
        return 1.0 - momentum**2
    return (1.0 + momentum) / ((1.0 + momentum) ** 2 + momentum**4 / (1.0 - momentum**2))


def stability_limit(momentum: float, nesterov: bool = True) -> float:
    """Largest stable lr * curvature of the momentum iteration on a quadratic, eq. (12)."""
    return 2.0 * (1.0 + momentum) / (1.0 + 2.0 * momentum if nesterov else 1.0)


def derived_cap(momentum: float, nesterov: bool = True) -> float:
    """rcap, eq. (13): just above the noise quotient, far below the stability limit."""
    return CAP_MARGIN * noise_quotient(momentum, nesterov)


def average_pair(ess: Tensor, esy: Tensor, ss: Tensor, sy: Tensor, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """Running averages of s's (in the metric of the step) and s'y, eq. (9).

    Returns (ess, esy, accepted), all 0-dim. The first accepted pair replaces the zeros instead of being averaged with
    them; a pair without displacement changes nothing.
    """
    accepted = ss > TINY
    weight = 1.0 - rho * (ess > 0).to(ess.dtype)  # torch.where of two numbers would be float32
    return (
        torch.where(accepted, torch.lerp(ess, ss, weight), ess),
        torch.where(accepted, torch.lerp(esy, sy, weight), esy),
        accepted,
    )


def rayleigh_quotient(ess: Tensor, esy: Tensor, lr_ref: float | Tensor) -> Tensor:
    """r = lr_ref * Esy / Ess, eq. (10): curvature along the trajectory in units of 1/lr; 0 before the first pair."""
    known = ess > 0
    return torch.where(known, lr_ref * esy / torch.where(known, ess, 1.0), 0.0)


def damped_gamma(gamma: Tensor, r: Tensor, cap: float, growth: float, accepted: Tensor) -> Tensor:
    """gamma = min(r <= cap ? 1 : cap / r, growth * gamma), eq. (14).

    It falls at once and rises by ``growth`` per accepted pair only: without new evidence (s = 0) it is kept. Negative
    curvature gives r <= 0 and therefore never more than 1.
    """
    target = torch.where(r > cap, cap / r, 1.0)
    return torch.minimum(target, torch.where(accepted, growth * gamma, gamma))


def normalised_square(x: Tensor) -> Tensor:
    """u = x^2 / mean(x^2), eq. (7). Scaled by max|x| first, so nothing underflows; 0 everywhere when x is 0."""
    largest = x.abs().amax()
    scaled = x / torch.where(largest > 0, largest, 1.0)
    squared = scaled * scaled
    mean = squared.mean()
    return squared / torch.where(mean > 0, mean, 1.0)


def parameter_damping(x: Tensor, r_gamma: Tensor, bounds: tuple[float, float]) -> Tensor:
    """D = B^{-1} of ``damping="diagonal"``, eq. (15): mean 1, clamped to ``bounds``; 1 for all-zero or one-element x.

    ``r_gamma`` is the 0-dim product of the current r and gamma.
    """
    if x.numel() < 2:
        return torch.ones_like(x)
    u = normalised_square(x)
    q = (u * u).mean()
    weight = (1.0 - r_gamma.clamp(0.0, 1.0)).to(u.dtype)
    inverse = 1.0 + weight * u / torch.where(q > 0, q, 1.0)
    return (inverse / inverse.mean()).clamp_(*bounds)


def fisher_damping(h: Tensor, weight: float | Tensor, momentum: float) -> Tensor:
    """D = B^{-1} of ``damping="fisher"``, eq. (19): (1 - beta) / (sqrt(h / w) + floor), h the running average of g^2.

    ``weight`` is w, the sum of the average's weights so far, so that h / w is a mean from the first step on. With the
    factor 1 - beta, by which momentum multiplies a lasting gradient, lr means what it means to AdamW.
    """
    return (1.0 - momentum) / (h / weight).sqrt_().add_(FISHER_FLOOR)


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
