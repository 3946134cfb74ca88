"""Detections collected image by image, by the trainer's validation and `sp-yolo val` alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sp_yolo.errors import NonFiniteError, UserError
from sp_yolo.eval.coco import EvalResult, evaluate_records
from sp_yolo.eval.records import Detections, GroundTruthSource, load_ground_truth


class CocoEvaluator:
    """Collects detections per image and computes `EvalResult`. Knows no model.

    An image given twice (a distributed sampler pads its last batch) counts once. State merges across ranks, and neither
    the order of images nor the number of ranks changes a single bit of the result.
    """

    def __init__(
        self,
        ground_truth: GroundTruthSource,
        category_ids: Sequence[int],
        names: Sequence[str] | None = None,
        *,
        backend: str = "",
    ) -> None:
        """`category_ids[c]` is the ground truth's id of class index c; `names` replace the ground truth's own."""
        truth = load_ground_truth(ground_truth)
        if missing := [number for number in category_ids if number not in truth.categories]:
            raise UserError(
                f"ground truth: has no category {missing[0]}, which class {category_ids.index(missing[0])} maps to"
            )
        if names is not None:
            truth.categories.update(zip(category_ids, names, strict=True))
        self._truth, self._backend = truth, backend
        self._category_ids = np.array(category_ids, dtype=np.int64)
        self._found: dict[int, np.ndarray] = {}

    def reset(self) -> None:
        """Forget every detection."""
        self._found.clear()

    def update(self, image_ids: Sequence[int], detections: Sequence[torch.Tensor]) -> None:
        """Add images: per image [k, 6] rows x1, y1, x2, y2 (original pixels), score, class index; k may be 0.

        Boxes are rounded to 1/1000 px, as in the JSON file, so that file and evaluator give the same figures.
        """
        for image_id, rows in zip(image_ids, detections, strict=True):
            if image_id not in self._truth.images:
                raise UserError(f"image id {image_id} is not in the ground truth ({len(self._truth.images)} images)")
            values = rows.detach().cpu().double().numpy().reshape(-1, 6)
            if not np.isfinite(values).all():
                raise NonFiniteError(f"image id {image_id}: a detection is not finite: the weights are damaged")
            label = values[:, 5].astype(np.int64)
            if len(label) and label.max() >= len(self._category_ids):
                raise UserError(
                    f"class index {label.max()} found, but the data set has {len(self._category_ids)} classes"
                )
            corners = values[:, :4]
            xywh = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1).round(3)
            columns = (xywh, values[:, 4:5], self._category_ids[label][:, None])
            self._found[int(image_id)] = np.concatenate(columns, axis=1)

    def state(self) -> dict[int, np.ndarray]:
        """What `merge` takes: image id -> [k, 6] float64 rows x, y, w, h, score, category id."""
        return dict(self._found)

    def merge(self, states: Iterable[Mapping[int, np.ndarray]]) -> None:
        """Add the state of other ranks."""
        for state in states:
            self._found.update(state)

    def detections(self) -> list[dict[str, Any]]:
        """The COCO results list, ordered by image; as JSON it evaluates to the same figures."""
        return [
            {"image_id": image_id, "category_id": int(row[5]), "bbox": row[:4], "score": row[4]}
            for image_id in sorted(self._found)
            for row in self._found[image_id].tolist()
        ]

    def compute(self) -> EvalResult:
        """Metrics of everything since `reset`. Images of the ground truth never given count as empty."""
        image_ids = sorted(self._found)
        rows = np.concatenate([np.zeros((0, 6)), *(self._found[image_id] for image_id in image_ids)])
        counts = [len(self._found[image_id]) for image_id in image_ids]
        found = Detections(
            image_ids=np.repeat(np.array(image_ids, dtype=np.int64), counts),
            category_ids=rows[:, 5].astype(np.int64),
            boxes_xywh=rows[:, :4],
            scores=rows[:, 4],
        )
        return evaluate_records(self._truth, found, self._backend)
