"""PASCAL VOC average precision with the development kit's conventions (VOCevaldet.m)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sp_yolo.errors import UserError
from sp_yolo.eval.records import (
    Detections,
    DetectionSource,
    GroundTruth,
    GroundTruthSource,
    load_detections,
    load_ground_truth,
)

RECALL_POINTS = np.arange(11) * 0.1  # the kit's 0:0.1:1, floating-point noise included


@dataclass(frozen=True)
class VocClassResult:
    """One class; `ap` is 0.0 and takes no part in the mean if the class has no labels."""

    name: str
    images: int  # with at least one label of the class
    labels: int  # without difficult ones
    detections: int
    true_positives: int
    ap: float
    precision: np.ndarray  # after each detection, best score first, difficult ones left out
    recall: np.ndarray


@dataclass(frozen=True)
class VocResult:
    """Mean average precision over the classes with labels, 0.0 if there are none."""

    mean_ap: float
    iou: float
    metric: str
    per_class: list[VocClassResult]
    summary_text: str


def voc_evaluate(
    ground_truth: GroundTruthSource, detections: DetectionSource, iou: float = 0.5, metric: str = "voc12"
) -> VocResult:
    """VOC average precision of detections, from files or objects in COCO form.

    A side of a box counts its last pixel (+1), as in the kit: x2 = x + width is the last pixel column. In order of
    falling score each detection goes to the label of its image that it overlaps most: a hit if that IoU is at least
    `iou` and the label is still free, a miss otherwise, neither if the label is difficult (`difficult`, `ignore` or
    `iscrowd`).

    Args:
        ground_truth, detections: as for `coco_evaluate`.
        iou: the threshold.
        metric: "voc07" is the mean of the best precision at 11 recalls; "voc12" (VOC 2010 and later) is the area under
            the monotone precision-recall curve at every point.

    Raises:
        UserError: malformed input, an unknown metric, a threshold outside 0..1; one line.
    """
    if metric not in ("voc07", "voc12"):
        raise UserError(f"metric {metric!r} is unknown: voc07 or voc12")
    if not 0 < iou <= 1:
        raise UserError(f"iou {iou} must be above 0 and at most 1")
    truth = load_ground_truth(ground_truth)
    found = load_detections(detections, truth)
    per_class = [_evaluate_class(truth, found, number, name, iou, metric) for number, name in truth.categories.items()]
    counted = [result.ap for result in per_class if result.labels]
    mean_ap = float(np.mean(counted)) if counted else 0.0
    rule = "11 points" if metric == "voc07" else "every point"
    summary = f" Mean average precision (VOC, {rule}) @[ IoU={iou:.2f} | {len(counted)} classes ] = {mean_ap:.4f}"
    return VocResult(mean_ap, iou, metric, per_class, summary)


def _evaluate_class(
    truth: GroundTruth, found: Detections, category: int, name: str, iou: float, metric: str
) -> VocClassResult:
    labels = np.flatnonzero(truth.category_ids == category)
    positives = labels[~truth.ignore[labels]]
    mine = np.flatnonzero(found.category_ids == category)
    mine = mine[np.argsort(-found.scores[mine], kind="stable")]
    hit, skipped = _match(truth, found, labels, mine, iou)
    hit = hit[~skipped]
    true = np.cumsum(hit)
    precision = true / np.arange(1, len(hit) + 1)
    recall = true / len(positives) if len(positives) else np.zeros(len(hit))
    ap = 0.0
    if len(positives):
        ap = _eleven_points(precision, recall) if metric == "voc07" else _every_point(precision, recall)
    images = len(np.unique(truth.image_ids[positives]))
    return VocClassResult(name, images, len(positives), len(mine), int(hit.sum()), ap, precision, recall)


def _match(
    truth: GroundTruth, found: Detections, labels: np.ndarray, mine: np.ndarray, iou: float
) -> tuple[np.ndarray, np.ndarray]:
    """(hit, skipped), each bool [len(mine)], for detections `mine` in order of falling score."""
    hit, skipped = np.zeros((2, len(mine)), dtype=bool)
    free = np.ones(len(truth.image_ids), dtype=bool)
    by_image: dict[int, np.ndarray] = {}
    if len(labels):
        order = labels[np.argsort(truth.image_ids[labels], kind="stable")]
        images, starts = np.unique(truth.image_ids[order], return_index=True)
        by_image = dict(zip(images.tolist(), np.split(order, starts[1:]), strict=True))
    for position, number in enumerate(mine):
        candidates = by_image.get(int(found.image_ids[number]))
        if candidates is None:
            continue
        overlaps = _inclusive_iou(found.boxes_xywh[number], truth.boxes_xywh[candidates])
        best = int(overlaps.argmax())
        if overlaps[best] < iou:
            continue
        label = candidates[best]
        skipped[position] = truth.ignore[label]
        hit[position] = free[label] and not truth.ignore[label]
        free[label] = False
    return hit, skipped


def _inclusive_iou(box_xywh: np.ndarray, others_xywh: np.ndarray) -> np.ndarray:
    """IoU of one box with [n, 4] others, both ends of every side counted: [n]."""
    start = np.maximum(box_xywh[:2], others_xywh[:, :2])
    end = np.minimum(box_xywh[:2] + box_xywh[2:], others_xywh[:, :2] + others_xywh[:, 2:])
    intersection = np.maximum(end - start + 1, 0).prod(axis=1)
    return intersection / ((box_xywh[2:] + 1).prod() + (others_xywh[:, 2:] + 1).prod(axis=1) - intersection)


def _eleven_points(precision: np.ndarray, recall: np.ndarray) -> float:
    return float(np.mean([precision[recall >= point].max(initial=0.0) for point in RECALL_POINTS]))


def _every_point(precision: np.ndarray, recall: np.ndarray) -> float:
    recall = np.concatenate(([0.0], recall))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope))
