"""The page about several studies, number by number, from results written by hand; the figures of practice."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from sp_yolo.cli import main
from sp_yolo.errors import UserError
from sp_yolo.experiments.compare.page import (
    against_table,
    make_page,
    practice_table,
    score_table,
    spread_table,
    write_page,
)
from sp_yolo.experiments.compare.practice import epochs_to, practice, robustness
from sp_yolo.experiments.compare.study import Study, Variant, make_study

RATES = (0.01, 0.1, 1.0)
VARIANTS = [Variant(name, optimizer, {"lr0": RATES}) for name, optimizer in (("A", "sgd"), ("B", "sp"), ("C", "adamw"))]
# Scores of three seeds on two data sets.
SCORES = {
    "one": {"A": (0.50, 0.52, 0.54), "B": (0.60, 0.62, 0.64), "C": (0.10, 0.90, 0.50)},
    "two": {"A": (0.30, 0.31, 0.32), "B": (0.25, 0.265, 0.27), "C": (0.33, 0.35, 0.34)},
}


def study(name: str, **more: Any) -> Study:
    return make_study(
        name, task="classify", options={}, variants=VARIANTS, baseline="A", seeds=3, tuning_seeds=1, **more
    )


def final(name: str) -> list[dict[str, Any]]:
    found = []
    for variant, scores in SCORES[name].items():
        for seed, score in enumerate(scores):
            curve = [0.1, score - 0.05, score]
            base = {"variant": variant, "seed": seed, "trial": {"lr0": 0.1}, "failed": False, "score": score}
            found.append({**base, "val_score": score, "curve": curve, "seconds": 30.0, "optimizer_bytes": 2000000})
    return found


def tuning() -> list[dict[str, Any]]:
    scores = {"A": (0.5, 0.6, 0.55), "B": (0.1, 0.6, 0.2), "C": (0.2, 0.3, 0.9)}
    return [
        {"variant": name, "seed": 1000, "trial": {"lr0": lr0}, "score": score, "failed": False}
        for name, own in scores.items()
        for lr0, score in zip(RATES, own, strict=True)
    ]


@pytest.fixture
def page() -> Any:
    return make_page([study("one"), study("two")], [tuning(), tuning()], [final("one"), final("two")])


def test_scores_ranks_and_order(page: Any) -> None:
    # One: A 52, B 62, C 50: ranks 2, 1, 3. Two: 31, 26.17, 34: ranks 2, 3, 1. All three have mean rank 2.
    assert page.ranks.mean_ranks == (2, 2, 2)
    assert score_table(page)[2:] == [
        "| A | 52.00 ± 4.97 | 31.00 ± 2.48 | 2.00 |",
        "| B | **62.00 ± 4.97** | 26.17 ± 2.59 | 2.00 |",
        "| C | 50.00 ± 99.37 | **34.00 ± 2.48** | 2.00 |",
    ]


def test_wins_and_losses_against_the_baseline(page: Any) -> None:
    # One: B - A is 10, 10, 10: p = 0; C - A is -40, 38, -4: level. Two: B - A is -5, -4.5, -5: mean -4.83, standard
    # error 0.1667, t = -29, p of two degrees 1 - 29 / sqrt(2 + 841) = 0.00119, Holm times 2;
    # C - A is 3, 4, 2: t = 3 / (1 / sqrt 3) = 5.196, p = 1 - 5.196 / sqrt(29) = 0.0351: a win.
    rows = against_table(page)[2:]
    assert rows[0].startswith("| B | +10.00 ± 0.00 (win) | -4.83 ± 0.72 (loss) | 1 / 0 / 1 | +2.58 | ")
    assert rows[1].startswith("| C | -2.00 ± 96.98 | +3.00 ± 2.48 (win) | 1 / 1 / 0 | +0.50 | ")
    assert page.entries[1][1].p == pytest.approx(2 * (1 - 29 / math.sqrt(843)), rel=1e-6)


def test_time_to_the_score_of_the_baseline() -> None:
    figures = practice(study("one"), tuning(), final("one"))
    # The target is 0.52, the mean of A: its runs reach 0.47, 0.50 never, 0.49, 0.52 in epoch 3, 0.54 in epoch 3.
    assert (figures["A"].epochs, figures["A"].seconds, figures["A"].reached, figures["A"].runs) == (3, 30, 2, 3)
    assert (figures["B"].epochs, figures["B"].seconds, figures["B"].reached) == (2, 20, 3)
    assert figures["C"].reached == 1 and math.isinf(figures["C"].epochs)
    assert figures["B"].deviation == pytest.approx(0.02) and figures["C"].lowest == 0.1
    assert epochs_to([None, None, 0.9], 0.5) != epochs_to([None, 0.9], 0.5)  # NaN: measured once
    assert epochs_to([None, 0.4, 0.9], 0.5) == 3


def test_rates_that_keep_nine_tenths() -> None:
    variants = {variant.name: variant for variant in study("one").variants}
    # A: 0.5 is below 0.54, 0.55 above it: two of three. B: one of three. C is best at 1: 0.1 and 1 lie within a decade.
    assert [robustness(variants[name], tuning()) for name in "ABC"] == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0.5]
    assert math.isnan(robustness(variants["A"], []))


def test_tables_of_practice_and_spread(page: Any) -> None:
    rows = practice_table(page)
    assert rows[2] == "| A | 3.0 | 30 | 4 of 6 | 30.0 |  | 2.0 | 67 |"
    assert rows[4].startswith("| C | never | never | ")
    assert spread_table(page)[3] == "| B | 2.00 (60.0 to 64.0) | 1.04 (25.0 to 27.0) |"


def test_files(page: Any, tmp_path: Path) -> None:
    lines = write_page(page, tmp_path, "sp-yolo compare a b")
    assert (tmp_path / "page.md").read_text() == "\n".join([*lines, ""]) and "`sp-yolo compare a b`" in lines[2]
    assert any("chi² = 0.00, p = 1.000: the variants cannot be told apart" in line for line in lines)
    rows = list(csv.DictReader((tmp_path / "page.csv").open()))
    assert (
        len(rows) == 6 and rows[4]["outcome"] == "loss" and float(rows[4]["mean"]) == pytest.approx(0.261667, rel=1e-5)
    )
    assert (tmp_path / "ranks.png").stat().st_size > 5000


def test_studies_that_cannot_share_a_page() -> None:
    other = make_study("two", task="classify", options={}, variants=VARIANTS[:2], baseline="A", seeds=3)
    with pytest.raises(UserError, match="two and one cannot share a page: C differ"):
        make_page([study("one"), other], [tuning(), tuning()], [final("one"), final("two")])


def test_the_command_with_two_studies(tiny_npz: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"options: {{dataset: {tiny_npz}, samples: 60, epochs: 2, batch_size: 20}}\nseeds: 2\ntuning_seeds: 1\n"
    for name, epochs in (("first", 2), ("second", 3)):
        own = text.replace("epochs: 2", f"epochs: {epochs}")
        (tmp_path / f"{name}.yaml").write_text(own + "variants: {sgd: {lr0: [0.1]}, adamw: {lr0: [0.01]}}\n")
    assert main(["compare", "first.yaml", "second.yaml", "--name", "both"]) == 0
    out = capsys.readouterr().out
    assert "page in runs/compare/both: page.md" in out and "# 2 data sets, 2 variants, 2 seeds" in out
    rows = tmp_path / "runs" / "compare" / "both" / "second" / "cells.csv"
    assert main(["compare", "second.yaml", "--name", "again", "--cells", str(rows)]) == 0
    out = capsys.readouterr().out
    assert "; 4 from elsewhere" in out and "[1/" not in out
    assert main(["compare", "second.yaml", "--cells", str(tmp_path / "first.yaml")]) == 2
    assert main(["compare", "first.yaml", "first.yaml"]) == 2
    assert main(["compare", "first.yaml", "--jobs", "2", "--scheduler", "tcp://localhost:1"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
