"""What the readers of all formats share: the objects of an image, what was wrong in a file, the rules of pixel boxes.

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

from sp_yolo.config.text import LABEL_BYTES

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
ROUNDING = 0.01  # of the image: by so much coordinates may leave it and are cut, as rounding to pixels makes them
FAR_OUTSIDE = "box leads out of the image"
# Last column of ``truth``: one detection on a difficult object is excused, on a crowd any number.
DIFFICULT, CROWD = 1.0, 2.0


class BadRow(ValueError):
    """One object cannot be used: a fixed phrase to count by, and the value with its rule."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


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
