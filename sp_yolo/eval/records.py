"""Ground truth and detections as arrays: read from COCO JSON or Python objects, and checked once for every metric."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sp_yolo.errors import UserError

GroundTruthSource = str | Path | Mapping[str, Any]
DetectionSource = str | Path | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class GroundTruth:
    """Checked annotations. `images` and `categories` are sorted by id; the arrays have one row per annotation."""

    images: dict[int, Mapping[str, Any]]
    categories: dict[int, str]
    image_ids: np.ndarray  # int64 [n]
    category_ids: np.ndarray  # int64 [n]
    boxes_xywh: np.ndarray  # float64 [n, 4], pixels
    areas: np.ndarray  # float64 [n], the annotation's own (a mask's) or width * height
    crowd: np.ndarray  # bool [n], a region that any number of detections may fall into
    ignore: np.ndarray  # bool [n], crowd or `ignore` or `difficult`: neither a hit nor a miss


@dataclass(frozen=True)
class Detections:
    """Checked detections, one row each, in the order given."""

    image_ids: np.ndarray  # int64 [n]
    category_ids: np.ndarray  # int64 [n]
    boxes_xywh: np.ndarray  # float64 [n, 4], pixels
    scores: np.ndarray  # float64 [n]


def load_ground_truth(source: GroundTruthSource) -> GroundTruth:
    """Read and check a COCO ground truth: a path or the dictionary itself, which is not changed.

    Annotation ids are not used, so they may be missing or doubled; `area`, `iscrowd` and `ignore` may be missing.

    Raises:
        UserError: no such file, not JSON, or an entry that breaks a rule; one line with the entry and the value.
    """
    data, where = _read(source, "ground truth")
    if not isinstance(data, Mapping) or not isinstance(data.get("images"), list):
        raise UserError(
            f"{where}: not a COCO ground truth: it must be an object with images, annotations and categories"
        )
    records, annotations = data["images"], data.get("annotations", [])
    image_ids = _integers(_column(records, "id", f"{where}: images"), f"{where}: images", "id")
    if not len(image_ids):
        raise UserError(f"{where}: images is empty: there is nothing to evaluate")
    _refuse_doubles(image_ids, f"{where}: images")
    categories = data.get("categories", [])
    category_ids = _integers(_column(categories, "id", f"{where}: categories"), f"{where}: categories", "id")
    _refuse_doubles(category_ids, f"{where}: categories")
    if not len(category_ids):
        raise UserError(f"{where}: categories is empty: there is no class to evaluate")
    names = [str(category.get("name", number)) for category, number in zip(categories, category_ids, strict=True)]
    entries = f"{where}: annotations"
    boxes = _boxes(annotations, entries)
    crowd = _flags(annotations, "iscrowd")
    truth = GroundTruth(
        images={int(i): records[n] for i, n in sorted(zip(image_ids, range(len(records)), strict=True))},
        categories=dict(sorted(zip(category_ids.tolist(), names, strict=True))),
        image_ids=_integers(_column(annotations, "image_id", entries), entries, "image_id"),
        category_ids=_integers(_column(annotations, "category_id", entries), entries, "category_id"),
        boxes_xywh=boxes,
        areas=_areas(annotations, boxes, entries),
        crowd=crowd,
        ignore=crowd | _flags(annotations, "ignore") | _flags(annotations, "difficult"),
    )
    _refuse_unknown(truth.image_ids, image_ids, f"{entries}", "image_id", "images")
    _refuse_unknown(truth.category_ids, category_ids, f"{entries}", "category_id", "categories")
    return truth


def load_detections(source: DetectionSource, truth: GroundTruth) -> Detections:
    """Read and check COCO results: a path or a list of {image_id, category_id, bbox [x, y, w, h] px, score}.

    Raises:
        UserError: no such file, not JSON, a NaN score, an id the ground truth does not know...; one line.
    """
    data, where = _read(source, "detections")
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise UserError(f"{where}: not COCO results: it must be a list of detections")
    scores = _numbers(_column(data, "score", where), where, "score")
    found = Detections(
        image_ids=_integers(_column(data, "image_id", where), where, "image_id"),
        category_ids=_integers(_column(data, "category_id", where), where, "category_id"),
        boxes_xywh=_boxes(data, where),
        scores=scores,
    )
    known = f"the ground truth's {len(truth.images)} images"
    _refuse_unknown(found.image_ids, np.array(list(truth.images)), where, "image_id", known)
    known = f"the ground truth's {len(truth.categories)} categories"
    _refuse_unknown(found.category_ids, np.array(list(truth.categories)), where, "category_id", known)
    return found


def pairs_by_image_and_class(
    truth: GroundTruth, found: Detections, labels: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per (image, class) that occurs: its indices among `labels`, and its detections by falling score."""
    for keys in _groups(
        (truth.image_ids[labels], truth.category_ids[labels]), (found.image_ids, found.category_ids), found.scores
    ):
        yield labels[keys[0]], keys[1]


