"""The images that a split names, before any was looked at: folders, list files, COCO json, VOC trees."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sp_yolo.config import DatasetConfig
from sp_yolo.data.files import image_by_stem, list_images
from sp_yolo.data.images import is_image_name
from sp_yolo.data.labels.annotation import Problems
from sp_yolo.data.labels.coco import CocoImage, read_coco
from sp_yolo.data.labels.voc import read_voc_list, voc_split
from sp_yolo.data.lists import read_list
from sp_yolo.data.pairing import LabelFinder
from sp_yolo.errors import UserError

VAL_SHARE = 10  # one image in so many is for validation where the data have no split
COCO_NAME = "_annotations.coco.json"  # Roboflow's


@dataclass
class Candidate:
    """An image of the split before it was looked at."""

    path: str
    given_id: int | str | None
    annotation: str | CocoImage  # label file, or the image's entry of a COCO file
    source: Path  # what lists it


@dataclass
class Candidates:
    """``category_ids``: class index -> id of the COCO files. ``problems``: of the COCO files, beside their images.
    ``finder``: what label files were found with."""

    images: list[Candidate] = field(default_factory=list)
    category_ids: dict[int, int] = field(default_factory=dict)
    problems: list[Problems] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finder: LabelFinder = field(default_factory=lambda: LabelFinder((".txt", ".xml")))


def list_candidates(config: DatasetConfig, split: str, *, any_class: bool = False) -> Candidates:
    """Every image of ``split`` in order.

    Raises:
        UserError: the split is absent, or an entry of it cannot be read or leads out of the data set.
    """
    suffixes = {"yolo": (".txt",), "voc": (".xml",)}.get(config.format, (".txt", ".xml"))
    found = Candidates(finder=LabelFinder(suffixes))
    for entry in config.entries(split):
        kind = _recognise(config, entry)
        if kind == "coco":
            _list_coco(config, split, _coco_file(entry), any_class, found)
        elif kind == "voc":
            _list_voc(config, entry, found)
        else:
            _list_yolo(config, entry, found)
    if config.held_out and split in ("train", "val"):
        chosen = held_out([candidate.path for candidate in found.images])
        found.images = [each for each, out in zip(found.images, chosen, strict=True) if out == (split == "val")]
    return found


def held_out(paths: Sequence[str]) -> list[bool]:
    """Which images are for validation where nobody split them: by a hash of their names, so that an image stays on its
    side when others come or go. Copies that Roboflow made of one picture (``x_jpg.rf.HASH.jpg``) stay together."""
    keys = [os.path.basename(path).partition(".rf.")[0] for path in paths]
    order = {key: hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in set(keys)}
    limit = (2**64 // VAL_SHARE).to_bytes(8, "big")
    chosen = {key for key, digest in order.items() if digest < limit}
    if len(order) > 1:
        ranked = sorted(order, key=lambda key: order[key])
        chosen = chosen or {ranked[0]}
        chosen -= {ranked[-1]}
    return [key in chosen for key in keys]


def _recognise(config: DatasetConfig, entry: str) -> str:
    """The format of one entry: as the YAML says, or by what is there."""
    path = Path(entry)
    if config.format in ("coco", "yolo"):
        return config.format
    if config.format == "voc":
        below = config.root / path
        return "yolo" if below.is_dir() and not _has_list(below) else "voc"
    if entry.endswith(".json"):
        return "coco"
    if path.suffix == ".txt" and path.parent.parent.name == "ImageSets":
        return "voc"
    if path.is_dir():
        return "coco" if (path / COCO_NAME).is_file() else "yolo"
    if not path.exists() and (path.parent / "ImageSets").is_dir() and (path.parent / "Annotations").is_dir():
        return "voc"
    return "yolo"


def _has_list(split: Path) -> bool:
    """Whether ``VOC2007/train`` is the name of a list rather than a folder."""
    return (split.parent / "ImageSets" / "Main" / f"{split.name}.txt").is_file()


def _list_yolo(config: DatasetConfig, entry: str, found: Candidates) -> None:
    """A folder (searched to any depth) or a list file, sorted as strings."""
    path = config.root / entry
    if path.is_dir():
        listing = list_images(path)
        found.notes += listing.notes()
        images, others = listing.images, f"{len(listing.others)} other files"
        if listing.hidden:
            others += f", {len(listing.hidden)} pictures in hidden or system folders"
    elif path.is_file():
        images, others = read_list(path, config.root, found.notes)
    else:
        raise UserError(f"{config.path}: no such file or folder: {path}")
    if not images:
        raise UserError(f"{path}: no image in it ({others})")
    found.images += [Candidate(name, Path(name).stem, found.finder.find(name), path) for name in images]


def _list_voc(config: DatasetConfig, entry: str, found: Candidates) -> None:
    folder, _, listed = voc_split(entry, config.root)
    images, annotations = folder / "JPEGImages", folder / "Annotations"
    if not images.is_dir() or not annotations.is_dir():
        raise UserError(f"{folder}: a VOC folder has JPEGImages and Annotations")
    present = image_by_stem(images)
    for _, name in read_voc_list(listed):
        stem = os.path.splitext(name)[0] if name not in present and is_image_name(name) else name
        picture = images / (present.get(stem) or f"{stem}.jpg")
        annotation = found.finder.in_folder(str(annotations), stem, ".xml") or f"{stem}.xml"
        found.images.append(Candidate(str(picture), stem, str(annotations / annotation), listed))


def _coco_file(entry: str) -> str:
    """``entry``, or the one annotation file of a folder.

    Raises:
        UserError: a folder with none or several.
    """
    folder = Path(entry)
    if not folder.is_dir():
        return entry
    files = sorted(folder.glob("*.json"))
    chosen = [file for file in files if file.name == COCO_NAME] or files
    if len(chosen) != 1:
        raise UserError(f"{entry}: a folder with {len(files)} json files: name the annotation file itself")
    return str(chosen[0])


def _list_coco(config: DatasetConfig, split: str, entry: str, any_class: bool, found: Candidates) -> None:
    document = read_coco(entry, config.names, any_class=any_class)
    for position, identifier in document.category_ids.items():
        found.category_ids.setdefault(position, identifier)
    found.problems.append(document.problems)
    names = [image.file_name for image in document.images]
    folder = _image_folder(config, split, document.path, names)
    once = {base for base, count in Counter(map(os.path.basename, names)).items() if count == 1}
    for image in document.images:
        path = os.path.normpath(folder / image.file_name)
        inside = Path(path).is_relative_to(os.path.normpath(folder))
        flat = os.path.basename(path)
        if flat in once and not (inside and os.path.lexists(path)) and os.path.isfile(folder / flat):
            path = str(folder / flat)  # the exporter's folders are not there
        elif not inside:
            raise UserError(f"{entry}: file_name {image.file_name!r} leads out of the image folder {folder}")
        found.images.append(Candidate(path, image.image_id, image, document.path))


def _image_folder(config: DatasetConfig, split: str, document: Path, file_names: Sequence[str]) -> Path:
    """The YAML's ``images``, or the first usual place that holds one of the first images."""
    if split in config.images:
        return config.images[split]
    year = document.stem.rpartition("_")[2]  # instances_val2017 -> val2017
    bases = (config.root, document.parent, document.parent.parent)
    folders = [base / below for base in bases for below in ("images", ".", "JPEGImages")]
    places = list(dict.fromkeys(place for folder in folders for place in (folder / split, folder / year, folder)))
    for shorten_names in (False, True):
        for place in places:
            names = [os.path.basename(name) if shorten_names else name for name in file_names[:20]]
            if any(os.path.isfile(place / name) for name in names):
                return place
    shown = file_names[0] if file_names else "(the file lists none)"
    raise UserError(f"{document}: its image {shown} is in no usual place; set 'images:' in {config.path}")
