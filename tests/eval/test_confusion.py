"""Confusion matrix, missed labels and false boxes in cases small enough to count by eye."""

from __future__ import annotations

from typing import Any

import numpy as np

from sp_yolo.eval.confusion import Confusion, confusion
from sp_yolo.eval.records import load_detections, load_ground_truth

BOX, FAR, THIRD = [10.0, 10.0, 50.0, 40.0], [200.0, 200.0, 50.0, 40.0], [400.0, 10.0, 50.0, 40.0]


def outcome(labels: list[dict[str, Any]], boxes: list[tuple[Any, ...]], **settings: float) -> Confusion:
    truth = load_ground_truth(
        {
            "images": [{"id": 7}, {"id": 8}],
            "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
            "annotations": [{"image_id": 7, "category_id": 3, **label} for label in labels],
        }
    )
    keys = ("bbox", "category_id", "score", "image_id")
    detections = [dict(zip(keys, (*box, 7)[:4], strict=True)) for box in boxes]
    return confusion(truth, load_detections(detections, truth), **settings)


def test_hits_confusions_misses_and_false_boxes_are_counted_once_each() -> None:
    labels = [{"bbox": BOX}, {"bbox": FAR}, {"bbox": THIRD, "category_id": 5}]
    boxes = [(BOX, 3, 0.9), (FAR, 5, 0.8), ([600, 600, 20, 20], 5, 0.7), (BOX, 3, 0.25), (THIRD, 5, 0.9, 8)]
    found = outcome(labels, boxes)
    # rows predicted cat, dog, nothing; columns true cat, dog, nothing
    assert found.matrix.tolist() == [[1, 0, 0], [1, 0, 2], [0, 1, 0]]
    assert found.missed == {7: [1, 2]}
    assert found.false == {7: [1, 2], 8: [4]}
    assert found.normalised().tolist() == [[0.5, 0, 0], [0.5, 0, 1], [0, 1, 0]]


def test_the_best_overlap_wins_whatever_the_score() -> None:
    shifted = [22.0, 10.0, 50.0, 40.0]  # IoU with BOX: 38/62
    found = outcome([{"bbox": BOX}], [(shifted, 5, 0.9), (BOX, 3, 0.5)])
    assert found.matrix.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert outcome([{"bbox": BOX}], [(shifted, 3, 0.9)], iou=0.62).matrix.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert outcome([{"bbox": BOX}], [(shifted, 3, 0.9)], iou=0.61).matrix[0, 0] == 1
    assert outcome([{"bbox": BOX}], [(BOX, 3, 0.9)], confidence=0.9).matrix[2, 0] == 1


def test_a_box_on_an_ignored_label_or_in_a_crowd_is_not_false() -> None:
    inside, half_out = [20.0, 20.0, 10.0, 10.0], [56.0, 10.0, 10.0, 10.0]  # 4/10 of the second lies in BOX
    ignored = outcome([{"bbox": BOX, "ignore": 1}], [(BOX, 5, 0.9), (inside, 3, 0.8)])
    assert ignored.matrix.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]] and ignored.false == {7: [1]}
    crowd = outcome([{"bbox": BOX, "iscrowd": 1}], [(inside, 3, 0.9), (inside, 5, 0.8), (half_out, 3, 0.7)])
    assert crowd.matrix.sum() == 1 and crowd.false == {7: [2]} and crowd.missed == {}


def test_nothing_at_all() -> None:
    assert outcome([], []).matrix.tolist() == np.zeros((3, 3)).tolist()
