"""The pages of results say what the raw rows say, docs/results.md is short, and their generator notices a change."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGE = CHECKOUT / "docs" / "results.md"


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Any:
    for package in ("timm", "schedulefree"):  # of the studies' optimizers
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(CHECKOUT / "docs"))
    return importlib.import_module("generate_results")


def test_every_table_is_that_of_its_rows(generator: Any) -> None:
    for page in generator.PAGES:
        text = page.read_text(encoding="utf-8")
        assert generator.filled(text) == text, "run python docs/generate_results.py"
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("\n") <= 250
    outside = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
    assert not [line for line in outside.splitlines() if line.startswith("|")]  # no table by hand


def test_a_changed_figure_is_noticed(generator: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("95.64 ± 0.17", "95.65 ± 0.17"), encoding="utf-8")
    monkeypatch.setattr(generator, "PAGES", [page])
    assert generator.main(["--check"]) == 1
    assert generator.main([]) == 0 and generator.main(["--check"]) == 0
    assert "95.64 ± 0.17" in page.read_text(encoding="utf-8")


def test_a_row_by_hand(generator: Any) -> None:
    """MNIST, 1,000, lr .01: ten seeds of mnist-1000.csv, their mean by hand."""
    rows = (CHECKOUT / "studies" / "results" / "one-sp" / "mnist-1000.csv").read_text(encoding="utf-8").splitlines()
    place = rows[0].split(",").index("test")
    values = [100 * float(row.split(",")[place]) for row in rows[1:]]
    assert f"| MNIST, 1,000, lr .01 | 10 | {sum(values) / 10:.2f} ± " in generator.new_against_old()


def test_hosts_and_speeds_by_hand(generator: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SP less the host's: 3 and 5 points, 4 +- t(1) = 12.706 times 1; times as fast: 40 / 20 and 60 / 40."""
    monkeypatch.setattr(generator, "RESULTS", tmp_path)
    assert generator.hosts() == generator.compact_speed() == "Not measured yet."
    for name in ("hosts", "compact"):
        (tmp_path / name).mkdir()
    rows = ["host,arm,seed,map50,map50_95,seconds_per_epoch"]
    rows += ["h,sgd,0,.2,.10,4", "h,sp,0,.3,.13,5", "h,sgd,1,.2,.10,6", "h,sp,1,.3,.15,5"]
    (tmp_path / "hosts" / "rows.csv").write_text("\n".join(rows), encoding="utf-8")
    assert "| h | sgd | 2 | 20.00 ± 0.00 | 10.00 ± 0.00 | +4.00 ± 12.71 | 5.0 |" in generator.hosts()
    rows = ["image_size,model,round,ms", "64,dense,0,40", "64,small,0,20", "64,dense,1,60", "64,small,1,40"]
    (tmp_path / "compact" / "speed.csv").write_text("\n".join(rows), encoding="utf-8")
    assert "| 64 px: small | 2 | 30.0 (20.0 to 40.0) | 1.75 (1.50 to 2.00) |" in generator.compact_speed()


def test_rows_of_a_study_become_the_main_table(generator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the six data sets, of which every cell has a row; a seed that one variant lacks is left out."""
    from sp_yolo.experiments.compare.store import csv_text
    from sp_yolo.experiments.compare.study import final_cells, load_study, tuning_cells

    monkeypatch.setattr(generator, "RESULTS", tmp_path)
    assert generator.TABLES["few scores"]() == "Not measured yet."
    for name in generator.FEW[:2]:
        study = load_study(str(CHECKOUT / "studies" / f"{name}.yaml"))
        rows = []
        for cell in tuning_cells(study):
            rows.append(
                _row(cell, 0.5 - 0.01 * study.variants[0].trials.index(cell.trial) if cell.variant == "SP" else 0.1)
            )
        chosen = {variant.name: variant.trials[0] for variant in study.variants}
        for cell in final_cells(study, chosen):
            place = [variant.name for variant in study.variants].index(cell.variant)
            if cell.seed < 7 or cell.variant != "Lion":
                rows.append(_row(cell, 0.4 - 0.02 * place + 0.001 * cell.seed))
        (tmp_path / name).mkdir()
        (tmp_path / name / "cells.csv").write_text(csv_text(rows), encoding="utf-8")
    table = generator.TABLES["few scores"]().splitlines()
    # Seeds 0 to 6: 0.4 + 0.003, deviation 0.00216, t(6) = 2.447: 0.20 points.
    assert table[0].split(" | ")[1:3] == list(generator.FEW[:2]) and len(table) == 2 + 9
    assert table[2] == "| SP | **40.30 ± 0.20** | **40.30 ± 0.20** | 1.00 |"
    assert table[10].startswith("| Lion | 24.30 ± 0.20 |")
    assert "0 / 0 / 2" in generator.TABLES["few against SP"]()


def _row(cell: Any, score: float) -> dict[str, Any]:
    base = {"variant": cell.variant, "key": cell.key, "trial": dict(cell.trial), "seed": cell.seed, "failed": False}
    return {**base, "measure": cell.measure, "score": score, "val_score": score, "seconds": 1.0, "curve": [score]}
