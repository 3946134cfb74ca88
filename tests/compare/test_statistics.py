"""Student's t against closed forms, the printed table and the data of Student's own paper."""

import math

import pytest

from sp_yolo.experiments.statistics import holm, mean_interval, paired_test, student_cdf, student_quantile

# Closed forms of the distribution function for 1 to 4 degrees of freedom.
CLOSED = {
    1: lambda t: 0.5 + math.atan(t) / math.pi,
    2: lambda t: 0.5 + t / (2 * math.sqrt(2 + t * t)),
    3: lambda t: 0.5 + (t / math.sqrt(3) / (1 + t * t / 3) + math.atan(t / math.sqrt(3))) / math.pi,
    4: lambda t: 0.5 + 3 / 8 * t / math.sqrt(1 + t * t / 4) * (1 - t * t / (1 + t * t / 4) / 12),
}


@pytest.mark.parametrize("df", CLOSED)
def test_distribution_function_against_closed_forms(df: int) -> None:
    for t in (-40, -7.3, -2, -1, -0.3, -1e-4, 0, 1e-6, 0.5, 1, 1.7, 3, 12, 100):
        assert student_cdf(t, df) == pytest.approx(CLOSED[df](t), rel=1e-12, abs=1e-13)
    assert student_cdf(-math.inf, df) == 0 and student_cdf(math.inf, df) == 1
    assert math.isnan(student_cdf(math.nan, df))


# The table printed in most textbooks: p, degrees of freedom, t.
TABLE = [
    *((0.975, df, t) for df, t in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (7, 2.365))),
    *((0.975, df, t) for df, t in ((9, 2.262), (10, 2.228), (20, 2.086), (30, 2.042), (60, 2.000), (120, 1.980))),
    *((0.95, df, t) for df, t in ((1, 6.314), (4, 2.132), (9, 1.833), (30, 1.697))),
    *((0.995, df, t) for df, t in ((1, 63.657), (4, 4.604), (9, 3.250), (30, 2.750))),
    (0.9995, 4, 8.610),
    (0.6, 10, 0.260),
]


@pytest.mark.parametrize(("p", "df", "t"), TABLE)
def test_quantiles_against_the_printed_table(p: float, df: int, t: float) -> None:
    assert student_quantile(p, df) == pytest.approx(t, abs=5.1e-4)
    assert student_quantile(1 - p, df) == pytest.approx(-t, abs=5.1e-4)


def test_quantile_of_many_degrees_is_the_normal_one() -> None:
    assert student_quantile(0.975, 1e7) == pytest.approx(1.959964, abs=2e-6)
    assert student_quantile(0.5, 3) == pytest.approx(0, abs=1e-12)
    for p, df in ((0.0, 3), (1.0, 3), (0.5, 0)):
        with pytest.raises(ValueError, match="must lie in"):
            student_quantile(p, df)


def test_interval_by_hand() -> None:
    # 2, 4, 9: mean 5, squared deviations 9 + 1 + 16 = 26, standard error sqrt(26 / 2 / 3), t(2) = 4.30265
    found = mean_interval([2, 4, 9])
    assert (found.mean, found.n) == (5, 3)
    assert found.half_width == pytest.approx(4.302653 * math.sqrt(13 / 3), rel=1e-6)
    assert found.text(digits=1) == "5.0 ± 9.0" and found.text(100, 0, "+") == "+500 ± 896"
    single = mean_interval([0.25])
    assert single.mean == 0.25 and math.isnan(single.half_width) and single.text(100, 1) == "25.0"
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


# Additional hours of sleep of ten patients with two drugs: Student, The Probable Error of a Mean, Biometrika 1908.
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


def test_paired_test_on_students_sleep_data() -> None:
    # As R documents it (?sleep): t = -4.0621, df = 9, p = 0.002833, 95 % interval -2.4598858 to -0.7001142.
    found = paired_test(*SLEEP)
    assert found.difference.mean == pytest.approx(-1.58)
    assert found.difference.mean - found.difference.half_width == pytest.approx(-2.4598858, abs=1e-7)
    assert found.difference.mean + found.difference.half_width == pytest.approx(-0.7001142, abs=1e-7)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    other = paired_test(SLEEP[1], SLEEP[0])
    assert other.p == found.p and other.difference.mean == -found.difference.mean


def test_paired_test_at_its_edges() -> None:
    assert paired_test([1, 2], [1, 2]).p == 1
    always = paired_test([1.5, 2.5, 3.5], [1, 2, 3])
    assert always.p == 0 and always.difference.half_width == 0
    assert math.isnan(paired_test([1], [2]).p)
    with pytest.raises(ValueError, match="no pairs"):
        paired_test([1, 2], [1])


def test_holm_by_hand() -> None:
    # 4 * .005, 3 * .01, 2 * .03, and .04 raised to the value before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == []
    assert all(math.isnan(p) for p in holm([math.nan, 0.01]))
