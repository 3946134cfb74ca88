"""Rows of raw results: written one by one, read as they were."""

from pathlib import Path

import pytest

from sp_yolo.experiments.rows import append_row, raw_rows


def test_rows_are_added_and_read(tmp_path: Path) -> None:
    path = tmp_path / "made" / "rows.csv"
    assert raw_rows(path) == []
    append_row(path, ("name", "score"), {"name": "a, b", "score": 0.5})
    append_row(path, ("name", "score"), {"name": "c"})
    assert path.read_bytes() == b'name,score\n"a, b",0.5\nc,\n'
    assert raw_rows(path) == [{"name": "a, b", "score": "0.5"}, {"name": "c", "score": ""}]
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        append_row(path, ("name", "score"), {"speed": 1})
