"""The inputs rebuilt from bug reports (../shared/cases), copied to where they may be written to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sp_yolo.config import DatasetConfig, load_dataset_config
from sp_yolo.data.index import Index, scan

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "cases"
# The boxes of every picture of the cases on text forms, columns and XML.
DISC, BLOCK = ("disc", 10, 10, 40, 40), ("block", 50, 20, 90, 60)
Box = tuple[str, int, int, int, int]


def go(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a copy of case ``number`` the working directory."""
    (case,) = CASES.glob(f"{number:02d}-*")
    folder = Path(shutil.copytree(case, tmp_path / case.name))
    monkeypatch.chdir(folder)
    return folder


def boxes_of(config: DatasetConfig, index: Index) -> dict[str, list[Box]]:
    """Image name -> its boxes as (class name, x1, y1, x2, y2) in whole px."""
    found = {}
    for entry in index.entries:
        width, height = entry.size_wh
        rows = entry.labels.astype(float).tolist()
        found[Path(entry.path).stem] = [
            (
                config.names[int(label)],
                round((x - w / 2) * width),
                round((y - h / 2) * height),
                round((x + w / 2) * width),
                round((y + h / 2) * height),
            )
            for label, x, y, w, h in rows
        ]
    return found


def load(yaml: str, split: str = "train") -> tuple[DatasetConfig, Index, dict[str, list[Box]]]:
    config = load_dataset_config(yaml)
    index = scan(config, split)
    return config, index, boxes_of(config, index)
