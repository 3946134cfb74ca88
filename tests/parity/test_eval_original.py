"""The original's own metric equals recorded results of the original YOLOv7."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sp_yolo.boxes import boxes_to_original, cxcywh_to_xyxy, non_max_suppression
from sp_yolo.eval.original import average_precision, yolov7_evaluate

ORACLE = Path(__file__).parent / "oracle" / "map.npz"
INPUT_HW = (256, 320)


@pytest.mark.parametrize("v5", [False, True])
@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_average_precision(case: str, v5: bool) -> None:
    with np.load(ORACLE) as oracle:
        given = [oracle[f"{case}_{key}"] for key in ("tp", "conf", "pred_cls", "target_cls")]
        expected = {key: oracle[f"{case}_v5{int(v5)}_{key}"] for key in ("p", "r", "ap", "f1", "classes")}
    result = average_precision(*given, v5_metric=v5)
    np.testing.assert_array_equal(result.classes, expected["classes"])
    np.testing.assert_allclose(result.class_ap, expected["ap"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.class_precision, expected["p"], rtol=1e-6)
    np.testing.assert_allclose(result.class_recall, expected["r"], rtol=1e-6)
    np.testing.assert_allclose(result.class_f1, expected["f1"], rtol=1e-6)


def test_average_precision_with_tied_scores() -> None:
    # the order among equal scores was the platform's there; it is the input's here
    with np.load(ORACLE) as oracle:
        given = [oracle[f"c3_{key}"] for key in ("tp", "conf", "pred_cls", "target_cls")]
        expected = oracle["c3_v50_ap"]
    assert len(np.unique(given[1])) < len(given[1])
    np.testing.assert_allclose(average_precision(*given).class_ap.mean(), expected.mean(), rtol=0.1)


def recorded_run(oracle: Any, iou: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and detections of the recorded evaluator run, in COCO form and original pixels."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for batch in range(3):
        shapes = json.loads(str(oracle[f"eval_b{batch}_shapes_json"]))
        kept = non_max_suppression(torch.from_numpy(oracle[f"eval_b{batch}_pred"]), 0.001, iou)
        targets = torch.from_numpy(oracle[f"eval_b{batch}_targets"])
        for index, (original_hw, ((ratio_h, _), pad)) in enumerate(shapes):
            images.append({"id": len(images)})
            ratio_pad = ((ratio_h, ratio_h), tuple(pad))  # it used the height's ratio for both axes
            mine = targets[targets[:, 0] == index]
            boxes = cxcywh_to_xyxy(mine[:, 2:]) * torch.tensor([INPUT_HW[1], INPUT_HW[0]] * 2)
            rows = torch.cat((boxes, torch.ones(len(mine), 1), mine[:, 1:2]), 1)
            for into, values in ((annotations, rows), (found, kept[index])):
                corners = boxes_to_original(values[:, :4], INPUT_HW, tuple(original_hw), ratio_pad).double()
                for (x1, y1, x2, y2), (score, label) in zip(corners.tolist(), values[:, 4:].tolist(), strict=True):
                    record = {"image_id": len(images) - 1, "category_id": int(label), "score": score}
                    into.append({**record, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    categories = [{"id": number, "name": str(number)} for number in range(5)]
    return {"images": images, "annotations": annotations, "categories": categories}, found


@pytest.mark.parametrize("v5", [False, True])
@pytest.mark.parametrize("iou", [0.6, 0.65])
def test_whole_evaluation_run(iou: float, v5: bool) -> None:
    with np.load(ORACLE) as oracle:
        truth, found = recorded_run(oracle, iou)
        expected = oracle[f"eval_v5{int(v5)}_iou{iou}_P_R_map50_map"]
        per_class = oracle[f"eval_v5{int(v5)}_iou{iou}_per_class_map"]
    result = yolov7_evaluate(truth, found, v5_metric=v5)
    figures = [result.precision, result.recall, result.map50, result.map50_95]
    np.testing.assert_allclose(figures, expected, rtol=1e-5)
    np.testing.assert_allclose(result.class_ap.mean(axis=1), per_class, rtol=1e-5)


def test_nothing_correct_is_zero() -> None:
    nothing = average_precision(np.zeros((2, 10), bool), np.array([0.5, 0.4]), np.zeros(2), np.zeros(3))
    empty = average_precision(np.zeros((0, 10), bool), np.zeros(0), np.zeros(0), np.zeros(0))
    for result in (nothing, empty):
        assert (result.precision, result.recall, result.map50, result.map50_95) == (0.0, 0.0, 0.0, 0.0)
