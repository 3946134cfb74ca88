"""A dataset description -> the list of its usable images with checked labels, in any of the three formats.

Nothing is cached between runs: headers and text files are read in well under 0.1 ms each, so there is no cache to go
stale (the original's label cache does).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sp_yolo.config import SPLITS, DatasetConfig
from sp_yolo.data.candidates import Candidate, Candidates, list_candidates
from sp_yolo.data.images import ImageFault, read_size
from sp_yolo.data.labels.annotation import CROWD, LabelFile, Problems, Segments
from sp_yolo.data.labels.coco import CocoImage, coco_labels
from sp_yolo.data.labels.foreign import find_foreign, foreign_words
from sp_yolo.data.labels.voc import read_voc
from sp_yolo.data.labels.yolo import read_yolo, survey_rows
from sp_yolo.data.tally import NO_FILE, UNKNOWN_CLASS, UNREAD_IMAGE, Tally
from sp_yolo.errors import UserError

LOOKED_AT = 100  # label files that are asked which program they are of


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

    ``warnings``: one line per file (missing images share one). ``tally``: what became of every image and object.
    ``crowds``: [classes] objects of each that are crowds.
    """

    entries: list[Entry]
    category_ids: list[int]
    warnings: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    crowds: Counter[int] = field(default_factory=Counter)

    @property
    def counts(self) -> Counter[str]:
        """images, boxes, ignored, background, missing images, broken images, and every reason for a dropped row."""
        return self.tally.counts()


