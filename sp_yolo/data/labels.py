"""Annotation files -> checked boxes. Here: the common types and YOLO txt; VOC and COCO have files of their own.

A bad row is dropped, counted by its reason and reported once per file with file:line; the image stays. With
``compat`` one bad row excludes the whole image.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sp_yolo.config.text import LABEL_BYTES, NotText, read_text
from sp_yolo.data.rows import ROUNDING, BadRow, RowRules, is_sure_polygon, parse_row

Segments = list[np.ndarray]  # one [k, 2] float32 polygon per box, [0, 2] where the box has none


@dataclass
class Problems:
    """What was wrong in one annotation file: the first place and reason in words, all of them counted.

    ``reasons``: dropped objects. ``notes``: what was odd and kept. ``examples``: the first of each reason in words.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, where: str, reason: str, detail: str, count: int = 1) -> None:
        """``where`` is file:line, ``reason`` a fixed phrase to count by, ``detail`` the value and the rule."""
        self.examples.setdefault(reason, f"{where}: {reason}: {detail}")
        self.reasons[reason] += count

    def note(self, where: str, reason: str, detail: str) -> None:
        """Something odd for which no object was dropped."""
        self.examples.setdefault(reason, f"{where}: {reason}: {detail}")
        self.notes[reason] += 1

    def __str__(self) -> str:
        """The first dropped object, or the first note where none was dropped; '' where there is nothing."""
        counter = self.reasons or self.notes
        if not counter:
            return ""
        total, first = sum(counter.values()), self.examples[next(iter(counter))]
        return f"{first} (and {total - 1} more in this file)" if total > 1 else first


MOST_OBJECTS = 100_000  # on one image; the largest aerial pictures have some 20,000
# Label files looked at, rows of each; rows from which on "all alike" means something.
FAR_OUTSIDE = "box leads out of the image"
SURVEYED, FIRST_ROWS, FEW_ROWS = 500, 1000, 2
# Last column of ``truth``: one detection on a difficult object is excused, on a crowd any number.
DIFFICULT, CROWD = 1.0, 2.0


@dataclass
class LabelFile:
    """The checked objects of one image.

    ``labels`` [n, 5] float32: class, cx, cy, w, h normalised to the image. ``segments``: normalised polygons, or None
    when no object has one. ``truth`` [m, 7] float64: class, x, y, w, h, area in px, and 0, DIFFICULT or CROWD (both are
    ignored): what evaluation sees, None when that is just ``labels``. ``unread``: why the file could not be read.
    """

    labels: np.ndarray
    segments: Segments | None = None
    truth: np.ndarray | None = None
    problems: Problems = field(default_factory=Problems)
    unread: str = ""

    def give_up(self, where: str, reason: str, detail: str, count: int) -> None:
        """The file cannot be read: the ``count`` objects that its bytes seem to hold are dropped for ``reason``."""
        self.unread = reason
        self.problems.add(where, reason, detail, count)


def empty_labels() -> np.ndarray:
    return np.zeros((0, 5), np.float32)


def too_many(count: int) -> tuple[str, str]:
    """Why a file is given up that has more than ``MOST_OBJECTS``: a log or a whole data set, which would only take the
    memory of the training."""
    return "too many objects", f"{count} on one image, at most {MOST_OBJECTS} are read"


