"""Who is taken for whom: confusion matrix, missed labels and false boxes at one confidence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sp_yolo.boxes import box_iou
from sp_yolo.eval.records import Detections, GroundTruth, pairs_by_image


@dataclass(frozen=True)
class Confusion:
    """Counts [c+1, c+1]: row = predicted class, column = true class, the last of each = background.

    `missed` (annotation rows) and `false` (detection rows) list per image id what went wrong; a label that was found
    with the wrong class is missed, and the box that found it is false.
    """

    matrix: np.ndarray
    missed: dict[int, list[int]]
    false: dict[int, list[int]]

    def normalised(self) -> np.ndarray:
        """Columns divided by their sum: the share of each true class; empty columns stay 0."""
        return self.matrix / np.maximum(self.matrix.sum(axis=0, keepdims=True), 1)


def confusion(truth: GroundTruth, found: Detections, *, confidence: float = 0.25, iou: float = 0.45) -> Confusion:
    """Pair boxes above `confidence` with labels of any class, best IoU first, as long as it is above `iou`.

    Each box and each label is used once. A box left over on an ignored label (or inside a crowd region) is not counted.
    """
    index = {number: row for row, number in enumerate(truth.categories)}
    background = len(index)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    missed: dict[int, list[int]] = {}
    false: dict[int, list[int]] = {}
    for everything, mine in pairs_by_image(truth, found):
        mine = mine[found.scores[mine] > confidence]
        labels, ignored = everything[~truth.ignore[everything]], everything[truth.ignore[everything]]
        pairs = _best_pairs(_iou(found.boxes_xywh[mine], truth.boxes_xywh[labels]), iou)
        excused = _excused(truth, ignored, found.boxes_xywh[mine], iou)
        for box, number in enumerate(mine.tolist()):
            predicted = index[int(found.category_ids[number])]
            actual = background
            if box in pairs:
                actual = index[int(truth.category_ids[labels[pairs[box]]])]
            elif excused[box]:
                continue
            matrix[predicted, actual] += 1
            if predicted != actual:
                false.setdefault(int(found.image_ids[number]), []).append(number)
        box_of = {label: box for box, label in pairs.items()}
        for label, number in enumerate(labels.tolist()):
            if label not in box_of:
                matrix[background, index[int(truth.category_ids[number])]] += 1
            if label not in box_of or found.category_ids[mine[box_of[label]]] != truth.category_ids[number]:
                missed.setdefault(int(truth.image_ids[number]), []).append(number)
    return Confusion(matrix, missed, false)


def _best_pairs(iou: np.ndarray, threshold: float) -> dict[int, int]:
    """Box row -> label column, greedily by falling IoU."""
    boxes, labels = np.nonzero(iou > threshold)
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for n in np.argsort(-iou[boxes, labels], kind="stable"):
        box, label = int(boxes[n]), int(labels[n])
        if box not in pairs and label not in taken:
            pairs[box] = label
            taken.add(label)
    return pairs


def _excused(truth: GroundTruth, ignored: np.ndarray, boxes_xywh: np.ndarray, threshold: float) -> np.ndarray:
    """Bool per box: it lies on an ignored label or, by the share of its own area, in a crowd region."""
    if not len(ignored) or not len(boxes_xywh):
        return np.zeros(len(boxes_xywh), dtype=bool)
    iou = _iou(boxes_xywh, truth.boxes_xywh[ignored])
    ours = boxes_xywh[:, 2:].prod(axis=1, keepdims=True)
    intersection = iou * (ours + truth.boxes_xywh[ignored][:, 2:].prod(axis=1)[None]) / (1 + iou)
    share = np.where(truth.crowd[ignored][None], intersection / np.maximum(ours, 1e-12), iou)
    return np.asarray((share > threshold).any(axis=1))


def _iou(a_xywh: np.ndarray, b_xywh: np.ndarray) -> np.ndarray:
    corners = [torch.from_numpy(np.concatenate((b[:, :2], b[:, :2] + b[:, 2:]), axis=1)) for b in (a_xywh, b_xywh)]
    return np.nan_to_num(box_iou(*corners).numpy())