class _OneClass(dict[str, int]):
    """Every name is the one class there is (--single-cls)."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 0


@dataclass(frozen=True)
class _Reading:
    """How the label files of a split are read."""

    class_index: Mapping[str, int]
    num_classes: int
    keypoints: int
    ambiguous: str
    compat: bool

    def labels(self, candidate: Candidate, size_wh: tuple[int, int]) -> LabelFile:
        annotation = candidate.annotation
        if isinstance(annotation, CocoImage):
            return coco_labels(candidate.source, annotation, size_wh)
        if annotation.lower().endswith(".xml"):
            return read_voc(annotation, self.class_index, size_wh)
        return read_yolo(
            annotation, self.num_classes, compat=self.compat, keypoints=self.keypoints, ambiguous=self.ambiguous
        )


def scan(config: DatasetConfig, split: str, *, single_class: bool = False, compat: bool = False) -> Index:
    """List and check every image of ``split`` ("train", "val" or "test").

    Broken images and rows are left out, counted and put into words in ``warnings``; so is an image whose labels cannot
    be read at all. With ``compat`` an image with any bad row is left out as a whole, as the original does.

    Raises:
        UserError: the split is absent or has no usable image; a training split without a single box.
    """
    any_class = single_class and len(config.names) == 1
    index = Index([], [])
    found = list_candidates(config, split, any_class=any_class)
    index.warnings += [f"{split}: {note}" for note in found.notes]
    for problems in found.problems:
        _report(index, problems)
    texts = [one.annotation for one in found.images if isinstance(one.annotation, str)]
    ambiguous = "polygon" if compat else survey_rows([text for text in texts if text.lower().endswith(".txt")])
    names: Mapping[str, int] = {name: position for position, name in enumerate(config.names)}
    count = 2**31 if any_class else len(config.names)
    reading = _Reading(_OneClass() if any_class else names, count, config.keypoints, ambiguous, compat)
    missing: list[str] = []
    kept: list[Candidate] = []
    for candidate in found.images:
        try:
            size_wh = read_size(candidate.path)
        except ImageFault as fault:
            _leave_out(index, candidate, fault, reading, missing)
            continue
        labels = reading.labels(candidate, size_wh)
        _report(index, labels.problems, candidate.path)
        if labels.unread or (compat and labels.problems.reasons) or _is_emptied(labels):
            _drop_image(index, candidate, labels)
            continue
        _append(index, candidate, size_wh, labels, single_class)
        kept.append(candidate)
    if missing:
        index.warnings.append(f"{config.path}: {split}: {len(missing)} images do not exist, the first is {missing[0]}")
    for reason, count in index.tally.notes.items():
        index.warnings.append(f"{split}: {count} x {reason}, first: {index.tally.examples[reason]}")
    _note_unpaired(config, split, found, kept, index)
    _require_content(config, split, found, index, kept)
    for one, image_id in zip(index.entries, _unique_ids(kept), strict=True):
        one.image_id = image_id
    index.category_ids = [1] if single_class else _complete_ids(found.category_ids, len(config.names))
    return index


def _report(index: Index, problems: Problems, picture: str = "") -> None:
    index.tally.dropped.update(problems.reasons)
    index.tally.notes.update(problems.notes)
    for reason, words in problems.examples.items():
        index.tally.example(reason, words, picture)
    if problems.reasons:
        index.warnings.append(str(problems))


def _leave_out(index: Index, candidate: Candidate, fault: ImageFault, reading: _Reading, missing: list[str]) -> None:
    """Count an image that cannot be used, with the objects that are labelled on it."""
    words = f"{candidate.path}: {fault}: image skipped"
    if os.path.lexists(candidate.path):
        index.tally.unread[fault.reason] += 1
        index.tally.example(fault.reason, words)
        index.warnings.append(words)
    else:
        index.tally.unread[NO_FILE] += 1
        index.tally.example(NO_FILE, f"{candidate.path} (of {candidate.source})")
        missing.append(candidate.path)
    if isinstance(candidate.annotation, CocoImage):
        objects = len(candidate.annotation.rows)
    else:
        labels = reading.labels(candidate, (2**30, 2**30))
        objects = labels.problems.reasons.total() + len(labels.labels) + _ignored(labels)
    if objects:
        index.tally.dropped[UNREAD_IMAGE] += objects
        index.tally.example(UNREAD_IMAGE, words)


def _drop_image(index: Index, candidate: Candidate, labels: LabelFile) -> None:
    """An image whose labels cannot be read, or with a bad row under --compat: it would be taken for background."""
    reason = labels.unread or ("no usable label" if _is_emptied(labels) else "label file with a bad row (--compat)")
    index.tally.unread[reason] += 1
    index.tally.example(reason, str(labels.problems))
    rest = len(labels.labels) + _ignored(labels)
    if rest:
        index.tally.dropped[reason] += rest
    if not rest:
        index.warnings[-1] += ": image skipped"


def _is_emptied(labels: LabelFile) -> bool:
    """Whether every object on an image was dropped; one with objects only of classes not asked for is background."""
    reasons = {reason for reason, count in labels.problems.reasons.items() if count}
    return bool(reasons - {UNKNOWN_CLASS}) and not len(labels.labels) and not _ignored(labels)


def _ignored(labels: LabelFile) -> int:
    return int((labels.truth[:, 6] > 0).sum()) if labels.truth is not None else 0


def _append(index: Index, candidate: Candidate, size_wh: tuple[int, int], found: LabelFile, single_class: bool) -> None:
    if found.truth is not None:
        index.crowds.update(found.truth[found.truth[:, 6] == CROWD, 0].astype(int).tolist())
    if single_class:
        found.labels[:, 0] = 0
        if found.truth is not None:
            found.truth[:, 0] = 0
    tally = index.tally
    if isinstance(candidate.annotation, str) and not len(found.labels) and not os.path.exists(candidate.annotation):
        tally.no_label_file += 1
        tally.example("no label file", f"{candidate.annotation} does not exist", candidate.path)
    elif len(found.labels):
        tally.labelled += 1
    else:
        tally.background += 1
    tally.boxes += len(found.labels)
    tally.ignored += _ignored(found)
    index.entries.append(Entry(candidate.path, 0, size_wh, found.labels, found.segments, found.truth))


def _note_unpaired(
    config: DatasetConfig, split: str, found: Candidates, kept: Sequence[Candidate], index: Index
) -> None:
    """Say which images have no label file and which label files no image, once each; what else is odd about names."""
    tally = index.tally
    index.warnings += [f"{split}: {note}" for note in found.finder.notes()]
    if tally.no_label_file:
        first = tally.examples["no label file"]
        index.warnings.append(f"{split}: {tally.no_label_file} of {tally.found} images have no label file: {first}")
    orphans = found.finder.orphans()
    if orphans:
        stems = {Path(candidate.path).stem for candidate in found.images} | _stems_of_others(config, split)
        orphans = [path for path in orphans if Path(path).stem not in stems]
    if orphans:
        tally.orphans = len(orphans)
        tally.example("label file without image", f"{orphans[0]} has no image")
        index.warnings.append(f"{split}: {len(orphans)} label files have no image, e.g. {orphans[0]}")


def _stems_of_others(config: DatasetConfig, split: str) -> set[str]:
    """Names of the images of the other splits, which may share a label folder with this one."""
    stems: set[str] = set()
    for other in SPLITS:
        if other != split and getattr(config, other):
            try:
                stems |= {Path(candidate.path).stem for candidate in list_candidates(config, other).images}
            except UserError:
                continue
    return stems


def _require_content(
    config: DatasetConfig, split: str, found: Candidates, index: Index, kept: Sequence[Candidate]
) -> None:
    tally = index.tally
    first = f"; first: {index.warnings[0]}" if index.warnings else ""
    if not index.entries:
        what = "no usable image" if tally.found else "no image"
        told = (
            foreign_words(one)
            for one in (image.annotation for image in found.images[:LOOKED_AT])
            if isinstance(one, str)
        )
        if words := next(filter(None, told), ""):
            first += f"; {words}"
        raise UserError(f"{config.path}: {split}: {what} in {', '.join(config.entries(split))}{first}")
    if split == "train" and not tally.boxes:
        crowds = sum(index.crowds.values())
        why = f": all {crowds} objects are crowds (iscrowd = 1)" if crowds and crowds == tally.ignored else first
        looked = next((one.annotation for one in kept if isinstance(one.annotation, str)), None)
        home = config.path if config.path.is_dir() else config.path.parent
        if tally.no_label_file == tally.used and looked:
            foreign = find_foreign(dict.fromkeys((Path(kept[0].path).parent, home)))
            why = f": no label file was found, the first looked for is {looked}{f'; {foreign}' if foreign else ''}"
        raise UserError(f"{config.path}: train: not one labelled object in {len(index.entries)} images{why}")


def _unique_ids(candidates: Sequence[Candidate]) -> list[int]:
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