def shorten(value: object, limit: int = 40) -> str:
    """``value`` for an error message: one line, at most ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def read_yolo(
    path: str | Path, num_classes: int, *, compat: bool = False, keypoints: int = 0, ambiguous: str = "refuse"
) -> LabelFile:
    """Read a YOLO txt file: per line ``class cx cy w h`` or ``class x1 y1 x2 y2 x3 y3 ...``, normalised.

    Whether a row is a box or a polygon is decided per line; with ``compat`` one row of more than 8 numbers makes every
    row of the file a polygon. A missing file gives no rows: a background image. ``keypoints`` and
    ``ambiguous`` as in ``RowRules``.
    """
    result = LabelFile(empty_labels())
    try:
        text = read_text(path, LABEL_BYTES)
    except FileNotFoundError:
        return result
    except (OSError, NotText) as error:
        result.give_up(str(path), "unreadable label file", fault_words(error), count_lines(path))
        return result
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line and not line.isspace()]
    if len(lines) > MOST_OBJECTS:
        result.give_up(f"{path}:{lines[MOST_OBJECTS][0]}", *too_many(len(lines)), len(lines))
        return result
    polygons = compat and any(len(line.split()) > 8 for _, line in lines)
    rules = RowRules(num_classes, keypoints, ambiguous, polygons, compat)
    labels: list[Sequence[float]] = []
    segments: Segments = []
    seen: set[tuple[float, ...]] = set()
    for number, line in lines:
        where, tokens = f"{path}:{number}", line.split()
        try:
            row = parse_row(tokens, rules)
            key = (*row.values, *row.polygon.ravel().tolist())
            if key in seen:
                raise BadRow("duplicate", "the same row stands above")
        except BadRow as bad:
            result.problems.add(where, bad.reason, bad.detail)
            continue
        if row.note:
            result.problems.note(where, row.note, f"{len(tokens)} columns")
        seen.add(key)
        labels.append(row.values)
        segments.append(row.polygon)
    if labels:
        result.labels = np.array(labels, np.float32)
        result.segments = segments if any(len(polygon) for polygon in segments) else None
    return result


def survey_rows(paths: Sequence[str | Path]) -> str:
    """What rows are that may be polygons as well as boxes with keypoints, by the company they keep in a sample of the
    label files of a data set: "polygon", "keypoints", or "refuse" where both stand side by side."""
    sure = unsure = 0
    for path in paths[:: max(len(paths) // SURVEYED, 1)]:
        try:
            text = read_text(path, LABEL_BYTES)
        except (OSError, NotText):
            continue
        for line in text.split("\n", FIRST_ROWS)[:FIRST_ROWS]:
            verdict = is_sure_polygon(line.split())
            sure, unsure = sure + (verdict is True), unsure + (verdict is False)
    if not unsure:
        return "refuse"
    return "keypoints" if not sure and unsure >= FEW_ROWS else "polygon" if sure >= 9 * unsure else "refuse"


def count_lines(path: str | Path) -> int:
    """Lines with something on them in a file that is no text; 0 where it cannot be read or is too large."""
    try:
        data = b"" if os.stat(path).st_size > LABEL_BYTES else Path(path).read_bytes()
    except OSError:
        return 0
    return sum(1 for line in data.splitlines() if line.strip(b" \t\0"))


def fault_words(error: Exception) -> str:
    """Why a file cannot be read, without its path."""
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


def far_outside(box_xyxy: Sequence[float], width: int, height: int) -> str:
    """In words where a pixel box, a part of which is in the image, leads out of it by more than a rounding error."""
    x1, y1, x2, y2 = box_xyxy
    room_x, room_y = ROUNDING * width, ROUNDING * height
    if min(x1 + room_x, y1 + room_y, width + room_x - x2, height + room_y - y2) >= 0:
        return ""
    return f"({x1:g}, {y1:g}, {x2:g}, {y2:g}) px in {width} x {height} px: only the part in the image is used"


def clip_box(box_xyxy: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """The part of a pixel box inside the image; raises BadRow where that is nothing."""
    x1, y1, x2, y2 = box_xyxy
    shown = f"({x1:g}, {y1:g}, {x2:g}, {y2:g}) px"
    if not all(map(math.isfinite, box_xyxy)):
        raise BadRow("not finite", shown)
    if x2 <= x1 or y2 <= y1:
        raise BadRow("zero area", shown)
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise BadRow("outside the image", f"{shown} in {width} x {height} px")
    return clipped
