"""The table of a study, number by number, from results written by hand; the command from a file to its report."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sp_yolo.cli import main
from sp_yolo.experiments.compare.report import choose, final_table, grid_table, write_report
from sp_yolo.experiments.compare.study import Study, Variant, make_study

VARIANTS = [Variant("SP", "sp", {"lr0": (0.1, 0.3, 1.0)}), Variant("sgd", "sgd", {"lr0": (0.01, 0.1, 0.3)})]


@pytest.fixture
def study() -> Study:
    return make_study("hand", task="classify", options={"epochs": 2}, variants=VARIANTS, seeds=3, tuning_seeds=2)


def result(variant: str, lr0: float, seed: int, score: float, **more: Any) -> dict[str, Any]:
    base = {
        "variant": variant,
        "optimizer": "x",
        "trial": {"lr0": lr0},
        "lr0": lr0,
        "seed": seed,
        "measure": "val",
        "failed": False,
    }
    base |= {
        "score": score,
        "val_score": score,
        "train_score": 1.0,
        "zeros": 0.5,
        "seconds": 2.0,
        "curve": [0.5, score],
        "losses": [2.0, 1.0 - score],
    }
    return {**base, "optimizer_bytes": 250000, **more}


TUNING = [
    *(result("SP", 0.1, s, v) for s, v in ((1000, 0.90), (1001, 0.80))),
    *(result("SP", 0.3, s, v) for s, v in ((1000, 0.88), (1001, 0.84))),
    *(result("SP", 1.0, s, v) for s, v in ((1000, 0.84), (1001, 0.88))),
    *(result("sgd", 0.01, s, v) for s, v in ((1000, 0.70), (1001, 0.72))),
    *(result("sgd", 0.1, s, v) for s, v in ((1000, 0.80), (1001, 0.81))),
    *(result("sgd", 0.3, s, v, failed=f, remark="r") for s, v, f in ((1000, 0.9, False), (1001, 0.1, True))),
]
FINAL = [  # seeds out of order: pairs are made by seed
    *(result("SP", 0.3, s, v) for s, v in ((2, 0.95), (0, 0.91), (1, 0.93))),
    *(result("sgd", 0.1, s, v) for s, v in ((0, 0.90), (1, 0.91), (2, 0.95))),
]


def test_the_learning_rate_has_the_best_mean_and_is_the_smaller_of_equals(study: Study) -> None:
    assert choose(study, TUNING) == {
        "SP": (("lr0", 0.3),),
        "sgd": (("lr0", 0.1),),
    }  # SP: 0.85, 0.86, 0.86; sgd: 0.71, 0.805, 0.5


def test_table_by_hand(study: Study) -> None:
    # SP: 91, 93, 95: mean 93, standard error 2 / sqrt(3), t(2) = 4.30265: 4.97
    # sgd: 90, 91, 95: mean 92, deviations 4 + 1 + 9 = 14, sqrt(14 / 2 / 3) = 1.5275: 6.57
    # differences by seed 1, 2, 0: mean 1, standard error 1 / sqrt(3): 2.48; t = 1.7320508, two degrees:
    # p = 1 - t / sqrt(2 + t^2) = 1 - 1.7320508 / 2.2360680 = 0.2254
    rows = final_table(study, TUNING, FINAL)
    assert (
        rows[2]
        == "| SP | lr0 0.3 | 93.00 ± 4.97 | +1.00 ± 2.48 | 0.225 | +7.00 ± 4.97 | 50.0 | 2.0 | 0.25 | 0 of 6 | 0 of 3 |"
    )
    assert rows[3] == "| sgd | lr0 0.1 | 92.00 ± 6.57 |  |  | +8.00 ± 6.57 | 50.0 | 2.0 | 0.25 | 1 of 6 | 0 of 3 |"
    assert len(rows) == 4 and {row.count("|") for row in rows} == {12}
    moved = [{**entry, "trial": {"lr0": 1.0}} if entry["variant"] == "SP" else entry for entry in FINAL]
    assert "| SP | lr0 1 (edge) |" in final_table(study, TUNING, moved)[2]


def test_grid_by_hand(study: Study) -> None:
    assert grid_table(study, TUNING) == [
        "| lr0 | 0.01 | 0.1 | 0.3 | 1 |",
        "| --- | --- | --- | --- | --- |",
        "| SP |  | 85.00 | **86.00** | 86.00 |",
        "| sgd | 71.00 | **80.50** | 50.00* |  |",
    ]


def test_files_of_a_report(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(study, TUNING, FINAL, tmp_path, "sp-yolo compare hand.yaml")
    text = (tmp_path / "report.md").read_text()
    assert "`sp-yolo compare hand.yaml`" in text and "commit " in text and "3 learning rates x 2 seeds" in text
    rows = list(csv.DictReader((tmp_path / "cells.csv").open()))
    assert len(rows) == len(TUNING) + len(FINAL)
    assert (rows[0]["variant"], float(rows[0]["score"]), rows[11]["failed"]) == ("SP", 0.9, "True")
    for name in ("curves.png", "losses.png", "lr.png"):
        assert (tmp_path / name).stat().st_size > 5000
    (tmp_path / "report.md").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Exception, match="plots need matplotlib"):
        write_report(study, TUNING, FINAL, tmp_path, "x")
    assert (tmp_path / "report.md").exists()


def test_command(tiny_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["compare", "--dataset", str(tiny_npz), "--epochs", "2", "--batch", "20", "--optimizers", "sp,sgd"]
    assert main([*flags, "--quick", "--seeds", "2", "--samples", "60", "--set", "momentum=0.8"]) == 0
    out = capsys.readouterr().out
    assert "compare-quick: 6 runs to tune, then 4" in out and "| sp | " in out and "momentum 0.8" in out
    folder = tmp_path / "runs" / "compare" / "compare-quick"
    assert out.split("results in ")[1].startswith(str(folder.relative_to(tmp_path)))
    assert len(list((folder / "cells").iterdir())) == 10
    chosen = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in out.splitlines() if "| s" in line[:4]}
    assert set(chosen) == {"sp", "sgd"}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    before = (folder / "report.md").read_text()
    assert main([*flags, "--quick", "--seeds", "2", "--samples", "60", "--set", "momentum=0.8"]) == 0
    out = capsys.readouterr().out
    assert "plots need matplotlib" in out and "[1/" not in out  # nothing was run again
    assert (folder / "report.md").read_text() == before


def test_command_with_a_file_and_flags_that_win(tiny_npz: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = f"options: {{dataset: {tiny_npz}, samples: 60, epochs: 9, batch_size: 20}}\nseeds: 2\ntuning_seeds: 1\n"
    (tmp_path / "s.yaml").write_text(text + "variants: {sgd: {lr0: [0.1]}, adamw: {lr0: [0.01]}}\n")
    assert main(["compare", "s.yaml", "--epochs", "1", "--name", "here", "--seeds", "3"]) == 0
    out = capsys.readouterr().out
    assert "s: 0 runs to tune, then 6; runs/compare/here" in out and "epochs 1" in out  # nothing to choose
    assert "Learning rates as given; 3 seeds" in out and "validation split" not in out
    for wrong in (["--jobs", "0"], ["--seeds", "0"], ["--optimizers", "lion"], ["--epochs", "0"]):
        assert main(["compare", "s.yaml", *wrong]) == 2
    assert main(["compare", "missing.yaml"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5 and all(line.startswith("error: ") for line in errors)


def test_curves_hold_mean_and_interval(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sp_yolo.experiments.compare import report

    drawn: dict[str, Any] = {}
    monkeypatch.setattr(report, "draw_lines", lambda path, lines, **rest: drawn.update({path.name: lines}))
    write_report(study, TUNING, FINAL, tmp_path, "x")
    x, mean, half = drawn["curves.png"]["SP"][1]
    assert (x, mean) == (2, pytest.approx(93)) and half == pytest.approx(4.302653 * 2 / np.sqrt(3), rel=1e-6)
    assert drawn["losses.png"]["SP"][0] == (1, 2.0, 0.0)
    assert drawn["losses.png"]["SP"][1][:2] == (2, pytest.approx(0.07))
    seldom = [{**r, "curve": [None, r["score"]], "losses": []} for r in FINAL]  # validated after the last epoch only
    write_report(study, TUNING, seldom, tmp_path, "x")
    assert [point[0] for point in drawn["curves.png"]["SP"]] == [2] and drawn["losses.png"]["SP"] == []
    assert drawn["lr.png"]["sgd"] == [(0.01, pytest.approx(71)), (0.1, pytest.approx(80.5)), (0.3, pytest.approx(50))]
