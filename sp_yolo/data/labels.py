"""Annotation files -> checked boxes. Here: the common types and YOLO txt; VOC and COCO have files of their own.

A bad row is dropped, counted by its reason and reported once per file with file:line; the image stays (spec data §5.2,
where one bad row excludes the whole image, is followed with ``compat``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Segments = list[np.ndarray]  # one [k, 2] float32 polygon per box, [0, 2] where the box has none


@dataclass
class Problems:
    """What was wrong in one annotation file: the first place and reason in words, all of them counted."""

    first: str = ""
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, reason: str, detail: str) -> None:
        """``where`` is file:line, ``reason`` a fixed phrase to count by, ``detail`` the value and the rule."""
        self.first = self.first or f"{where}: {reason}: {detail}"
        self.reasons[reason] += 1

    def __str__(self) -> str:
        total = sum(self.reasons.values())
        return f"{self.first} (and {total - 1} more in this file)" if total > 1 else self.first


# Last column of ``truth``: one detection on a difficult object is excused, on a crowd any number.
DIFFICULT, CROWD = 1.0, 2.0


@dataclass
class LabelFile:
    """The checked objects of one image.

    ``labels`` [n, 5] float32: class, cx, cy, w, h normalised to the image. ``segments``: normalised polygons, or None
    when no object has one. ``truth`` [m, 7] float64: class, x, y, w, h, area in px, and 0, DIFFICULT or CROWD (both are
    ignored): what evaluation sees, None when that is just ``labels``.
    """

    labels: np.ndarray
    segments: Segments | None = None
    truth: np.ndarray | None = None
    problems: Problems = field(default_factory=Problems)


def empty_labels() -> np.ndarray:
    return np.zeros((0, 5), np.float32)


def shorten(value: object, limit: int = 40) -> str:
    """``value`` for an error message: one line, at most ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def read_yolo(path: str | Path, num_classes: int, *, compat: bool = False) -> LabelFile:
    """Read a YOLO txt file: per line ``class cx cy w h`` or ``class x1 y1 x2 y2 x3 y3 ...``, normalised.

    Whether a row is a box or a polygon is decided per line; with ``compat`` one row of more than 8 numbers makes every
    row of the file a polygon (spec data §5.2). A missing file gives no rows: a background image.
    """
    result = LabelFile(empty_labels())
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return result
    except (OSError, UnicodeDecodeError) as error:
        result.problems.add(str(path), "unreadable label file", f"not text: {type(error).__name__}")
        return result
    rows = [(number, line.split()) for number, line in enumerate(text.split("\n"), 1) if line and not line.isspace()]
    shortest_polygon = 5 if compat and any(len(tokens) > 8 for _, tokens in rows) else 7
    labels: list[Sequence[float]] = []
    segments: Segments = []
    seen: set[tuple[float, ...]] = set()
    for number, tokens in rows:
        try:
            values = _parse_row(tokens, num_classes, shortest_polygon, seen)
        except BadRow as bad:
            result.problems.add(f"{path}:{number}", bad.reason, bad.detail)
            continue
        polygon = np.empty((0, 2), np.float32)
        if len(values) >= shortest_polygon:
            polygon = np.array(values[1:], np.float32).reshape(-1, 2)
            values = (values[0], *_extent(values[1::2], values[2::2]))
        labels.append(values)
        segments.append(polygon)
    if labels:
        result.labels = np.array(labels, np.float32)
        result.segments = segments if any(len(polygon) for polygon in segments) else None
    return result


class BadRow(ValueError):
    """One object cannot be used: a fixed phrase to count by, and the value with its rule."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def _parse_row(
    tokens: list[str], num_classes: int, shortest_polygon: int, seen: set[tuple[float, ...]]
) -> tuple[float, ...]:
    """The numbers of one row; ``seen`` holds the rows before it and gains this one."""
    count = len(tokens)
    if count != 5 and (count < shortest_polygon or count % 2 == 0):
        raise BadRow("wrong column count", f"{count} columns (5 for a box; 7, 9, ... for a polygon)")
    try:
        values = tuple(map(float, tokens))
    except ValueError:
        raise BadRow("not a number", shorten(" ".join(tokens))) from None
    if not all(map(math.isfinite, values)):
        raise BadRow("not finite", shorten(" ".join(tokens)))
    if values[0] != int(values[0]) or values[0] < 0:
        raise BadRow("bad class", f"{tokens[0]} is not a whole number from 0")
    if values[0] >= num_classes:
        raise BadRow("class beyond nc", f"class {int(values[0])}, but the names are 0..{num_classes - 1}")
    low, high = min(values[1:]), max(values[1:])
    if low < 0 or high > 1:
        raise BadRow("outside the image", f"{low if low < 0 else high:g} is not in [0, 1]")
    _, _, width, height = _extent(values[1::2], values[2::2]) if count >= shortest_polygon else values[1:]
    if width <= 0 or height <= 0:
        raise BadRow("zero area", f"width {width:g}, height {height:g}")
    if values in seen:
        raise BadRow("duplicate", "the same row stands above")
    seen.add(values)
    return values


def _extent(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float, float]:
    """(cx, cy, w, h) of the points."""
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


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
