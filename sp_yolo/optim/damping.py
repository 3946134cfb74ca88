"""The curvature of SP: pure functions, numbered as in docs/the-method.md. Nothing here touches an optimizer's state.

Every function works on 0-dim tensors without a host synchronisation; nothing branches on a tensor's value.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A squared displacement below the smallest normal float32 carries no information about curvature.
TINY = torch.finfo(torch.float32).tiny
# Nothing beside any Ess or Esy that counts, and not 0.
SMALL = 1e-300
# Types of devices whose longest float is float32.
WITHOUT_FLOAT64 = ("mps",)
# Decay of E[g^2], the empirical Fisher diagonal.
FISHER_DECAY = 0.95
# Added to the root of E[g^2]: weights that never had a gradient.
FISHER_FLOOR = 1e-8
# The cap stands this far above the quotient that pure gradient noise produces (.81 at momentum .9, .58 at .937), but
# not above this share of the stability limit (1.36, 1.35), which matters at small momentum.
CAP_MARGIN, CAP_SHARE = 3.0, 0.8
# gamma's factor per step where the path no longer descends.
FADE = 0.95
# How far a step may move the weights, relative to their norm, without evidence that it descends.
REACH = 0.01
# Weights count as at least so large (root mean square): a network may start from zeros.
SMALLEST_WEIGHT = 1e-3


def wide_dtype(device: torch.device) -> torch.dtype:
    """Of sums and of gamma: float64, or float32 where the device has nothing longer."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


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
    return min(CAP_MARGIN * noise_quotient(momentum, nesterov), CAP_SHARE * stability_limit(momentum, nesterov))


def damped_state(
    averages: Tensor, gamma: Tensor, pair: Tensor, levels: Tensor, cap_over_lr: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Averages (Ess, Esy, Esg) [3] and gamma after a pair, eqs. (9), (10), (14), (21), on the device.

    ``pair`` [5]: s'D^{-1}s, s'y, s'g, and by how much s's exceeds each of the lengths below which a step is free (see
    ``pair_map``). ``levels``: ``gamma_levels``; ``cap_over_lr``: rcap / lr_ref. The first pair replaces the zeros;
    without displacement nothing changes, but gamma may fall. r > 0 is curvature: gamma = min(1, rcap / r, f gamma),
    f = growth where the step is free, else FADE.
    """
    zero, one, later, grown, faded, least = levels.unbind()
    accepted = pair[0] > TINY
    weight = torch.where(averages[0] > 0, later, one)
    averages = torch.lerp(averages, pair[:3], torch.where(accepted, weight, zero))
    # min(1, rcap / r) with r = lr_ref Esy / Ess where that is curvature: 1 where Esy <= 0, and without a pair.
    allowed = (
        torch.addcmul(least, averages[0], cap_over_lr)
        if isinstance(cap_over_lr, Tensor)
        else torch.add(least, averages[0], alpha=cap_over_lr)
    )
    target = allowed / torch.maximum(averages[1], allowed)
    free = torch.minimum(averages[2], pair[3:].amin()) <= 0
    factor = torch.where(accepted, torch.where(free, grown, faded), one)
    return averages, torch.minimum(target, factor * gamma)


def damped_numbers(
    averages: list[float], gamma: float, pair: list[float], rho: float, growth: float, cap_over_lr: float
) -> tuple[list[float], float]:
    """``damped_state`` in the host's numbers."""
    accepted = pair[0] > TINY
    if accepted:
        keep = rho if averages[0] > 0 else 0.0
        averages = [keep * old + (1.0 - keep) * new for old, new in zip(averages, pair, strict=False)]
    ess, esy, esg = averages
    target = min(cap_over_lr * ess / esy, 1.0) if esy > 0 else 1.0
    free = esg <= 0 or min(pair[3:]) <= 0
    factor = (growth if free else FADE) if accepted else 1.0
    return averages, min(target, factor * gamma)


def gamma_levels(rho: float, growth: float, device: torch.device) -> Tensor:
    """What ``damped_state`` chooses from. Made once: torch.where of numbers is float32 and sends them to the device."""
    dtype = wide_dtype(device)
    small = max(SMALL, torch.finfo(dtype).tiny)
    return torch.tensor([0.0, 1.0, 1.0 - rho, growth, FADE, small], dtype=dtype, device=device)


def pair_map() -> list[list[float]]:
    """[3][30]: from a tensor's weights to how its six sums enter the five numbers of ``pair``, sum by sum.

    The weights: lr_ref / lr, whether it moves, and that times its L2 decay. The sums: s'D^{-1}s, s's, <s, g_prev>,
    x'x, n, <s, g>. s'y = <s, g> - <s, g_prev> + decay s's, as the gradient is the loss's alone.
    """
    rows = [[0.0] * 30 for _ in range(3)]

    def enter(weight: int, total: int, number: int, factor: float) -> None:
        rows[weight][5 * total + number] = factor

    enter(0, 0, 0, 1.0)
    enter(1, 5, 1, 1.0)
    enter(1, 2, 1, -1.0)
    enter(2, 1, 1, 1.0)
    enter(1, 5, 2, 1.0)
    enter(1, 1, 3, 1.0)
    enter(1, 3, 3, -(REACH**2))
    enter(1, 1, 4, 1.0)
    enter(1, 4, 4, -(REACH**2) * SMALLEST_WEIGHT**2)
    return rows


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


def newest_weight(step: int | Tensor) -> float | Tensor:
    """Weight of g^2 in its running mean after ``step`` earlier ones: 1 at first, then towards 1 - FISHER_DECAY."""
    kept = FISHER_DECAY**step
    # 1 - .95 kept, on the device in one operation.
    sum_of_weights = (
        torch.rsub(kept, 1.0, alpha=FISHER_DECAY) if isinstance(kept, Tensor) else 1.0 - FISHER_DECAY * kept
    )
    return (1.0 - FISHER_DECAY) / sum_of_weights


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
