"""Object pasting: copy_paste within a picture, paste_in from others. Both need polygons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from sp_yolo.data.augment import Sample
from sp_yolo.data.canvas import Canvas, painted
from sp_yolo.data.sketch import Sketch

_COVER = 0.30  # no existing box may lose more of its area than this
_SLOTS = (0.75,) * 2 + (0.5,) * 4 + (0.25,) * 4 + (0.125,) * 4 + (0.0625,) * 6  # largest share of a side per paste
_WANTED_CROPS = 30


class Crop(NamedTuple):
    """A cut-out object: class, uint8 [h, w, 3] picture, bool [h, w] mask."""

    label: float
    image: np.ndarray
    mask: np.ndarray


def covered(box_xyxy: np.ndarray, others_xyxy: np.ndarray) -> np.ndarray:
    """Share [n] of the area of each of ``others_xyxy`` [n, 4] that lies under ``box_xyxy`` [4]."""
    low, high = np.maximum(box_xyxy[:2], others_xyxy[:, :2]), np.minimum(box_xyxy[2:], others_xyxy[:, 2:])
    area = (others_xyxy[:, 2:] - others_xyxy[:, :2]).prod(1)
    return (high - low).clip(0).prod(1) / (area + 1e-16)


def draw_copy_paste(rng: np.random.Generator, sample: Sample, share: float) -> np.ndarray:
    """Indices of the polygons to mirror: round(share n) of n, none twice."""
    if sample.segments is None or not share:
        return np.zeros(0, np.int64)
    outlined = np.flatnonzero([len(segment) > 0 for segment in sample.segments])
    return rng.choice(outlined, round(share * len(outlined)), replace=False)


def copy_paste(sample: Sample, indices: Sequence[int] | np.ndarray) -> Sample:
    """Add the mirror image of some outlined objects where they cover little of the others."""
    if sample.segments is None or not len(indices):
        return sample
    height, width = sample.image.shape[:2]
    boxes, segments, classes = sample.boxes_xyxy, list(sample.segments), sample.classes
    mask = np.zeros((height, width), np.uint8)
    for index in indices:
        mirrored = boxes[index, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0)
        if (covered(mirrored, boxes) >= _COVER).any():
            continue
        boxes = np.concatenate((boxes, mirrored[None].astype(boxes.dtype)))
        classes = np.append(classes, classes[index])
        segments.append(segments[index] * (-1, 1) + (width, 0))
        cv2.drawContours(mask, [segments[index].astype(np.int32)], -1, 1, cv2.FILLED)
    image = painted(sample.image)
    mirrored_image, pasted = cv2.flip(cv2.bitwise_and(image, image, mask=mask), 1), image.copy()
    visible = mirrored_image > 0
    pasted[visible] = mirrored_image[visible]
    return Sample(pasted, classes, boxes, segments)


def cut_objects(sample: Sample, rng: np.random.Generator) -> list[Crop]:
    """Crops of a random half of the outlined objects of a picture."""
    if sample.segments is None:
        return []
    height, width = sample.image.shape[:2]
    outlined = [index for index, segment in enumerate(sample.segments) if len(segment)]
    crops = []
    for index in rng.choice(outlined, round(0.5 * len(outlined)), replace=False) if outlined else ():
        polygon = sample.segments[index].astype(np.int32)
        x1, y1 = polygon.min(0).clip(0)
        x2, y2 = np.minimum(polygon.max(0), (width, height))
        if x2 - x1 < 1 or y2 - y1 < 1:
            continue
        mask = np.zeros((y2 - y1, x2 - x1), np.uint8)
        cv2.drawContours(mask, [polygon - (x1, y1)], -1, 1, cv2.FILLED)
        if isinstance(sample.image, Canvas):
            image = sample.image.paint((x1, y1, x2, y2))
        else:
            image = painted(sample.image)[y1:y2, x1:x2]
        crops.append(Crop(float(sample.classes[index]), image, mask.astype(bool)))
    return crops


def collect_crops(raw_mosaic: Callable[[], Sample], rng: np.random.Generator) -> list[Crop]:
    """At least 30 crops out of raw mosaics, unless the first has none at all."""
    crops = cut_objects(raw_mosaic(), rng)
    attempts = 1
    while crops and len(crops) < _WANTED_CROPS and attempts < 2 * _WANTED_CROPS:
        crops += cut_objects(raw_mosaic(), rng)
        attempts += 1
    return crops


def paste_in(sample: Sample, crops: Sequence[Crop], rng: np.random.Generator) -> Sample:
    """Paste crops into up to 20 free places of a picture."""
    if not crops:
        return sample
    boxes, classes = sample.boxes_xyxy, sample.classes
    height, width = sample.image.shape[:2]
    overlay, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool)
    for share in _SLOTS:
        if rng.random() < 0.2:
            continue
        place = _draw_place(rng, share, height, width)
        if (place[2:] - place[:2]).min() <= 20 or (covered(place, boxes) >= _COVER).any():
            continue
        pasted = _paste_crop(overlay, mask, crops[int(rng.integers(len(crops)))], place)
        if pasted is not None:
            label, box = pasted
            boxes = np.concatenate((boxes, np.array([box], boxes.dtype)))
            classes = np.append(classes, np.asarray(label, classes.dtype))
    if isinstance(sample.image, Sketch):
        return Sample(sample.image.pasted(mask, overlay), classes, boxes)
    image = painted(sample.image).copy()
    image[mask] = overlay[mask]
    return Sample(image, classes, boxes)


def _draw_place(rng: np.random.Generator, share: float, height: int, width: int) -> np.ndarray:
    """A random box (x1, y1, x2, y2) px of at most ``share`` of each side."""
    box_h = int(rng.integers(1, max(int(height * share), 1) + 1))
    box_w = int(rng.integers(1, max(int(width * share), 1) + 1))
    x1 = max(0, int(rng.integers(0, width + 1)) - box_w // 2)
    y1 = max(0, int(rng.integers(0, height + 1)) - box_h // 2)
    return np.array([x1, y1, min(width, x1 + box_w), min(height, y1 + box_h)])


def _paste_crop(
    overlay: np.ndarray, pasted: np.ndarray, crop: Crop, place: np.ndarray
) -> tuple[float, tuple[int, int, int, int]] | None:
    """Scale a crop into ``place``, paint it at its top left; (class, pasted box), or None where it is too small."""
    h, w = crop.image.shape[:2]
    x1, y1, x2, y2 = map(int, place)
    scale = min((y2 - y1) / h, (x2 - x1) / w)
    new_w, new_h = int(w * scale), int(h * scale)
    if min(new_w, new_h) <= 10:
        return None
    mask = cv2.resize(crop.mask.astype(np.uint8), (new_w, new_h), interpolation=cv2.INTER_NEAREST).astype(bool)
    if 3 * mask.sum() <= 60:
        return None
    overlay[y1 : y1 + new_h, x1 : x1 + new_w][mask] = cv2.resize(crop.image, (new_w, new_h))[mask]
    pasted[y1 : y1 + new_h, x1 : x1 + new_w] |= mask
    return crop.label, (x1, y1, x1 + new_w, y1 + new_h)
