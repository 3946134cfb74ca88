"""COCO json: sparse category ids mapped to class indices, crowds kept as ignore, any kind of id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sp_yolo.data.labels.annotation import Problems, shorten
from sp_yolo.data.labels.coco_objects import CocoImage, Columns, coco_labels, key_of
from sp_yolo.data.labels.foreign import foreign_words
from sp_yolo.data.labels.json_lists import Take, read_lists
from sp_yolo.errors import UserError

__all__ = ["CocoFile", "CocoImage", "coco_labels", "read_categories", "read_coco"]

MOST_IMAGES = 5_000_000  # of one file


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
        UserError: no JSON, not of the COCO form, too large, ids that are not unique, or no category among ``names``.
        EnvironmentFault: the memory does not suffice.
    """
    path = Path(path)
    objects, images, problems = Columns(), _Images(path), Problems()
    images.objects = objects

    def take(position: int, annotation: Any) -> None:
        objects.add(str(path), annotation)
        if objects.image[position] < 0:
            problems.add(f"{path}: annotations[{position}]", *objects.faults.pop(position))

    categories = _read(path, images.take, take)
    keys = list(objects.numbers)
    used = {keys[number] for number in set(objects.category)}
    class_of, category_ids = _map_categories(path, categories, names, used, any_class)
    known = {key_of(category["id"]): category["name"] for category in categories}
    _hand_out(path, objects, images, class_of, known, problems)
    problems.notes.update(images.problems.notes)
    problems.examples |= images.problems.examples
    return CocoFile(path, list(images.by_name.values()), category_ids, problems)


def read_categories(paths: Sequence[str]) -> list[str]:
    """Class names of COCO files in the order of their ids: the categories that have annotations, or all where none has.

    Raises:
        UserError: as ``read_coco``.
    """
    names: dict[str, None] = {}
    spare: dict[str, None] = {}
    for path in paths:
        used: set[str] = set()

        def take(position: int, annotation: Any, used: set[str] = used) -> None:
            if isinstance(annotation, dict):
                used.add(key_of(annotation.get("category_id")))

        categories = _read(Path(path), lambda position, image: None, take)
        ordered = sorted(categories, key=lambda category: (len(key_of(category["id"])), key_of(category["id"])))
        names |= dict.fromkeys(category["name"] for category in ordered if key_of(category["id"]) in used)
        spare |= dict.fromkeys(category["name"] for category in ordered)
    if not names and not spare:
        raise UserError(f"{paths[0]}: no category in it")
    return list(names or spare)


class _Images:
    """The images of a file by name and by id; the same name again is the same image."""

    def __init__(self, path: Path) -> None:
        self.path, self.objects = path, Columns()
        self.by_name: dict[str, CocoImage] = {}
        self.by_key: dict[str, CocoImage] = {}
        self.problems = Problems()

    def take(self, position: int, image: Any) -> None:
        where = f"{self.path}: images[{position}]"
        if position >= MOST_IMAGES:
            raise UserError(f"{self.path}: more than {MOST_IMAGES} images: divide the file")
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise UserError(f"{where}: expected an object with a file_name, found {shorten(image)}")
        key = _checked_key(image, where)
        name = image["file_name"].replace("\\", "/")
        if key in self.by_key and self.by_key[key].file_name != name:
            raise UserError(f"{where}: image id {shorten(image['id'])} appears twice")
        if name in self.by_name:
            self.problems.note(where, "image listed twice", f"file_name {shorten(name)}: taken as one image")
        else:
            identifier = image["id"] if isinstance(image["id"], str) else int(image["id"])
            declared = (image.get("width"), image.get("height"))
            self.by_name[name] = CocoImage(name, identifier, declared, self.objects)
        self.by_key[key] = self.by_name[name]


def _hand_out(
    path: Path, objects: Columns, images: _Images, class_of: dict[str, int], known: dict[str, str], problems: Problems
) -> None:
    """Give each image the rows of its annotations; those that belong nowhere go to ``problems``."""
    keys = list(objects.numbers)
    places = {id(image): place for place, image in enumerate(images.by_name.values())}
    # what a number of Columns stands for: place of the image; class, -1 not among the names, -2 no category
    owner = np.array([places[id(images.by_key[key])] if key in images.by_key else -1 for key in keys], np.int64)
    label = np.array([class_of.get(key, -1 if key in known else -2) for key in keys], np.int64)
    image, category = (np.array(column, np.int64) for column in (objects.image, objects.category))
    owners, labels = (owner[image], label[category]) if keys else (image, category)
    faults = {
        "unknown image": (image >= 0) & (owners < 0),
        "unknown category": (owners >= 0) & (labels == -2),
        "unknown class": (owners >= 0) & (labels == -1),
    }
    told = []
    for reason, mask in faults.items():
        if mask.any():
            row = int(mask.argmax())
            image_key, key = keys[image[row]], keys[category[row]]
            detail = {
                "unknown image": f"image_id {shorten(image_key)}",
                "unknown category": f"category_id {shorten(key)}",
                "unknown class": f"{shorten(known.get(key))} is not among the names",
            }[reason]
            told.append((row, reason, detail, int(mask.sum())))
    for row, reason, detail, count in sorted(told):
        problems.add(f"{path}: annotations[{row}]", reason, detail, count)
    rows = np.flatnonzero((image >= 0) & (owners >= 0) & (labels >= 0))
    rows = rows[np.argsort(owners[rows], kind="stable")]
    edges = np.searchsorted(owners[rows], np.arange(len(places) + 1))
    for place, entry in enumerate(images.by_name.values()):
        entry.rows = rows[edges[place] : edges[place + 1]]
        entry.classes = labels[entry.rows]


def _read(path: Path, take_image: Take, take_annotation: Take) -> list[dict[str, Any]]:
    """Hand over images and annotations; returns the categories, checked in full."""
    categories: list[dict[str, Any]] = []

    def take_category(position: int, category: Any) -> None:
        where = f"{path}: categories[{position}]"
        if not isinstance(category, dict) or not isinstance(category.get("name"), str):
            raise UserError(f"{where}: expected an object with id and name")
        _checked_key(category, where)
        categories.append(category)

    takers = {"images": take_image, "annotations": take_annotation, "categories": take_category}
    try:
        found = read_lists(path, takers, "a COCO object with images, annotations and categories")
    except UserError as error:
        foreign = foreign_words(path)
        raise UserError(f"{path}: {foreign}") if foreign else error from None
    if "images" not in found and (foreign := foreign_words(path)):
        raise UserError(f"{path}: {foreign}")
    for key in takers:
        if not isinstance(found.get(key), range) and (key != "annotations" or found.get(key)):
            raise UserError(f"{path}: '{key}' is missing or no list")
    return categories


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
    for category in sorted(categories, key=lambda category: key_of(category["id"]) not in used):
        key, name = key_of(category["id"]), category["name"]
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


def _checked_key(entry: dict[str, Any], where: str) -> str:
    identifier = entry.get("id")
    whole = isinstance(identifier, int | str) or (isinstance(identifier, float) and identifier.is_integer())
    if isinstance(identifier, bool) or not whole:
        raise UserError(f"{where}: id must be a whole number or a word, found {shorten(identifier)}")
    return key_of(identifier)
