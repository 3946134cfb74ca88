"""A dataset description -> the list of its usable images with checked labels, in any of the three formats.

Nothing is cached between runs: headers and text files are read in well under 0.1 ms each, so there is no cache to go
stale (the original's label cache does, spec data §5.3).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sp_yolo.config import DatasetConfig
from sp_yolo.data.images import ImageFault, is_image_name, read_size
from sp_yolo.data.labels import LabelFile, Problems, Segments, read_yolo, shorten
from sp_yolo.data.labels_coco import CocoImage, coco_labels, read_coco
from sp_yolo.data.labels_voc import read_voc, read_voc_list, voc_split
from sp_yolo.errors import UserError


@dataclass
class Entry:
    """One usable image: ``labels``, ``segments`` and ``truth`` as in ``LabelFile``; ``size_wh`` in px, upright."""

    path: str
    image_id: int
    size_wh: tuple[int, int]
    labels: np.ndarray
    segments: Segments | None
    truth: np.ndarray | None


@dataclass
class Index:
    """The images of a split in order, what was wrong with the rest, and the ids that evaluation uses.

    ``warnings``: one line per file (missing images share one). ``counts``: images, boxes, ignored, background,
    missing images, broken images, and every reason for a dropped row.
    """

    entries: list[Entry]
    category_ids: list[int]
    warnings: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class _Candidate:
    """An image of the split before it was looked at."""

    path: str
    given_id: int | str | None
    annotation: str | CocoImage  # label file, or the image's entry of a COCO file
    source: Path  # what lists it


def scan(config: DatasetConfig, split: str, *, single_class: bool = False, compat: bool = False) -> Index:
    """List and check every image of ``split`` ("train", "val" or "test").

    Broken images and rows are left out, counted and put into words in ``warnings``. With ``compat`` an image with any
    bad row is left out as a whole, as the original does.

    Raises:
        UserError: the split is absent or has no usable image; a training split without a single box.
    """
    names = config.names
    index = Index([], [])
    category_ids: dict[int, int] = {}
    candidates: list[_Candidate] = []
    for entry in config.entries(split):
        kind = _recognise(config, entry)
        if kind == "coco":
            candidates += _list_coco(config, split, entry, category_ids, index)
        elif kind == "voc":
            candidates += _list_voc(config, entry)
        else:
            candidates += _list_yolo(config, entry)
    class_index = {name: position for position, name in enumerate(names)}
    missing: list[str] = []
    kept: list[_Candidate] = []
    for candidate in candidates:
        try:
            size_wh = read_size(candidate.path)
        except ImageFault as fault:
            if os.path.lexists(candidate.path):
                index.counts["broken images"] += 1
                index.warnings.append(f"{candidate.path}: {fault}: image skipped")
            else:
                missing.append(candidate.path)
            continue
        found = _read_labels(candidate, class_index, size_wh, compat)
        _report(index, found.problems)
        if compat and found.problems.reasons:
            index.counts["broken images"] += 1
            continue
        _append(index, candidate, size_wh, found, single_class)
        kept.append(candidate)
    if missing:
        index.counts["missing images"] = len(missing)
        index.warnings.append(f"{config.path}: {split}: {len(missing)} images do not exist, the first is {missing[0]}")
    _require_content(config, split, index, bool(candidates))
    for one, image_id in zip(index.entries, _unique_ids(kept), strict=True):
        one.image_id = image_id
    index.category_ids = [1] if single_class else _complete_ids(category_ids, len(names))
    return index


def _recognise(config: DatasetConfig, entry: str) -> str:
    """The format of one entry: as the YAML says, or by what is there."""
    if config.format != "auto":
        return config.format
    if entry.endswith(".json"):
        return "coco"
    path = Path(entry)
    if path.suffix == ".txt" and path.parent.parent.name == "ImageSets":
        return "voc"
    if not path.exists() and (path.parent / "ImageSets").is_dir() and (path.parent / "Annotations").is_dir():
        return "voc"
    return "yolo"


def _list_yolo(config: DatasetConfig, entry: str) -> list[_Candidate]:
    """A folder (searched to any depth) or a list file, sorted as strings (spec data §5.1)."""
    path = Path(entry)
    if path.is_dir():
        found = [os.path.join(folder, name) for folder, _, files in os.walk(path, followlinks=True) for name in files]
    elif path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: expected one image path per line: {error}") from None
        found = [
            _listed_path(line.strip(), f"{path}:{number}", path.parent, config.root)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    else:
        raise UserError(f"{config.path}: no such file or folder: {path}")
    images = sorted(name for name in found if is_image_name(name))
    if not images:
        raise UserError(f"{path}: no image in it ({len(found)} other files)")
    return [_Candidate(name, Path(name).stem, _label_path(name), path) for name in images]


def _listed_path(line: str, where: str, folder: Path, root: Path) -> str:
    """``./x`` is relative to the list file's folder; other relative paths start at the working directory, else at the
    root. An absolute path is followed; a relative one with ``..`` must end below the root or the list file's folder.

    Raises:
        UserError: it leads out of both.
    """
    base = folder if line.startswith("./") else "" if os.path.exists(line) else root
    path = os.path.abspath(os.path.join(base, line))  # whole, so that its label is found beside ``images``
    if ".." in Path(line).parts and not os.path.isabs(line):
        homes = (os.path.abspath(root), os.path.abspath(folder))
        if not any(Path(path).is_relative_to(home) for home in homes):
            raise UserError(
                f"{where}: {shorten(line)} leads out of the dataset root {root} and of the list's folder: "
                "write an absolute path, or set root:"
            )
    return path


def _label_path(image: str) -> str:
    """.../images/x.jpg -> .../labels/x.txt: the first ``/images/``, or the last where that leads nowhere."""
    marker, stem = f"{os.sep}images{os.sep}", os.path.splitext(image)[0]
    first = stem.replace(marker, f"{os.sep}labels{os.sep}", 1) + ".txt"
    if stem.count(marker) > 1 and not os.path.isdir(os.path.dirname(first)):
        before, _, after = stem.rpartition(marker)
        return f"{before}{os.sep}labels{os.sep}{after}.txt"
    return first


def _list_voc(config: DatasetConfig, entry: str) -> list[_Candidate]:
    folder, _, listed = voc_split(entry, config.root)
    images, annotations = folder / "JPEGImages", folder / "Annotations"
    if not images.is_dir() or not annotations.is_dir():
        raise UserError(f"{folder}: a VOC folder has JPEGImages and Annotations")
    present = {os.path.splitext(name)[0]: name for name in sorted(os.listdir(images)) if is_image_name(name)}
    return [
        _Candidate(str(images / present.get(name, f"{name}.jpg")), name, str(annotations / f"{name}.xml"), listed)
        for _, name in read_voc_list(listed)
    ]


def _list_coco(
    config: DatasetConfig, split: str, entry: str, category_ids: dict[int, int], index: Index
) -> Iterator[_Candidate]:
    document = read_coco(entry, config.names)
    for position, identifier in document.category_ids.items():
        category_ids.setdefault(position, identifier)
    _report(index, document.problems)
    folder = _image_folder(config, split, document.path, [image.file_name for image in document.images])
    for image in document.images:
        path = os.path.normpath(folder / image.file_name)
        if not Path(path).is_relative_to(os.path.normpath(folder)):
            raise UserError(f"{entry}: file_name {image.file_name!r} leads out of the image folder {folder}")
        yield _Candidate(path, image.image_id, image, document.path)


def _image_folder(config: DatasetConfig, split: str, document: Path, file_names: Sequence[str]) -> Path:
    """The YAML's ``images``, or the first usual place that holds one of the first images."""
    if split in config.images:
        return config.images[split]
    year = document.stem.rpartition("_")[2]  # instances_val2017 -> val2017
    bases = (config.root, document.parent, document.parent.parent)
    folders = [base / below for base in bases for below in ("images", ".", "JPEGImages")]
    places = [place for folder in folders for place in (folder / split, folder / year, folder)]
    for place in places:
        if any((place / name).is_file() for name in file_names[:20]):
            return place
    shown = file_names[0] if file_names else "(the file lists none)"
    raise UserError(f"{document}: its image {shown} is in no usual place; set 'images:' in {config.path}")


