"""Student's t without SciPy: quantiles, confidence intervals of means, the paired test. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


def student_cdf(t: float, df: float) -> float:
    """P(T <= t) of Student's t with ``df`` degrees of freedom, by the regularised incomplete beta function."""
    if math.isnan(t):
        return math.nan
    if math.isinf(t):
        return float(t > 0)
    outside, inside = df / (df + t * t), t * t / (df + t * t)
    if inside < 0.5:  # each way keeps the digits that the other one loses
        return 0.5 + math.copysign(0.5 * _incomplete_beta(0.5, df / 2, inside, outside), t)
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, outside, inside)
    return tail if t < 0 else 1 - tail


def student_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = ``p``, 0 < p < 1, by bisection."""
    if not 0 < p < 1 or df <= 0:
        raise ValueError(f"p = {p} must lie in (0, 1), df = {df} above 0")
    if p < 0.5:
        return -student_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while student_cdf(high, df) < p:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if student_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """I_x(a, b), y = 1 - x, by its continued fraction (DLMF 8.17.22), evaluated by Lentz' method."""
    if x <= 0 or y <= 0:
        return float(y <= 0)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, the mirrored one is fast
        return 1 - _incomplete_beta(b, a, y, x)
    log_front = a * math.log(x) + b * math.log(y) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for step in range(1000):
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        value *= c * d
        if step and abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) / a * (value - 1)


@dataclass(frozen=True)
class Interval:
    """``mean`` of ``n`` values and the half-width of its 95 % confidence interval (NaN for n = 1)."""

    mean: float
    half_width: float
    n: int

    def text(self, scale: float = 1.0, digits: int = 4, sign: str = "") -> str:
        """Such as "0.9231 ± 0.0044", times ``scale``; ``sign`` "+" writes the sign of positive means too."""
        mean = f"{self.mean * scale:{sign}.{digits}f}"
        return f"{mean} ± {self.half_width * scale:.{digits}f}" if self.n > 1 else mean

    def __str__(self) -> str:
        return f"{self.text()} (95 %, n = {self.n})"


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t confidence interval of independent values.

    Raises:
        ValueError: there are none.
    """
    n = len(values)
    if not n:
        raise ValueError("no values")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan, 1)
    return Interval(mean, student_quantile((1 + LEVEL) / 2, n - 1) * _standard_error(values, mean), n)


def _standard_error(values: Sequence[float], mean: float) -> float:
    n = len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


@dataclass(frozen=True)
class PairedTest:
    """``difference``: of the means with its interval; ``p``: two-sided, of Student's paired t test (NaN for n = 1)."""

    difference: Interval
    p: float


def paired_test(values: Sequence[float], baseline: Sequence[float]) -> PairedTest:
    """Test of values[i] - baseline[i] having mean zero.

    Raises:
        ValueError: the two are not equally many.
    """
    if len(values) != len(baseline):
        raise ValueError(f"{len(values)} values, {len(baseline)} of the baseline: no pairs")
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    interval = mean_interval(differences)
    if interval.n == 1:
        return PairedTest(interval, math.nan)
    error = _standard_error(differences, interval.mean)
    if error == 0:
        return PairedTest(interval, 1.0 if interval.mean == 0 else 0.0)
    return PairedTest(interval, 2 * student_cdf(-abs(interval.mean / error), interval.n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being several (Holm, 1979); NaN where one of them is.

    Rejecting those at most 0.05 rejects a true null hypothesis in at most 5 % of all such families of tests.
    """
    if any(math.isnan(p) for p in p_values):
        return [math.nan] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
