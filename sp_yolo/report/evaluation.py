"""Text, CSV, JSON, pictures and one HTML page of an evaluation."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sp_yolo.errors import EnvironmentFault, StorageError
from sp_yolo.eval.coco import EvalResult
from sp_yolo.eval.confusion import Confusion, confusion
from sp_yolo.eval.records import (
    Detections,
    DetectionSource,
    GroundTruth,
    GroundTruthSource,
    load_detections,
    load_ground_truth,
)
from sp_yolo.report.page import write_page
from sp_yolo.report.pictures import FALSE_COLOR, MISSED_COLOR, TRUTH_COLOR, Layer, draw_worst
from sp_yolo.report.plots import draw_confusion, draw_curves, draw_history

COLUMNS = ("Class", "Images", "Labels", "P", "R", "mAP@.5", "mAP@.5:.95")
WORST_IMAGES = 6
# the order of pictures on the page: first what was measured, then what was seen
PICTURES = (
    *("results.png", "PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png", "confusion_matrix.png"),
    *("channels.png", "worst_missed.jpg", "worst_false.jpg", "test_batch*.jpg", "train_batch*.jpg"),
)


def written_files(folder: Path) -> list[Path]:
    """Of a folder the pictures, the page and the table of its report, as far as they are there."""
    names = (*PICTURES, "report.html", "per_class.csv")
    return [path for name in names for path in sorted(folder.glob(name))]


def table_rows(result: EvalResult) -> list[tuple[str, int, int, float, float, float, float]]:
    """The row "all", then one row per class with labels, in the order of `COLUMNS`."""
    rows = [("all", result.images, result.labels, result.precision, result.recall, result.map50, result.map50_95)]
    counted = [c for c in result.per_class if c.labels]
    return rows + [(c.name, c.images, c.labels, c.precision, c.recall, c.ap50, c.ap) for c in counted]


def per_class_table(result: EvalResult, *, summary_only: bool = False) -> str:
    """The console table of the original: a header, the row "all" and, unless `summary_only`, one row per class."""
    rows = table_rows(result)
    if summary_only or len(result.per_class) == 1:
        rows = rows[:1]
    lines = [("%20s" + "%12s" * 6) % COLUMNS]
    return "\n".join(lines + [("%20s" + "%12i" * 2 + "%12.3g" * 4) % (row[0][:20], *row[1:]) for row in rows])


def write_table(result: EvalResult, path: str | Path) -> None:
    """Write the per-class table as CSV, figures in full precision, with AP by object size (empty: no such object).

    Raises:
        StorageError: the file cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*COLUMNS, "AP small", "AP medium", "AP large"])
    sizes = [result.stats[3:6], *(c.ap_by_size for c in result.per_class if c.labels)]
    for row, by_size in zip(table_rows(result), sizes, strict=True):
        table.writerow([*row, *("" if value < 0 else value for value in by_size)])
    _write(path, text.getvalue())


def write_report(
    directory: str | Path,
    result: EvalResult,
    ground_truth: GroundTruthSource,
    detections: DetectionSource,
    *,
    title: str,
    facts: Mapping[str, object] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    read_image: Callable[[int], np.ndarray] | None = None,
) -> list[str]:
    """Write everything about an evaluation into a directory and return the lines to tell the user.

    Files: per_class.csv, detections.json (evaluates to the same figures), confusion_matrix.png, the four curves,
    results.png (with `history`), worst_missed.jpg and worst_false.jpg (with `read_image`, where a label was missed, a
    box false), and report.html, which holds the tables and every picture of the directory in itself. Without matplotlib
    there are no plots, and a line says so.

    Args:
        facts: name -> value pairs for the page's head (weights, data, settings).
        history: the rows of metrics.jsonl.
        read_image: image id -> uint8 [H, W, 3] RGB, at the size that the ground truth's boxes refer to.

    Raises:
        StorageError: a file cannot be written.
    """
    folder = Path(directory)
    truth = load_ground_truth(ground_truth)
    found = load_detections(detections, truth)
    notes = []
    write_table(result, folder / "per_class.csv")
    if not isinstance(detections, str | Path):
        _write(folder / "detections.json", json.dumps(list(detections)))
    outcome = confusion(truth, found)
    try:
        draw_curves(result.curves, folder)
        draw_confusion(outcome, list(truth.categories.values()), folder / "confusion_matrix.png")
        if history:
            draw_history(history, folder / "results.png")
    except EnvironmentFault as missing:
        notes.append(str(missing))
    if read_image is not None:
        _draw_worst_images(folder, truth, found, outcome, read_image)
    pictures = [path for pattern in PICTURES for path in sorted(folder.glob(pattern))]
    write_page(folder / "report.html", title, result, COLUMNS, table_rows(result), facts or {}, pictures)
    return [*notes, f"report {folder / 'report.html'}"]


def _draw_worst_images(
    folder: Path, truth: GroundTruth, found: Detections, outcome: Confusion, read_image: Callable[[int], np.ndarray]
) -> None:
    names = truth.categories

    def labels_of(image_id: int, missed: Sequence[int], with_names: bool) -> list[Layer]:
        rows = np.flatnonzero((truth.image_ids == image_id) & ~truth.ignore).tolist()
        return [
            (
                _corners(truth.boxes_xywh[n]),
                MISSED_COLOR if n in missed else TRUTH_COLOR,
                names[int(truth.category_ids[n])] if with_names else "",
            )
            for n in rows
        ]

    def missed(image_id: int) -> list[Layer]:
        return labels_of(image_id, outcome.missed[image_id], True)

    def false(image_id: int) -> list[Layer]:
        return labels_of(image_id, (), False) + [
            (_corners(found.boxes_xywh[n]), FALSE_COLOR, f"{names[int(found.category_ids[n])]} {found.scores[n]:.2f}")
            for n in outcome.false[image_id]
        ]

    titles = {number: str(image.get("file_name", f"image {number}")) for number, image in truth.images.items()}
    draw_worst(_worst(outcome.missed), read_image, missed, titles, folder / "worst_missed.jpg")
    draw_worst(_worst(outcome.false), read_image, false, titles, folder / "worst_false.jpg")


def _worst(faults: Mapping[int, Sequence[int]]) -> list[int]:
    return sorted(faults, key=lambda image: (-len(faults[image]), image))[:WORST_IMAGES]


def _corners(box_xywh: np.ndarray) -> np.ndarray:
    return np.concatenate((box_xywh[:2], box_xywh[:2] + box_xywh[2:]))


def _write(path: str | Path, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None
