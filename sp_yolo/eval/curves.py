"""Precision, recall and F1 as functions of the confidence, and the confidence that a report should be read at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

POINTS = 1000


class Matches(NamedTuple):
    """Detections of one class over all images, in any order, without the ignored ones."""

    scores: np.ndarray  # float64 [n]
    hit: np.ndarray  # bool [n], matched to a label at IoU .5
    labels: int


@dataclass(frozen=True)
class Curves:
    """Rows are classes; `counted` marks those with labels, the only ones in any mean."""

    names: list[str]
    counted: np.ndarray  # bool [c]
    confidence: np.ndarray  # [1000], rising
    precision: np.ndarray  # [c, 1000]
    recall: np.ndarray  # [c, 1000]
    f1: np.ndarray  # [c, 1000]
    best: int  # index of the confidence with the highest mean F1
    recall_points: np.ndarray  # [101]
    precision_at_recall: np.ndarray  # [c, 101], IoU .5

    def means_at_best(self) -> tuple[float, float, float]:
        """(precision, recall, F1) averaged over the classes with labels, at the best confidence."""
        if not self.counted.any():
            return 0.0, 0.0, 0.0
        columns = (self.precision, self.recall, self.f1)
        means = [float(values[self.counted, self.best].mean()) for values in columns]
        return means[0], means[1], means[2]


def confidence_curves(names: list[str], matches: list[Matches], precision_at_recall: np.ndarray) -> Curves:
    """Count hits at or above each of 1000 confidences from 0 to 1 (or to the best score, if that is larger).

    Above its best score a class has recall 0 and, by the original YOLOv7's convention, precision 1. A class without
    detections has precision 0, and so has every class as long as not one detection of the set is a hit.
    """
    top = max([1.0, *(float(m.scores.max()) for m in matches if len(m.scores))])
    confidence = np.linspace(0.0, top, POINTS)
    precision, recall = np.zeros((2, len(matches), POINTS))
    any_hit = any(m.hit.any() for m in matches)
    for k, (scores, hit, labels) in enumerate(matches):
        if not any_hit or not labels or not len(scores):
            continue
        order = np.argsort(-scores, kind="stable")
        hits = np.concatenate(([0], np.cumsum(hit[order])))
        above = np.searchsorted(-scores[order], -confidence, side="right")  # detections with score >= confidence
        recall[k] = hits[above] / labels
        precision[k] = np.where(above > 0, hits[above] / np.maximum(above, 1), 1.0)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-16)
    counted = np.array([m.labels > 0 for m in matches], dtype=bool)
    best = int(f1[counted].mean(axis=0).argmax()) if counted.any() else 0
    recall_points = np.linspace(0.0, 1.0, precision_at_recall.shape[1])
    return Curves(
        names, counted, confidence, precision, recall, f1, best, recall_points, np.maximum(precision_at_recall, 0.0)
    )
