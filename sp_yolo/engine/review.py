"""What is to be said of the data before anything is trained on them: the same words in train, val and check."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from sp_yolo.data import DetectionDataset
from sp_yolo.data.statistics import box_sides, class_counts
from sp_yolo.errors import UserError

SHOWN = 10  # of a split's faulty files; the rest is counted
FEW_LABELS = 10  # per class; below that its AP says nothing
TINY_SIDE = 2.0  # px at the training size


def describe(split: str, data: DetectionDataset) -> list[str]:
    """The split in one line, then its faulty files, a line each; of many the first ones and how many more."""
    more = len(data.warnings) - SHOWN
    rest = [f"{split}: ... and {more} more lines like these"] if more > 0 else []
    return [f"{split}: {data.tally.line()}", *(f"warning: {line}" for line in data.warnings[:SHOWN]), *rest]


def losses(split: str, data: DetectionDataset) -> list[str]:
    """One line per loss that nobody would train with unasked."""
    lines = [f"{split}: {words}" for words in data.tally.losses()]
    boxes = class_counts(data)[1]
    if lines and data.tally.dropped["class beyond nc"] and len(boxes) > 1 and not boxes[0]:
        lines[0] += "; do the class ids count from 1? They have to count from 0"
    return lines


def require_little_loss(splits: Mapping[str, DetectionDataset], *, accepted: bool) -> None:
    """Stop where much of what was labelled would not be trained on.

    Raises:
        UserError: more than a few per cent of a split is lost, or a class is beyond nc; unless that is ``accepted``.
    """
    told = [line for split, data in splits.items() for line in losses(split, data)]
    if told and not accepted:
        raise UserError(f"{' | '.join(told)} (--accept-losses trains on the rest)")


def review(splits: Mapping[str, DetectionDataset], image_size: int) -> list[str]:
    """What makes the result worse than it looks: classes and splits without labels, boxes too small to be seen at
    ``image_size`` px, validation images that are trained on."""
    told = []
    for split, data in splits.items():
        names, boxes = data.names, class_counts(data)[1]
        crowds = np.array([0 if count else data.crowds[index] for index, count in enumerate(boxes)])
        told += [
            f"{split}: all {crowds[index]} objects of {names[index]} are crowds (iscrowd = 1): "
            + ("the class is not trained on" if split == "train" else "it is not measured")
            for index in np.flatnonzero(crowds)
        ]
        if not boxes.sum():
            told.append(f"{split}: not one label in {len(data)} images: its mAP will say nothing{_looked_for(data)}")
            continue
        empty = [name for name, count, crowd in zip(names, boxes, crowds, strict=True) if not count and not crowd]
        rare = [f"{name} ({count})" for name, count in zip(names, boxes, strict=True) if 0 < count < FEW_LABELS]
        if empty:
            told.append(f"{split}: no label of {_listed(empty)}")
        if rare and split == "train":
            told.append(f"train: fewer than {FEW_LABELS} labels of {_listed(rare)}")
        sides = box_sides(data, image_size)
        tiny = int((sides < TINY_SIDE).any(axis=1).sum())
        if tiny:
            share = f"{tiny} of {len(sides)} boxes"
            told.append(f"{split}: {share} have a side below {TINY_SIDE:g} px at --img-size {image_size}")
    return told + _shared_images(splits)


def _looked_for(data: DetectionDataset) -> str:
    first = data.tally.examples.get("no label file")
    return f" (first: {first})" if first else ""


def _shared_images(splits: Mapping[str, DetectionDataset]) -> list[str]:
    """Files that are in train and in another split."""
    if "train" not in splits:
        return []
    places = {split: [os.path.realpath(path) for path in data.paths] for split, data in splits.items()}
    trained = set(places.pop("train"))
    told = []
    for split, paths in places.items():
        shared = [path for path in paths if path in trained]
        if shared:
            count = f"all {len(paths)}" if len(shared) == len(paths) else f"{len(shared)} of {len(paths)}"
            told.append(f"{split}: {count} images are training images too (its mAP will flatter), e.g. {shared[0]}")
    return told


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - 8} more classes" if len(words) > 8 else ""
    return ", ".join(words[:8]) + more
