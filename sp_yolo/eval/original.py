"""The figures that the original YOLOv7 printed, for comparing with its logs; `coco_evaluate` is what to report.

They differ from COCO's: a detection never takes its second-best label, a hit must be strictly above the threshold, the
precision-recall curve gets an extra end point, and crowd regions are unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sp_yolo.boxes import box_iou
from sp_yolo.eval.records import (
    Detections,
    DetectionSource,
    GroundTruth,
    GroundTruthSource,
    load_detections,
    load_ground_truth,
    pairs_by_image_and_class,
)

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)


@dataclass(frozen=True)
class OriginalResult:
    """Rows are the classes with labels. Precision and recall are at the confidence of the highest mean F1."""

    classes: np.ndarray  # int64 [c], category ids
    class_precision: np.ndarray  # [c]
    class_recall: np.ndarray  # [c]
    class_f1: np.ndarray  # [c]
    class_ap: np.ndarray  # [c, 10], one column per IoU threshold .5:.05:.95

    @property
    def precision(self) -> float:
        return float(self.class_precision.mean()) if len(self.classes) else 0.0

    @property
    def recall(self) -> float:
        return float(self.class_recall.mean()) if len(self.classes) else 0.0

    @property
    def map50(self) -> float:
        return float(self.class_ap[:, 0].mean()) if len(self.classes) else 0.0

    @property
    def map50_95(self) -> float:
        return float(self.class_ap.mean()) if len(self.classes) else 0.0


def yolov7_evaluate(
    ground_truth: GroundTruthSource, detections: DetectionSource, *, v5_metric: bool = False
) -> OriginalResult:
    """The original's own metric of COCO-form detections; crowd and ignored annotations are left out as labels.

    Args:
        v5_metric: end the curve at recall 1 (the original's `--v5-metric`) instead of its last recall + 0.01.

    Raises:
        UserError: malformed input, as for `coco_evaluate`.
    """
    truth = load_ground_truth(ground_truth)
    found = load_detections(detections, truth)
    labels = truth.category_ids[~truth.ignore]
    return average_precision(_correct(truth, found), found.scores, found.category_ids, labels, v5_metric=v5_metric)


def _correct(truth: GroundTruth, found: Detections) -> np.ndarray:
    """Bool [n, 10]: in order of falling score, a detection takes its image's and class's best label, if free."""
    correct = np.zeros((len(found.scores), len(IOU_THRESHOLDS)), dtype=bool)
    for labels, mine in pairs_by_image_and_class(truth, found, np.flatnonzero(~truth.ignore)):
        if not len(labels) or not len(mine):
            continue
        iou = np.nan_to_num(box_iou(_corners(found.boxes_xywh[mine]), _corners(truth.boxes_xywh[labels])).numpy())
        taken: set[int] = set()
        for number, overlap, label in zip(mine, iou.max(axis=1), iou.argmax(axis=1).tolist(), strict=True):
            if overlap > IOU_THRESHOLDS[0] and label not in taken:
                taken.add(label)
                correct[number] = overlap > IOU_THRESHOLDS
    return correct


def _corners(boxes_xywh: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate((boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]), axis=1))


def average_precision(
    correct: np.ndarray, scores: np.ndarray, predicted: np.ndarray, labels: np.ndarray, *, v5_metric: bool = False
) -> OriginalResult:
    """AP per class from hits [n, 10], scores [n], predicted classes [n] and label classes [m]."""
    order = np.argsort(-scores, kind="stable")
    correct, scores, predicted = correct[order], scores[order], predicted[order]
    classes, counts = np.unique(labels, return_counts=True)
    confidence = np.linspace(0, 1, 1000)
    ap = np.zeros((len(classes), correct.shape[1]))
    precision_curve, recall_curve = np.zeros((2, len(classes), len(confidence)))
    for row, (number, count) in enumerate(zip(classes, counts, strict=True)):
        mine = predicted == number
        if not mine.any() or not correct.any():
            continue
        hits = correct[mine].cumsum(axis=0)
        recall = hits / (count + 1e-16)
        precision = hits / np.arange(1, len(hits) + 1)[:, None]
        recall_curve[row] = np.interp(-confidence, -scores[mine], recall[:, 0], left=0)
        precision_curve[row] = np.interp(-confidence, -scores[mine], precision[:, 0], left=1)
        ap[row] = [_area(recall[:, t], precision[:, t], v5_metric) for t in range(correct.shape[1])]
    f1_curve = 2 * precision_curve * recall_curve / (precision_curve + recall_curve + 1e-16)
    best = int(f1_curve.mean(axis=0).argmax()) if len(classes) else 0
    return OriginalResult(classes, precision_curve[:, best], recall_curve[:, best], f1_curve[:, best], ap)


def _area(recall: np.ndarray, precision: np.ndarray, v5_metric: bool) -> float:
    recall = np.concatenate(([0.0], recall, [1.0 if v5_metric else recall[-1] + 0.01]))
    precision = np.concatenate(([1.0], precision, [0.0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    points = np.linspace(0, 1, 101)
    values = np.interp(points, recall, envelope)
    return float(((values[1:] + values[:-1]) / 2 * np.diff(points)).sum())
