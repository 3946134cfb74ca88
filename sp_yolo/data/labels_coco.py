"""COCO json: sparse category ids mapped to class indices, crowds kept as ignore, any kind of id."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sp_yolo.config.text import read_text
from sp_yolo.data.foreign import foreign_words
from sp_yolo.data.labels import CROWD, LabelFile, Problems, Segments, clip_box, empty_labels, fault_words, shorten
from sp_yolo.data.rows import BadRow
from sp_yolo.errors import UserError


@dataclass
class CocoImage:
    """One entry of ``images`` with its annotations, not yet checked against the picture's size."""

    file_name: str
    image_id: int | str
    declared_wh: tuple[Any, Any]
    annotations: list[tuple[int, dict[str, Any], int]]  # position in the file, annotation, class index


@dataclass
class CocoFile:
    """``images`` in file order; ``category_ids``: class index -> id, for the classes the file has."""

    path: Path
    images: list[CocoImage]
    category_ids: dict[int, int]
    problems: Problems


def read_coco(path: str | Path, names: Sequence[str], *, any_class: bool = False) -> CocoFile:
    """Read a COCO instances file. Categories are matched to ``names`` by name; others are dropped and counted.

    An image that is listed again under another id (exports put together) gets the annotations of both.
    ``any_class``: every category is the one class there is.

    Raises:
        UserError: no JSON, not of the COCO form, ids that are not unique, or no category among ``names``.
    """
    path = Path(path)
    images, categories, annotations = _sections(path)
    used = {_key(row.get("category_id")) for row in annotations if isinstance(row, dict)}
    class_of, category_ids = _map_categories(path, categories, names, used, any_class)
    known = {_key(category["id"]): category["name"] for category in categories}
    by_key: dict[str, CocoImage] = {}
    by_name: dict[str, CocoImage] = {}
    problems = Problems()
    for position, image in enumerate(images):
        where = f"{path}: images[{position}]"
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise UserError(f"{where}: expected an object with a file_name, found {shorten(image)}")
        key = _checked_key(image, where)
        name = image["file_name"].replace("\\", "/")
        if key in by_key and by_key[key].file_name != name:
            raise UserError(f"{where}: image id {shorten(image['id'])} appears twice")
        declared = (image.get("width"), image.get("height"))
        if name in by_name:
            problems.note(where, "image listed twice", f"file_name {shorten(name)}: taken as one image")
        by_key[key] = by_name.setdefault(name, CocoImage(name, image["id"], declared, []))
    for position, annotation in enumerate(annotations):
        where = f"{path}: annotations[{position}]"
        if not isinstance(annotation, dict):
            problems.add(where, "malformed annotation", shorten(annotation))
            continue
        category, owner = _key(annotation.get("category_id")), by_key.get(_key(annotation.get("image_id")))
        if owner is None:
            problems.add(where, "unknown image", f"image_id {shorten(annotation.get('image_id'))}")
        elif category not in known:
            problems.add(where, "unknown category", f"category_id {shorten(annotation.get('category_id'))}")
        elif category not in class_of:
            problems.add(where, "unknown class", f"{shorten(known[category])} is not among the names")
        else:
            owner.annotations.append((position, annotation, class_of[category]))
    return CocoFile(path, list(by_name.values()), category_ids, problems)


def read_categories(paths: Sequence[str]) -> list[str]:
    """Class names of COCO files in the order of their ids: the categories that have annotations, or all where none has.

    Raises:
        UserError: as ``read_coco``.
    """
    names: dict[str, None] = {}
    spare: dict[str, None] = {}
    for path in paths:
        _, categories, annotations = _sections(Path(path))
        used = {_key(row.get("category_id")) for row in annotations if isinstance(row, dict)}
        ordered = sorted(categories, key=lambda category: (len(_key(category["id"])), _key(category["id"])))
        names |= dict.fromkeys(category["name"] for category in ordered if _key(category["id"]) in used)
        spare |= dict.fromkeys(category["name"] for category in ordered)
    if not names and not spare:
        raise UserError(f"{paths[0]}: no category in it")
    return list(names or spare)


