"""VOC average precision against published figures and cases small enough to work out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sp_yolo.errors import UserError
from sp_yolo.eval import voc_evaluate

ORACLE = Path(__file__).parent / "oracle"
KEYS = {"voc07": "AP_11point", "voc12": "AP_every_point"}


def sample7() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "object"}]}
    found = []
    for image, path in enumerate(sorted((ORACLE / "voc_sample7" / "groundtruths").glob("*.txt")), 1):
        truth["images"].append({"id": image})
        for line in path.read_text().splitlines():
            _, *box = line.split()
            truth["annotations"].append({"image_id": image, "category_id": 1, "bbox": [float(v) for v in box]})
        for line in (ORACLE / "voc_sample7" / "detections" / path.name).read_text().splitlines():
            _, score, *box = line.split()
            bbox = [float(v) for v in box]
            found.append({"image_id": image, "category_id": 1, "bbox": bbox, "score": float(score)})
    return truth, found


@pytest.mark.parametrize("metric", KEYS)
def test_published_values_of_the_seven_images(metric: str) -> None:
    truth, found = sample7()
    expected = json.loads((ORACLE / "voc_sample7" / "expected.json").read_text())
    assert (len(truth["annotations"]), len(found), len(expected["iou"])) == (15, 24, 4)
    for iou, value in zip(expected["iou"], expected[KEYS[metric]], strict=True):
        result = voc_evaluate(truth, found, iou, metric)
        assert result.mean_ap == pytest.approx(value, abs=1e-10)  # printed to ten digits, cut off
        assert result.per_class[0].ap == result.mean_ap


@pytest.mark.parametrize("metric", KEYS)
def test_twenty_classes(metric: str) -> None:
    folder = ORACLE / "voc100_multiclass"
    expected = json.loads((folder / "expected.json").read_text())["voc"]["iou_plus1"]
    result = voc_evaluate(folder / "gt.json", folder / "dt.json", metric=metric)
    assert result.mean_ap == pytest.approx(expected[f"m{KEYS[metric]}"], abs=1e-9)
    assert len(result.per_class) == 20
    for found in result.per_class:
        one = expected[found.name]
        assert found.ap == pytest.approx(one[KEYS[metric]], abs=1e-9)
        assert (found.labels, found.detections) == (one["n_gt"], one["n_dt"])
    assert f"= {result.mean_ap:.4f}" in result.summary_text and "\n" not in result.summary_text


def small(*annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [{"image_id": 1, "category_id": 1, **annotation} for annotation in annotations],
    }


def det(bbox: list[float], score: float, image: int = 1, category: int = 1) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score}


BOX, FAR = [10.0, 10.0, 50.0, 40.0], [200.0, 200.0, 50.0, 40.0]


def test_average_precision_by_hand() -> None:
    # hit, miss, hit with two labels: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1
    found = [det(BOX, 0.9), det([400, 400, 9, 9], 0.8), det(FAR, 0.7)]
    truth = small({"bbox": BOX}, {"bbox": FAR})
    every = voc_evaluate(truth, found, metric="voc12").per_class[0]
    assert every.ap == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert every.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3]) and every.recall.tolist() == [0.5, 0.5, 1]
    assert (every.images, every.labels, every.detections, every.true_positives) == (1, 2, 3, 2)
    eleven = voc_evaluate(truth, found, metric="voc07")
    assert eleven.mean_ap == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert voc_evaluate(truth, [], metric="voc07").mean_ap == 0.0


def test_the_last_pixel_counts() -> None:
    # columns 0..9 against 0..19 of one row: 10/20 = .5 is a hit; without "+1" it would be 9/19
    truth = small({"bbox": [0, 0, 19, 0]})
    assert voc_evaluate(truth, [det([0, 0, 9, 0], 0.9)]).mean_ap == 1.0
    assert voc_evaluate(truth, [det([0, 0, 8, 0], 0.9)]).mean_ap == 0.0


def test_a_label_is_found_once_and_there_is_no_second_choice() -> None:
    close = [12.0, 10.0, 50.0, 40.0]
    truth = small({"bbox": BOX}, {"bbox": close})
    # both detections overlap BOX most: the second is a miss although `close` is free and overlaps it too
    result = voc_evaluate(truth, [det(BOX, 0.9), det([10.5, 10, 50, 40], 0.8)])
    assert result.per_class[0].true_positives == 1
    assert result.mean_ap == 0.5


@pytest.mark.parametrize("word", ["difficult", "ignore", "iscrowd"])
def test_difficult_labels_are_neither_hit_nor_miss(word: str) -> None:
    truth = small({"bbox": BOX, word: 1}, {"bbox": FAR})
    found = [det(BOX, 0.95), det([11, 10, 50, 40], 0.93), det(FAR, 0.9)]
    result = voc_evaluate(truth, found)
    assert result.mean_ap == 1.0 and result.per_class[0].labels == 1
    assert len(result.per_class[0].precision) == 1


def test_classes_and_images_are_kept_apart() -> None:
    truth = small({"bbox": BOX}, {"bbox": BOX, "category_id": 2, "image_id": 2})
    result = voc_evaluate(truth, [det(BOX, 0.9, 2, 1), det(BOX, 0.8, 1, 1), det(BOX, 0.7, 2, 2)])
    assert [c.ap for c in result.per_class] == [0.5, 1.0]
    only_one = voc_evaluate(small({"bbox": BOX}), [det(BOX, 0.9), det(BOX, 0.9, 1, 2)])
    assert only_one.mean_ap == 1.0 and only_one.per_class[1].ap == 0.0
    assert voc_evaluate(small(), [det(BOX, 0.9)]).mean_ap == 0.0


def test_bad_arguments_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="metric 'voc08' is unknown: voc07 or voc12"):
        voc_evaluate(small(), [], metric="voc08")
    with pytest.raises(UserError, match="iou 0 must be above 0"):
        voc_evaluate(small(), [], iou=0)
    with pytest.raises(UserError, match="score nan is not a finite number"):
        voc_evaluate(small({"bbox": BOX}), [det(BOX, float("nan"))])
