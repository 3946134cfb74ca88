"""docs/deploy.md: its table is that of the committed figures, and these are within the bounds that are promised."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = (CHECKOUT / "docs" / "deploy.md").read_text(encoding="utf-8")
with open(CHECKOUT / "benchmarks" / "results" / "exports.csv", newline="", encoding="utf-8") as file:
    ROWS = {row["name"]: row for row in csv.DictReader(file)}


def test_table_and_rows_agree() -> None:
    """Cell by cell, read back from the page."""
    body = PAGE.partition("<!-- table: exports -->")[2].partition("<!-- end -->")[0]
    lines = [re.split(r"\s*\|\s*", line.strip("| ")) for line in body.strip().splitlines()[2:]]
    assert len(lines) == len(ROWS)
    for cells, row in zip(lines, ROWS.values(), strict=True):
        called = "checkpoint, PyTorch" if row["name"] == "eager" else f"`{row['format']} {row['flags']}`"
        assert cells[0] == called
        if row["map50_95"]:
            assert cells[1] == f"{float(row['map50_95']):.2f}" and row["images_per_second"] in cells
        else:
            assert cells[1] == row["note"] != ""


def test_files_measure_as_the_checkpoint_does() -> None:
    """Within 0.1 points of mAP in floating point, 1.0 in INT8."""
    eager = float(ROWS["eager"]["map50_95"])
    assert eager > 20
    measured = {name: float(row["map50_95"]) for name, row in ROWS.items() if row["map50_95"]}
    assert {"onnx", "openvino", "openvino-int8", "torchscript", "pt2"} < set(measured)
    for name, score in measured.items():
        if name == "onnx-end2end":
            continue  # one class per box, where `val` takes several
        assert abs(score - eager) <= (1.0 if name.endswith("int8") else 0.1), name


def test_the_script_would_write_this_page() -> None:
    spec = importlib.util.spec_from_file_location("exports", CHECKOUT / "benchmarks" / "exports.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["exports"] = module  # where its dataclass looks its own module up
    spec.loader.exec_module(module)
    assert module.write_page(check=True) == 0