def coco_labels(path: Path, image: CocoImage, size_wh: tuple[int, int]) -> LabelFile:
    """The checked objects of one image. Boxes are clipped for training; ``truth`` keeps box and area of the file.

    Crowds go to ``truth`` alone. A box of no area or outside the image is dropped and reported.
    """
    width, height = size_wh
    result = LabelFile(empty_labels(), truth=np.zeros((0, 7)))
    labels: dict[tuple[float, ...], None] = {}
    truth: list[tuple[float, ...]] = []
    segments: Segments = []
    for position, annotation, index in image.annotations:
        where = f"{path}: annotations[{position}]"
        try:
            x, y, w, h = _box(annotation)
            x1, y1, x2, y2 = clip_box((x, y, x + w, y + h), width, height)
            crowd = _is_crowd(annotation.get("iscrowd"))
            truth.append((index, x, y, w, h, _area(annotation.get("area"), w * h), CROWD if crowd else 0.0))
            if crowd:
                continue
            row = (index, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            if row in labels:
                raise BadRow("duplicate", "the same box stands above")
            labels[row] = None
            segments.append(_polygon(annotation.get("segmentation"), width, height))
        except BadRow as bad:
            result.problems.add(where, bad.reason, bad.detail)
    declared = image.declared_wh
    if declared not in ((None, None), (0, 0), (width, height)):
        detail = f"{shorten(declared)}, the image has {(width, height)} px; boxes kept"
        result.problems.note(f"{path}: {image.file_name}", "declared size differs", detail)
    if labels:
        result.labels = np.array(list(labels), np.float32)
        result.segments = segments if any(len(polygon) for polygon in segments) else None
    if truth:
        result.truth = np.array(truth, np.float64)
    return result


def _sections(path: Path) -> tuple[list[Any], list[dict[str, Any]], list[Any]]:
    """The three lists of a COCO file; categories are checked in full."""
    try:
        document = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:
        words = fault_words(error).splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot be read as JSON: {words[0]}") from None
    if not isinstance(document, dict) or "images" not in document:
        foreign = foreign_words(path)
        if foreign or not isinstance(document, dict):
            which = foreign or "expected a COCO object with images, annotations and categories"
            raise UserError(f"{path}: {which}")
    images, annotations, categories = (document.get(key) for key in ("images", "annotations", "categories"))
    for key, section in (("images", images), ("categories", categories), ("annotations", annotations or [])):
        if not isinstance(section, list):
            raise UserError(f"{path}: '{key}' is missing or no list")
    for position, category in enumerate(categories):  # type: ignore[arg-type]
        if not isinstance(category, dict) or not isinstance(category.get("name"), str):
            raise UserError(f"{path}: categories[{position}]: expected an object with id and name")
        _checked_key(category, f"{path}: categories[{position}]")
    return images, categories, annotations or []  # type: ignore[return-value]


def _map_categories(
    path: Path, categories: Sequence[dict[str, Any]], names: Sequence[str], used: set[str], any_class: bool
) -> tuple[dict[str, int], dict[int, int]]:
    """(category key -> class index, class index -> integer category id).

    Several categories of one name are one class; its id is that of the first that is ``used``: Roboflow writes the
    project's name as a category of its own, which may be the name of a class as well.
    """
    index_of = {name: index for index, name in enumerate(names)}
    class_of: dict[str, int] = {}
    name_of: dict[str, str] = {}
    ids: dict[int, str] = {}
    for category in sorted(categories, key=lambda category: _key(category["id"]) not in used):
        key, name = _key(category["id"]), category["name"]
        if name_of.setdefault(key, name) != name:
            raise UserError(
                f"{path}: category id {shorten(category['id'])} appears twice, as {shorten(name_of[key])} too"
            )
        index = 0 if any_class else index_of.get(name, index_of.get(name.strip()))
        if index is not None:
            class_of[key] = index
            ids.setdefault(index, key)
    if not class_of:
        found = shorten([category["name"] for category in categories], 80)
        raise UserError(f"{path}: none of its categories {found} is among the names {shorten(list(names), 80)}")
    if all(key.isdecimal() for key in ids.values()):
        return class_of, {index: int(key) for index, key in ids.items()}
    return class_of, {index: index + 1 for index in ids}


def _is_crowd(value: object) -> bool:
    """``iscrowd`` as tools write it: 0, 1, "0", "1", true, false, nothing."""
    return str(value).strip().lower() not in ("0", "0.0", "false", "none", "")


def _key(identifier: object) -> str:
    """Ids are compared as text, so that 7 and "7" are the same one."""
    return str(identifier)


def _checked_key(entry: dict[str, Any], where: str) -> str:
    identifier = entry.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, int | str):
        raise UserError(f"{where}: id must be a whole number or a word, found {shorten(identifier)}")
    return _key(identifier)


def _box(annotation: dict[str, Any]) -> tuple[float, float, float, float]:
    box = annotation.get("bbox")
    if box is None:
        raise BadRow("missing field", "an annotation without bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise BadRow("malformed annotation", f"bbox {shorten(box)} is not [x, y, width, height]")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in box):
        raise BadRow("not a number", f"bbox {shorten(box)}")
    try:
        values = tuple(map(float, box))
    except OverflowError:
        raise BadRow("not finite", f"bbox {shorten(box)}") from None
    if not all(map(math.isfinite, values)):
        raise BadRow("not finite", f"bbox {shorten(box)}")
    return values  # type: ignore[return-value]


def _area(value: object, of_box: float) -> float:
    """The file's area (of the mask, which decides small, medium or large), the box's where there is no sensible one."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12:
        return float(value)
    return of_box


def _polygon(segmentation: object, width: int, height: int) -> np.ndarray:
    """Normalised [k, 2] outline, the parts of a divided object one after the other; [0, 2] for a mask or nonsense."""
    empty = np.empty((0, 2), np.float32)
    if not isinstance(segmentation, list) or not segmentation:
        return empty
    try:
        points = np.concatenate([np.asarray(part, np.float64).reshape(-1, 2) for part in segmentation])
    except (ValueError, TypeError, OverflowError):
        return empty
    if len(points) < 3 or not np.isfinite(points).all():
        return empty
    return np.clip(points / [width, height], 0, 1).astype(np.float32)
