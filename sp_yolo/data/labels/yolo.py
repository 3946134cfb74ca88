"""YOLO txt: each row is a box, a box with what detection does not use behind it, or a polygon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sp_yolo.config.text import LABEL_BYTES, NotText, read_text
from sp_yolo.data.labels.annotation import (
    MOST_OBJECTS,
    ROUNDING,
    BadRow,
    LabelFile,
    Segments,
    count_lines,
    empty_labels,
    fault_words,
    shorten,
    too_many,
)

_ROOM = 0.05  # of a box: by so much its keypoints may leave it
_SPREAD = 0.4  # of a box's sides: keypoints spread over at least so much of them
_VISIBILITY = frozenset({0.0, 1.0, 2.0})
# Label files looked at, rows of each; rows from which on "all alike" means something.
_SURVEYED, _FIRST_ROWS, _FEW_ROWS = 500, 1000, 2

CONFIDENCE, KEYPOINTS = "sixth column (confidence) not used", "keypoints behind the box not used"


@dataclass(frozen=True)
class RowRules:
    """What rows may be. ``keypoints``: columns behind the box as the YAML's kpt_shape says, 0 where it says nothing.
    ``ambiguous``: what a row is that may be a polygon as well as a box with keypoints: "polygon", "keypoints" or
    "refuse". ``polygons``: every row is one from 5 columns on (--compat)."""

    num_classes: int
    keypoints: int = 0
    ambiguous: str = "refuse"
    polygons: bool = False
    compat: bool = False


class Row(NamedTuple):
    """``values``: class, cx, cy, w, h. ``polygon``: [k, 2], [0, 2] for a box. ``note``: what of it is not used."""

    values: tuple[float, ...]
    polygon: np.ndarray
    note: str = ""


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
    for path in paths[:: max(len(paths) // _SURVEYED, 1)]:
        try:
            text = read_text(path, LABEL_BYTES)
        except (OSError, NotText):
            continue
        for line in text.split("\n", _FIRST_ROWS)[:_FIRST_ROWS]:
            verdict = is_sure_polygon(line.split())
            sure, unsure = sure + (verdict is True), unsure + (verdict is False)
    if not unsure:
        return "refuse"
    return "keypoints" if not sure and unsure >= _FEW_ROWS else "polygon" if sure >= 9 * unsure else "refuse"


def parse_row(tokens: Sequence[str], rules: RowRules) -> Row:
    """The object of one row.

    Raises:
        BadRow: it cannot be used.
    """
    try:
        numbers = tuple(map(float, tokens))
    except ValueError:
        raise BadRow("not a number", shorten(" ".join(tokens))) from None
    if not all(map(math.isfinite, numbers)):
        raise BadRow("not finite", shorten(" ".join(tokens)))
    form = _form(numbers, rules)
    if numbers[0] != int(numbers[0]) or numbers[0] < 0:
        raise BadRow("bad class", f"{tokens[0]} is not a whole number from 0")
    if numbers[0] >= rules.num_classes:
        raise BadRow("class beyond nc", f"class {int(numbers[0])}, but the names are 0..{rules.num_classes - 1}")
    used = numbers[1:] if form == "polygon" else numbers[1:5]
    low, high = min(used), max(used)
    room = 0.0 if rules.compat else ROUNDING
    if low < -room or high > 1 + room:
        pixels = " (pixels? the columns are shares of the image's width and height)" if high > 2 else ""
        raise BadRow("outside the image", f"{low if low < -room else high:g} is not in [0, 1]{pixels}")
    polygon = np.empty((0, 2), np.float32)
    if form == "polygon":
        used = tuple(min(max(value, 0.0), 1.0) for value in used)
        polygon = np.array(used, np.float32).reshape(-1, 2)
        used = _extent(used[::2], used[1::2])
    elif low < 0 or high > 1:
        used = _cut(used)
    if used[2] <= 0 or used[3] <= 0:
        raise BadRow("zero area", f"width {used[2]:g}, height {used[3]:g}")
    return Row((numbers[0], *used), polygon, form if form in (CONFIDENCE, KEYPOINTS) else "")


def is_sure_polygon(tokens: Sequence[str]) -> bool | None:
    """Whether a row is surely a polygon (True) or might as well be a box with keypoints (False); None: it is a box, or
    surely has keypoints, or is nothing."""
    try:
        numbers = tuple(map(float, tokens))
        form = _form(numbers, RowRules(1, ambiguous="ambiguous"))
    except ValueError:
        return None
    return {"polygon": True, "ambiguous": False}.get(form)


def _form(numbers: tuple[float, ...], rules: RowRules) -> str:
    """ "box", "polygon", CONFIDENCE or KEYPOINTS; raises BadRow where it is none."""
    count = len(numbers)
    if rules.compat and (count == 5 or (count > 6 and count % 2)):
        return "polygon" if count > 6 or rules.polygons else "box"
    if count == 5:
        return "box"
    if count == 6 and not rules.compat and 0 <= numbers[5] <= 1:
        return CONFIDENCE
    if rules.keypoints and count == 5 + rules.keypoints:
        return KEYPOINTS
    rest = numbers[5:]
    if count > 6 and not rules.compat and len(rest) % 3 == 0 and set(rest[2::3]) <= _VISIBILITY:
        points = [(x, y) for x, y, seen in zip(rest[::3], rest[1::3], rest[2::3], strict=True) if seen]
        if count % 2 == 0 or _inside(numbers[1:5], points, spread=0.0):
            return KEYPOINTS
    if count > 6 and count % 2:
        points = list(zip(rest[::2], rest[1::2], strict=True))
        if not _inside(numbers[1:5], points, spread=_SPREAD):
            return "polygon"
        if rules.ambiguous == "refuse":
            detail = (
                f"{count} columns: a polygon, or a box with keypoints? kpt_shape: [{len(points)}, 2] in the YAML says"
            )
            raise BadRow("polygon or keypoints", detail + " that they are keypoints")
        return KEYPOINTS if rules.ambiguous == "keypoints" else rules.ambiguous
    seven = "5 for a box; 7, 9, ... for a polygon"
    raise BadRow("wrong column count", f"{count} columns ({seven})")


def _inside(box: Sequence[float], points: Sequence[tuple[float, float]], *, spread: float) -> bool:
    """Whether these can be keypoints of this box (cx, cy, w, h): it lies in the image, they lie in it and are spread
    over more than ``spread`` of its sides. Points at 0, 0 are not labelled."""
    points = [point for point in points if point != (0.0, 0.0)]
    for axis in (0, 1):
        centre, side = box[axis], box[axis + 2]
        room = side * (0.5 + _ROOM)
        if centre - side / 2 < -ROUNDING or centre + side / 2 > 1 + ROUNDING:
            return False
        values = [point[axis] for point in points]
        if values and (min(values) < centre - room or max(values) > centre + room):
            return False
        if spread and (len(values) < 2 or max(values) - min(values) < spread * side):
            return False
    return True


def _extent(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float, float]:
    """(cx, cy, w, h) of the points."""
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _cut(box: Sequence[float]) -> tuple[float, float, float, float]:
    """The part of (cx, cy, w, h) in the image."""
    xs = [min(max(box[0] + sign * box[2] / 2, 0.0), 1.0) for sign in (-1, 1)]
    ys = [min(max(box[1] + sign * box[3] / 2, 0.0), 1.0) for sign in (-1, 1)]
    return _extent(xs, ys) if box[2] > 0 and box[3] > 0 else (box[0], box[1], box[2], box[3])
