"""Several methods on several data sets: mean ranks, Friedman's test, Nemenyi's critical difference, Wilcoxon's test.

After Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets (JMLR 7, 2006). Pure functions, no SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Of the studentised range for infinitely many degrees of freedom at 0.05, over sqrt 2, for 2, 3, ... methods
# (table 5 of the paper up to 10).
_Q = (
    *(1.960, 2.344, 2.569, 2.728, 2.850, 2.948, 3.031, 3.102, 3.164, 3.219),
    *(3.268, 3.313, 3.354, 3.391, 3.426, 3.458, 3.489, 3.517, 3.544),
)


@dataclass(frozen=True)
class RankTest:
    """``mean_ranks``: 1 is the best. ``chi2``, ``p``: of Friedman's test. ``critical_difference``: of Nemenyi's
    at 0.05. Two methods whose mean ranks are at least that far apart differ. NaN for one data set, or over 20 methods.
    """

    mean_ranks: tuple[float, ...]
    chi2: float
    p: float
    critical_difference: float


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, 1 for the largest; equal ones share the mean of their ranks."""
    return [
        sum(other > value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def rank_test(scores: Sequence[Sequence[float]]) -> RankTest:
    """``scores[data set][method]``, the higher the better; with the correction of Friedman's test for equal scores.

    Raises:
        ValueError: no data set, or not equally many methods on each.
    """
    if not scores or len({len(row) for row in scores}) > 1:
        raise ValueError("every data set needs a score of every method")
    n, k = len(scores), len(scores[0])
    table = [ranks(row) for row in scores]
    means = tuple(math.fsum(row[method] for row in table) / n for method in range(k))
    if n < 2 or k < 2:
        return RankTest(means, math.nan, math.nan, math.nan)
    ties = sum(_ties(row) for row in scores)
    scale = 1 - ties / (n * k * (k * k - 1))
    spread = 12 * n / (k * (k + 1)) * math.fsum((mean - (k + 1) / 2) ** 2 for mean in means)
    chi2 = spread / scale if scale > 0 else 0.0
    critical = _Q[k - 2] * math.sqrt(k * (k + 1) / (6 * n)) if k - 2 < len(_Q) else math.nan
    return RankTest(means, chi2, chi2_tail(chi2, k - 1), critical)


def _ties(row: Sequence[float]) -> int:
    counts = [row.count(value) for value in set(row)] if isinstance(row, list | tuple) else []
    return sum(count**3 - count for count in counts)


def chi2_tail(x: float, df: int) -> float:
    """P(X > x) of the chi-squared distribution, by the recurrence of the incomplete gamma function (DLMF 8.8.5)."""
    if x <= 0:
        return 1.0
    half = x / 2
    if df % 2:
        tail, term = math.erfc(math.sqrt(half)), math.sqrt(half) * math.exp(-half) / math.gamma(1.5)
        start = 1.5
    else:
        tail, term, start = math.exp(-half), half * math.exp(-half), 2.0
    for step in range((df - 1) // 2):
        tail += term
        term *= half / (start + step)
    return min(tail, 1.0)


def wilcoxon(differences: Sequence[float]) -> float:
    """p of Wilcoxon's signed-rank test, two-sided and exact; differences of zero are left out. NaN for none."""
    kept = [difference for difference in differences if difference]
    if not kept:
        return math.nan
    order = ranks([-abs(difference) for difference in kept])  # the smallest has rank 1
    doubled = [round(2 * rank) for rank in order]  # whole numbers also where ranks are shared
    reached = {0: 1}  # sum of the ranks of positive differences -> in how many of the 2^n sign patterns
    for rank in doubled:
        reached = {
            total: reached.get(total, 0) + reached.get(total - rank, 0)
            for total in {*reached, *(before + rank for before in reached)}
        }
    observed = sum(rank for rank, difference in zip(doubled, kept, strict=True) if difference > 0)
    below = sum(count for total, count in reached.items() if total <= observed)
    above = sum(count for total, count in reached.items() if total >= observed)
    return min(1.0, 2 * min(below, above) / 2 ** len(doubled))
