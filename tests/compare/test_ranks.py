"""Ranks, Friedman, Nemenyi and Wilcoxon against SciPy and the worked example of Demšar (2006)."""

import itertools

import numpy as np
import pytest

from sp_yolo.experiments.ranks import chi2_tail, rank_test, ranks, wilcoxon
from sp_yolo.report.ranks import groups_alike

# Table 6 of the paper: AUC of four variants of C4.5 on 14 data sets.
DEMSAR = [
    *((0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569), (0.954, 0.971, 0.968, 0.967)),
    *((0.628, 0.661, 0.654, 0.657), (0.882, 0.888, 0.886, 0.898), (0.936, 0.931, 0.916, 0.931)),
    *((0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625), (0.775, 0.838, 0.866, 0.875)),
    *((1.000, 1.000, 1.000, 1.000), (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669)),
    *((0.972, 0.981, 0.9751, 0.975), (0.957, 0.978, 0.946, 0.970)),
]


def test_the_worked_example() -> None:
    found = rank_test(DEMSAR)
    assert found.mean_ranks == pytest.approx((3.143, 2.000, 2.893, 1.964), abs=1e-3)
    # The paper leaves the correction for equal scores out: 9.28.
    assert found.critical_difference == pytest.approx(1.25, abs=0.005)
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.friedmanchisquare(*np.array(DEMSAR).T)
    assert (found.chi2, found.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


def test_ranks_by_hand() -> None:
    assert ranks([0.5, 0.9, 0.5, 0.1]) == [2.5, 1, 2.5, 4]


@pytest.mark.parametrize("df", [1, 2, 3, 7, 8, 19])
def test_the_tail_of_chi_squared(df: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for x in (0.1, 1.0, df, 3.0 * df):
        assert chi2_tail(x, df) == pytest.approx(stats.chi2.sf(x, df), rel=1e-9)


def test_critical_differences_are_those_of_the_studentised_range() -> None:
    stats = pytest.importorskip("scipy.stats")
    for methods in (2, 5, 9, 15, 20):
        scores = np.random.default_rng(0).random((6, methods)).tolist()
        q = stats.studentized_range.ppf(0.95, methods, np.inf) / np.sqrt(2)
        expected = q * np.sqrt(methods * (methods + 1) / 36)
        assert rank_test(scores).critical_difference == pytest.approx(expected, rel=1e-3)


def test_wilcoxon() -> None:
    assert wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == 2 / 64
    assert np.isnan(wilcoxon([0.0, 0.0]))
    # With equal sizes, by trying all 16 signs: sums of positive ranks (1.5, 1.5, 3, 4) of at least 8.5: 3 of 16.
    sums = [
        sum(r * s for r, s in zip((1.5, 1.5, 3, 4), signs, strict=True))
        for signs in itertools.product((0, 1), repeat=4)
    ]
    assert wilcoxon([1.0, -1.0, 2.0, 3.0]) == 2 * sum(total >= 8.5 for total in sums) / 16
    stats = pytest.importorskip("scipy.stats")
    for seed in range(5):
        values = np.random.default_rng(seed).normal(0.3, 1, 9)
        assert wilcoxon(values.tolist()) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue, rel=1e-12)


def test_groups_that_do_not_differ() -> None:
    assert groups_alike([3.143, 2.0, 2.893, 1.964], 1.1) == [(1.964, 2.893), (2.893, 3.143)]
    assert groups_alike([1.0, 1.5, 3.0, 3.2], 1.0) == [(1.0, 1.5), (3.0, 3.2)]
    assert groups_alike([1.0, 2.0, 2.5], 1.2) == [(1.0, 2.0), (2.0, 2.5)]
    assert groups_alike([1.0, 4.0], 1.0) == []