def _read_labels(
    candidate: _Candidate, class_index: dict[str, int], size_wh: tuple[int, int], compat: bool
) -> LabelFile:
    if isinstance(candidate.annotation, CocoImage):
        return coco_labels(candidate.source, candidate.annotation, size_wh)
    if candidate.annotation.endswith(".xml"):
        return read_voc(candidate.annotation, class_index, size_wh)
    return read_yolo(candidate.annotation, len(class_index), compat=compat)


def _report(index: Index, problems: Problems) -> None:
    if problems.reasons:
        index.counts.update(problems.reasons)
        index.warnings.append(str(problems))


def _append(
    index: Index, candidate: _Candidate, size_wh: tuple[int, int], found: LabelFile, single_class: bool
) -> None:
    if single_class:
        found.labels[:, 0] = 0
        if found.truth is not None:
            found.truth[:, 0] = 0
    if isinstance(candidate.annotation, str) and not len(found.labels) and not os.path.exists(candidate.annotation):
        index.counts["missing label files"] += 1
    index.counts["images"] += 1
    index.counts["boxes"] += len(found.labels)
    index.counts["background"] += not len(found.labels)
    index.counts["ignored"] += int((found.truth[:, 6] > 0).sum()) if found.truth is not None else 0
    index.entries.append(Entry(candidate.path, 0, size_wh, found.labels, found.segments, found.truth))


def _require_content(config: DatasetConfig, split: str, index: Index, listed: bool) -> None:
    first = f"; first: {index.warnings[0]}" if index.warnings else ""
    if not index.entries:
        found = "no usable image" if listed else "no image"
        raise UserError(f"{config.path}: {split}: {found} in {', '.join(config.entries(split))}{first}")
    if split == "train" and not index.counts["boxes"]:
        raise UserError(f"{config.path}: train: not one labelled object in {len(index.entries)} images{first}")


def _unique_ids(candidates: Sequence[_Candidate]) -> list[int]:
    """The given ids where all are different whole numbers (file names such as 000123 count), else 1, 2, 3, ..."""
    given = [str(candidate.given_id) for candidate in candidates]
    if all(text.isdecimal() and len(text) < 18 for text in given):
        numbers = [int(text) for text in given]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(candidates) + 1))


def _complete_ids(known: dict[int, int], count: int) -> list[int]:
    """One id per class; classes that no COCO file mentions continue after the largest."""
    following = max(known.values(), default=0) + 1
    ids = []
    for position in range(count):
        if position not in known:
            known[position], following = following, following + 1
        ids.append(known[position])
    return ids
