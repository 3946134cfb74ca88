"""Results as CSV rows and back: nothing the tables need is lost, what comes from elsewhere is not run again."""

from pathlib import Path

import pytest

from sp_yolo.errors import StorageError, UserError
from sp_yolo.experiments.compare import cells as cells_module
from sp_yolo.experiments.compare.cells import run_cells
from sp_yolo.experiments.compare.report import choose, final_table
from sp_yolo.experiments.compare.store import csv_text, read_rows, take_in
from sp_yolo.experiments.compare.study import Study, final_cells, tuning_cells


def quiet(text: str) -> None:
    del text


def test_the_rows_of_another_machine_make_the_same_table(
    tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = run_cells(tuning_cells(tiny_study), tmp_path / "there", quiet)
    chosen = choose(tiny_study, tuning)
    final = run_cells(final_cells(tiny_study, chosen), tmp_path / "there", quiet)
    table = final_table(tiny_study, tuning, final)
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text(csv_text([*tuning, *final[:2]]))
    second.write_text(csv_text(final[1:]))
    assert take_in([first, second], tmp_path / "here") == len(tuning) + len(final)
    assert take_in([first], tmp_path / "here") == 0
    monkeypatch.setattr(cells_module, "run_cell", None)  # nothing is left to run
    again = run_cells(tuning_cells(tiny_study), tmp_path / "here", quiet)
    assert choose(tiny_study, again) == chosen
    assert final_table(tiny_study, again, run_cells(final_cells(tiny_study, chosen), tmp_path / "here", quiet)) == table
    for before, after in zip(tuning, again, strict=True):
        assert after["curve"] == pytest.approx(before["curve"], rel=1e-3)
        assert {k: after[k] for k in ("key", "trial", "seed", "commit", "versions")} == {
            k: before[k] for k in ("key", "trial", "seed", "commit", "versions")
        }


def test_values_of_every_kind_come_back(tmp_path: Path) -> None:
    result = {"variant": 'a, "b"', "key": "k", "seed": 3, "score": 0.123456, "failed": True, "trial": {"lr0": 0.1}}
    result |= {
        "measure": "test",
        "curve": [None, 0.5],
        "classes": {"pear": 0.25},
        "remark": "a\nb",
        "peak_bytes": 10**10,
    }
    path = tmp_path / "x.csv"
    path.write_text(csv_text([result]))
    assert read_rows(path) == [result]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "x.csv: no cells of a study: the column 'key' is missing"),
        ("key,score,variant,seed\nk,much,v,1\n", "x.csv:2: score = 'much' cannot be read"),
        ("key,score,variant,seed,failed\nk,1,v,1,yes\n", "x.csv:2: failed = 'yes' cannot be read"),
        ("key,score,variant,seed\nk,1,v,1\n,1,v,1\n", "x.csv:3: not a whole row"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert words in str(caught.value)
    with pytest.raises(StorageError, match=r"none\.csv: cannot be read"):
        read_rows(tmp_path / "none.csv")
