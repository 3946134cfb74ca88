"""NMS equals recorded results of the original YOLOv7, row for row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sp_yolo.boxes import non_max_suppression

ORACLE = Path(__file__).parent / "oracle" / "nms.npz"
RUNS = {
    "multi_eval": "pred_multi",
    "multi_detect": "pred_multi",
    "multi_agnostic": "pred_multi",
    "multi_classes02": "pred_multi",
    "nc1_eval": "pred_nc1",
    "nc1_detect": "pred_nc1",
    "many_maxdet": "pred_many",
}


@pytest.mark.parametrize("run", RUNS)
def test_nms_rows_equal_the_original(run: str) -> None:
    with np.load(ORACLE) as oracle:
        arguments = {"multi_label": False, **json.loads(str(oracle[f"{run}_args"]))}
        prediction = torch.from_numpy(oracle[RUNS[run]])
        expected = [oracle[f"{run}_img{i}"] for i in range(len(prediction))]
    result = non_max_suppression(prediction, **arguments)
    assert len(expected[0]) > 10
    for found, rows in zip(result, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), rows, rtol=1e-6, atol=1e-4)