def pairs_by_image(truth: GroundTruth, found: Detections) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per image that occurs: the indices of its annotations, and its detections by falling score."""
    yield from _groups((truth.image_ids,), (found.image_ids,), found.scores)


def _groups(
    label_keys: tuple[np.ndarray, ...], found_keys: tuple[np.ndarray, ...], scores: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of both sides that share a key, in one sort each: nothing is searched per group."""
    both = np.stack([np.concatenate(columns) for columns in zip(label_keys, found_keys, strict=True)])
    _, group = np.unique(both, axis=1, return_inverse=True)
    group = group.reshape(-1)
    of_label, of_found = group[: len(label_keys[0])], group[len(label_keys[0]) :]
    labels, found = np.argsort(of_label, kind="stable"), np.lexsort((-scores, of_found))
    edges = np.arange(1, group.max(initial=-1) + 1)
    label_parts = np.split(labels, np.searchsorted(of_label[labels], edges))
    yield from zip(label_parts, np.split(found, np.searchsorted(of_found[found], edges)), strict=True)


def _read(source: Any, what: str) -> tuple[Any, str]:
    """The object, and the words that name it in messages."""
    if not isinstance(source, str | Path):
        return source, what
    try:
        return json.loads(Path(source).read_bytes()), str(source)
    except FileNotFoundError:
        raise UserError(f"{source}: no such {what} file") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read as a {what} file: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{source}{line}: not a JSON file ({error})") from None


def _column(entries: Any, key: str, where: str) -> list[Any]:
    try:
        return [entry[key] for entry in entries]
    except (KeyError, TypeError, IndexError):
        for number, entry in enumerate(entries if isinstance(entries, Iterable) else ()):
            if not isinstance(entry, Mapping) or key not in entry:
                raise UserError(f"{where}[{number}]: has no {key!r}") from None
        raise UserError(f"{where}: must be a list of objects with {key!r}") from None


def _integers(values: list[Any], where: str, key: str) -> np.ndarray:
    """Ids as int64; decimal strings are read as their number, because many writers quote ids."""
    if all(type(value) is int and abs(value) < 1 << 63 for value in values):
        return np.array(values, dtype=np.int64)
    result = np.empty(len(values), dtype=np.int64)
    for number, value in enumerate(values):
        text = str(value).strip()
        if isinstance(value, float | np.floating) and float(value).is_integer():
            text = str(int(value))
        if isinstance(value, bool) or not text.removeprefix("-").isdecimal() or abs(int(text)) >= 1 << 63:
            raise UserError(
                f"{where}[{number}]: {key} {value!r} is not an integer (64 bits at most): ids are numbers, not names"
            )
        result[number] = int(text)
    return result


def _numbers(values: list[Any], where: str, key: str) -> np.ndarray:
    try:
        numbers = np.array(values, dtype=np.float64).reshape(len(values))
    except (TypeError, ValueError):
        for number, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                raise UserError(f"{where}[{number}]: {key} {value!r} is not a number") from None
        raise
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise UserError(f"{where}[{bad[0]}]: {key} {numbers[bad[0]]} is not a finite number{more}")
    return numbers


def _boxes(entries: Any, where: str) -> np.ndarray:
    values = _column(entries, "bbox", where)
    try:
        boxes = np.array(values, dtype=np.float64).reshape(len(values), 4)
    except (TypeError, ValueError):
        for number, value in enumerate(values):
            if not _is_box(value):
                raise UserError(
                    f"{where}[{number}]: bbox {value!r} is not four numbers [x, y, width, height]"
                ) from None
        raise
    bad = np.flatnonzero(~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] < 0).any(axis=1))
    if len(bad):
        rule = "must be finite [x, y, width, height] with no negative side"
        raise UserError(f"{where}[{bad[0]}]: bbox {boxes[bad[0]].tolist()} {rule}")
    return boxes


def _is_box(value: Any) -> bool:
    try:
        return np.array(value, dtype=np.float64).shape == (4,)
    except (TypeError, ValueError):
        return False


def _areas(annotations: Any, boxes_xywh: np.ndarray, where: str) -> np.ndarray:
    own = [annotation.get("area") for annotation in annotations]
    product = boxes_xywh[:, 2] * boxes_xywh[:, 3]
    return _numbers([p if a is None else a for a, p in zip(own, product, strict=True)], where, "area")


def _flags(annotations: Any, key: str) -> np.ndarray:
    return np.array([bool(annotation.get(key)) for annotation in annotations], dtype=bool)


def _refuse_doubles(ids: np.ndarray, where: str) -> None:
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        double = unique[counts > 1][0]
        first, second = np.flatnonzero(ids == double)[:2]
        raise UserError(f"{where}[{second}]: id {double} is already taken by entry {first}")


def _refuse_unknown(ids: np.ndarray, known: np.ndarray, where: str, key: str, home: str) -> None:
    bad = np.flatnonzero(~np.isin(ids, known))
    if len(bad):
        more = f" ({len(bad)} such entries)" if len(bad) > 1 else ""
        raise UserError(f"{where}[{bad[0]}]: {key} {ids[bad[0]]} is not among {home}{more}")
