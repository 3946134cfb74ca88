"""The annotations of a COCO file in columns: some 60 bytes each and their outlines, not a dictionary each."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from sp_yolo.data.cache import free_memory
from sp_yolo.data.labels.annotation import (
    CROWD,
    FAR_OUTSIDE,
    MOST_OBJECTS,
    ROUNDING,
    LabelFile,
    Segments,
    empty_labels,
    far_outside,
    shorten,
    too_many,
)
from sp_yolo.errors import EnvironmentFault, UserError

MOST_ANNOTATIONS = 20_000_000  # of one file; Objects365 has 10 million
SPARE_MEMORY = 256 * 2**20  # bytes that reading leaves free
_LOOK_EVERY = 2**17  # annotations between two looks at the free memory
_DETAILED = 1000  # faulty annotations that are described; the others of a reason are counted

Fault = tuple[str, str]  # reason to count by, detail


class Columns:
    """What ``add`` took from annotations, each in its row: numbers of its image and category (as ``numbers`` has them,
    -1 in ``image`` where it is no object), box, area, crowd or not, outline in px."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}  # id as text -> number, of images and of categories
        self.image, self.category = array("i"), array("i")
        self.faults: dict[int, Fault] = {}  # row -> why it has no box
        self._box, self._area, self._crowd = array("d"), array("d"), bytearray()
        self._points, self._ends = array("f"), array("q")

    def __len__(self) -> int:
        return len(self.image)

    def add(self, path: str, annotation: Any) -> None:
        """Keep what is needed of one annotation of the file ``path``.

        Raises:
            UserError: too many. EnvironmentFault: no memory is left for more.
        """
        row = len(self.image)
        if row >= MOST_ANNOTATIONS:
            raise UserError(f"{path}: more than {MOST_ANNOTATIONS} annotations: divide the file")
        if not row % _LOOK_EVERY and free_memory() < SPARE_MEMORY:
            words = f"less than {SPARE_MEMORY // 2**20} MiB of memory are left after {row} annotations: divide the file"
            raise EnvironmentFault(f"{path}: {words}")
        entry = annotation if isinstance(annotation, dict) else {}
        self.image.append(self.number(entry.get("image_id")) if entry is annotation else -1)
        self.category.append(self.number(entry.get("category_id")))
        box, fault = _box(entry) if entry is annotation else (_NO_BOX, ("malformed annotation", shorten(annotation)))
        if fault:
            self.faults[row] = fault if len(self.faults) < _DETAILED else (fault[0], "")
        self._box.extend(box)
        self._area.append(_area(entry.get("area")))
        self._crowd.append(_is_crowd(entry.get("iscrowd")))
        if segmentation := entry.get("segmentation"):
            self._outline(segmentation)
        self._ends.append(len(self._points))

    def number(self, identifier: object) -> int:
        return self.numbers.setdefault(key_of(identifier), len(self.numbers))

    def _outline(self, segmentation: object) -> None:
        """Keep the points of polygons, one after the other; of a mask or nonsense none."""
        start = len(self._points)
        if not isinstance(segmentation, list):
            return
        try:
            for part in segmentation:
                if not part:
                    continue
                if len(part) % 2 or not isinstance(part[0], float | int):  # pairs of coordinates, or text
                    part = np.asarray(part, np.float64).reshape(-1, 2).ravel().tolist()
                self._points.extend(part)
        except (ValueError, TypeError, OverflowError, IndexError, KeyError):
            del self._points[start:]

    # What was kept, as arrays; asked for when all is read.
    @cached_property
    def box(self) -> np.ndarray:
        """[n, 4] float64 x, y, w, h px."""
        return np.frombuffer(self._box, np.float64).reshape(-1, 4) if self._box else np.zeros((0, 4))

    @cached_property
    def area(self) -> np.ndarray:
        """[n] float64 px, 0 where the file says nothing sensible."""
        return np.frombuffer(self._area, np.float64) if self._area else np.zeros(0)

    @cached_property
    def crowd(self) -> np.ndarray:
        return np.frombuffer(self._crowd, np.bool_) if self._crowd else np.zeros(0, np.bool_)

    def outlines(self, rows: np.ndarray, size: np.ndarray) -> Segments:
        """[k, 2] float32 of each row, divided by ``size`` (width, height px); [0, 2] where there is none."""
        ends = np.frombuffer(self._ends, np.int64)
        start, end = np.where(rows > 0, ends[rows - 1], 0), ends[rows]
        end = np.where(end - start < 6, start, end)
        points = np.frombuffer(self._points, np.float32) if self._points else np.zeros(0, np.float32)
        parts = [points[first:last] for first, last in zip(start.tolist(), end.tolist(), strict=True)]
        # all of an image at once: a polygon each is a handful of numbers
        joined = np.concatenate(parts).reshape(-1, 2)
        shares = np.clip(joined / size, 0, 1).astype(np.float32)
        edges = [0, *np.cumsum((end - start) // 2).tolist()]
        found = [shares[first:last] for first, last in pairwise(edges)]
        if not np.isfinite(joined).all():
            found = [each if np.isfinite(part).all() else each[:0] for each, part in zip(found, parts, strict=True)]
        return found


@dataclass
class CocoImage:
    """One entry of ``images``; ``rows`` and ``classes``: its annotations among those of the file, their class index."""

    file_name: str
    image_id: int | str
    declared_wh: tuple[Any, Any]
    objects: Columns
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def coco_labels(path: Any, image: CocoImage, size_wh: tuple[int, int]) -> LabelFile:
    """The checked objects of one image. Boxes are clipped for training; ``truth`` keeps box and area of the file.

    Crowds go to ``truth`` alone. A box of no area or outside the image is dropped and reported.
    """
    width, height = size_wh
    result = LabelFile(empty_labels(), truth=np.zeros((0, 7)))
    count = len(image.rows)
    if count > MOST_OBJECTS:
        result.give_up(f"{path}: {image.file_name}", *too_many(count), count)
    elif count:
        _fill(result, path, image, width, height)
    declared = image.declared_wh
    if declared not in ((None, None), (0, 0), (width, height)):
        detail = f"{shorten(declared)}, the image has {(width, height)} px; boxes kept"
        result.problems.note(f"{path}: {image.file_name}", "declared size differs", detail)
    return result


def _fill(result: LabelFile, path: Any, image: CocoImage, width: int, height: int) -> None:
    objects, rows = image.objects, image.rows
    box = objects.box[rows]
    first, last = box[:, :2], box[:, :2] + box[:, 2:]
    size = np.array([width, height], np.float64)
    # corners rather than sides are compared: 1e17 + 1 has no width
    with np.errstate(all="ignore"):
        flat = ~(last > first).all(1)
        low, high = np.maximum(first, 0.0), np.minimum(last, size)
        bad = flat | ~(high > low).all(1) | ~np.isfinite(np.concatenate((first, last), 1)).all(1)
        crowd = objects.crowd[rows] & ~bad
        values = np.concatenate(
            (image.classes[:, None], (low + high) / (2 * size), (high - low) / size), 1, dtype=np.float64
        )
    area = objects.area[rows]
    area = np.where(area > 0, area, box[:, 2] * box[:, 3])
    truth = np.concatenate((image.classes[:, None], box, area[:, None], np.where(crowd, CROWD, 0.0)[:, None]), 1)
    kept = np.flatnonzero(~bad & ~crowd)
    labels: dict[tuple[float, ...], int] = {}  # row -> place; the first of equal ones
    places = np.flatnonzero(bad).tolist()
    faults = {place: _fault(objects, int(rows[place]), box[place], size) for place in places}
    for place, row in zip(kept.tolist(), map(tuple, values[kept].tolist()), strict=True):
        if labels.setdefault(row, place) != place:
            faults[place] = ("duplicate", "the same box stands above")
    for place in sorted(faults):
        result.problems.add(f"{path}: annotations[{rows[place]}]", *faults[place])
    out = (np.maximum(-first, last - size) > ROUNDING * size).any(1) & ~bad
    for place in np.flatnonzero(out).tolist():
        words = far_outside([*first[place], *last[place]], int(size[0]), int(size[1]))
        corners = (box[place, 2:] > box[place, :2]).all() and (box[place, 2:] <= size).all()
        hint = "; is bbox x1, y1, x2, y2? It has to be x, y, width, height" if corners else ""
        result.problems.note(f"{path}: annotations[{rows[place]}]", FAR_OUTSIDE, words + hint)
    chosen = list(labels.values())
    if chosen:
        result.labels = values[chosen].astype(np.float32)
        segments = objects.outlines(rows[chosen], size)
        result.segments = segments if any(len(polygon) for polygon in segments) else None
    if not bad.all():
        result.truth = truth[~bad]


def _fault(objects: Columns, row: int, box: np.ndarray, size: np.ndarray) -> Fault:
    """Why a box that cannot be used cannot."""
    if row in objects.faults:
        return objects.faults[row]
    x1, y1, x2, y2 = (float(value) for value in (*box[:2], *(box[:2] + box[2:])))
    shown = f"({x1:g}, {y1:g}, {x2:g}, {y2:g}) px"
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return "not finite", shown
    if x2 <= x1 or y2 <= y1:
        return "zero area", shown
    return "outside the image", f"{shown} in {size[0]:.0f} x {size[1]:.0f} px"


_NO_BOX = (0.0, 0.0, 0.0, 0.0)


def _box(annotation: dict[str, Any]) -> tuple[Iterable[float], Fault | None]:
    """(x, y, w, h, None), or nothing and why."""
    box = annotation.get("bbox")
    if type(box) is list and len(box) == 4 and all(type(value) is float or type(value) is int for value in box):
        try:
            return tuple(map(float, box)), None
        except OverflowError:
            return _NO_BOX, ("not finite", f"bbox {shorten(box)}")
    if box is None:
        return _NO_BOX, ("missing field", "an annotation without bbox")
    if not isinstance(box, list) or len(box) != 4:
        return _NO_BOX, ("malformed annotation", f"bbox {shorten(box)} is not [x, y, width, height]")
    return _NO_BOX, ("not a number", f"bbox {shorten(box)}")


def _area(value: object) -> float:
    """The file's area (of the mask, which decides small, medium or large), 0 where it is no sensible one."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12:
        return float(value)
    return 0.0


def _is_crowd(value: object) -> bool:
    """``iscrowd`` as tools write it: 0, 1, "0", "1", true, false, nothing."""
    return value != 0 and str(value).strip().lower() not in ("0", "0.0", "false", "none", "")


def key_of(identifier: object) -> str:
    """Ids are compared as text, so that 7, "7" and the 7.0 of a table with gaps are the same one."""
    return str(int(identifier) if isinstance(identifier, float) and identifier.is_integer() else identifier)
