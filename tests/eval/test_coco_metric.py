"""COCO metrics against published figures, hand calculation and a second implementation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sp_yolo.errors import NonFiniteError, UserError
from sp_yolo.eval import CocoEvaluator, coco_evaluate

ORACLE = Path(__file__).parent / "oracle"
FIGURES = (
    "AP",
    "AP50",
    "AP75",
    "APsmall",
    "APmedium",
    "APlarge",
    "AR1",
    "AR10",
    "AR100",
    "ARsmall",
    "ARmedium",
    "ARlarge",
)
SETS = {
    "coco_fakebbox100": ("instances_val2014_100.json", "instances_val2014_fakebbox100_results.json"),
    "coco_sampled_bbox": ("gt.json", "dt.json"),
    "voc100_multiclass": ("gt.json", "dt.json"),
}


def oracle(folder: str) -> tuple[Path, Path, dict[str, Any]]:
    truth, found = (ORACLE / folder / name for name in SETS[folder])
    return truth, found, json.loads((ORACLE / folder / "expected.json").read_text())


def truth_of(*annotations: dict[str, Any], images: int = 2, categories: int = 2) -> dict[str, Any]:
    return {
        "images": [{"id": n} for n in range(1, images + 1)],
        "categories": [{"id": n, "name": f"class{n}"} for n in range(1, categories + 1)],
        "annotations": [{"image_id": 1, "category_id": 1, **annotation} for annotation in annotations],
    }


def hit(bbox: list[float], score: float = 0.9, image_id: Any = 1, category_id: Any = 1) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


BOX, FAR = [10.0, 10.0, 50.0, 40.0], [200.0, 200.0, 50.0, 40.0]


@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
@pytest.mark.parametrize("folder", SETS)
def test_figures_equal_the_published_ones(folder: str, backend: str) -> None:
    truth, found, expected = oracle(folder)
    result = coco_evaluate(truth, found, backend=backend)
    published = expected.get("published", expected["pycocotools"])
    digits = 1e-6 if folder == "coco_sampled_bbox" else 1e-9  # that set is printed to six digits
    np.testing.assert_allclose(result.stats, [published[name] for name in FIGURES], rtol=0, atol=digits)
    own = expected["pycocotools"]
    np.testing.assert_allclose(result.stats, [own[name] for name in FIGURES], rtol=0, atol=1e-9)
    assert (result.map50_95, result.map50, result.map75) == result.stats[:3]
    per_class = {c.name: c for c in result.per_class}
    assert len(expected["per_class_pycocotools"]) >= 19
    for name, figures in expected["per_class_pycocotools"].items():
        assert per_class[name].ap == pytest.approx(figures["AP"], abs=1e-9)
        assert per_class[name].ap50 == pytest.approx(figures["AP50"], abs=1e-9)
    assert {c.name for c in result.per_class if c.labels} == set(expected["per_class_pycocotools"])


@pytest.mark.parametrize("folder", SETS)
def test_faster_backend_is_equal_to_1e_9_in_everything(folder: str) -> None:
    truth_path, found, _ = oracle(folder)
    truth = json.loads(truth_path.read_text())
    for annotation in truth["annotations"][::7]:
        annotation["ignore"] = 1
    slow, fast = (coco_evaluate(truth, found, backend=b) for b in ("pycocotools", "faster"))
    np.testing.assert_allclose(fast.stats, slow.stats, rtol=0, atol=1e-9)
    for a, b in zip(slow.per_class, fast.per_class, strict=True):
        assert (a.name, a.images, a.labels, a.precision, a.recall) == (
            b.name,
            b.images,
            b.labels,
            b.precision,
            b.recall,
        )
        np.testing.assert_allclose((b.ap, b.ap50, *b.ap_by_size), (a.ap, a.ap50, *a.ap_by_size), rtol=0, atol=1e-9)
    assert fast.summary_text == slow.summary_text
    assert (fast.precision, fast.recall, fast.f1) == (slow.precision, slow.recall, slow.f1)


def test_figures_equal_plain_pycocotools_bit_for_bit() -> None:
    generator = np.random.default_rng(3)
    truth = evaluator_truth(images=8)
    truth["categories"].append({"id": 3, "name": "never labelled"})
    for number, annotation in enumerate(truth["annotations"]):
        annotation.update(
            id=number + 1, iscrowd=int(number % 9 == 4), area=annotation["bbox"][2] * annotation["bbox"][3]
        )
    found = []
    for annotation in truth["annotations"]:
        for _ in range(4):
            bbox = (np.array(annotation["bbox"]) * generator.normal(1, 0.1, 4)).tolist()
            score = float(generator.integers(1, 9)) / 10  # with ties
            found.append(hit(bbox, score, annotation["image_id"], int(generator.integers(1, 4))))
    result = coco_evaluate(truth, found)
    plain_truth = COCO()
    plain_truth.dataset = truth
    plain_truth.createIndex()
    plain = COCOeval(plain_truth, plain_truth.loadRes(found), "bbox")
    plain.evaluate()
    plain.accumulate()
    plain.summarize()
    assert result.stats == tuple(plain.stats) and 0.05 < result.map50_95 < 0.9


def test_summary_is_the_twelve_lines_and_nothing_else_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    truth, found, _ = oracle("coco_fakebbox100")
    lines = coco_evaluate(truth, found).summary_text.splitlines()
    assert len(lines) == 12
    assert lines[0] == " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.505"
    assert lines[8] == " Average Recall     (AR) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.595"
    assert capsys.readouterr().out == ""


def test_ground_truth_as_detections_is_perfect_and_scores_do_not_matter() -> None:
    truth = json.loads(oracle("coco_fakebbox100")[0].read_text())
    before = json.dumps(truth)
    chance = random.Random(0)
    ordinary = [a for a in truth["annotations"] if not a["iscrowd"]]
    assert len(ordinary) < len(truth["annotations"])
    found = [hit(a["bbox"], chance.random(), a["image_id"], a["category_id"]) for a in ordinary]
    result = coco_evaluate(truth, found)
    assert result.map50_95 == pytest.approx(1.0, abs=1e-12)
    assert result.recall == result.precision == result.f1 == 1.0 and result.confidence == 0.0
    assert json.dumps(truth) == before  # the caller's dictionary is left alone


def test_crowd_and_ignored_labels_are_neither_hit_nor_miss() -> None:
    inside = [20.0, 20.0, 10.0, 10.0]  # IoU with BOX is 1/20, but it lies in it
    crowd = truth_of({"bbox": BOX, "iscrowd": 1}, {"bbox": FAR})
    assert coco_evaluate(crowd, [hit(FAR), hit(inside, 0.95), hit(inside, 0.97)]).map50_95 == pytest.approx(1.0)
    for word in ("ignore", "difficult"):
        ignored = truth_of({"bbox": BOX, word: 1}, {"bbox": FAR})
        once = coco_evaluate(ignored, [hit(FAR), hit(BOX, 0.95)])
        assert once.map50_95 == pytest.approx(1.0) and once.labels == 1 and once.precision == 1.0
        # unlike a crowd, an ignored object excuses one well-placed box only
        assert coco_evaluate(ignored, [hit(FAR), hit(inside, 0.95)]).map50_95 == pytest.approx(0.5, abs=0.01)
        assert coco_evaluate(ignored, [hit(FAR), hit(BOX, 0.97), hit(BOX, 0.95)]).map50_95 < 0.6
    counted = truth_of({"bbox": BOX, "ignore": 0, "iscrowd": 0}, {"bbox": FAR})
    assert coco_evaluate(counted, [hit(FAR)]).labels == 2


def test_precision_recall_f1_by_hand() -> None:
    # class 1: 2 labels, hits at .9 and .6, a miss at .7; class 2: 1 label, a miss at .8, the hit at .3
    truth = truth_of({"bbox": BOX}, {"bbox": FAR}, {"bbox": BOX, "category_id": 2, "image_id": 2})
    found = [hit(BOX, 0.9), hit([400, 400, 9, 9], 0.7), hit(FAR, 0.6)]
    found += [hit(FAR, 0.8, 2, 2), hit(BOX, 0.3, 2, 2)]
    result = coco_evaluate(truth, found)
    # up to .3: class 1 P 2/3 R 1 F .8; class 2 P 1/2 R 1 F 2/3: the best mean
    assert result.precision == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result.recall == 1.0
    assert result.f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert 0 <= result.confidence <= 0.3
    curves = result.curves
    at = int(np.searchsorted(curves.confidence, 0.65))
    assert curves.precision[:, at].tolist() == [0.5, 0.0] and curves.recall[:, at].tolist() == [0.5, 0.0]
    assert curves.precision[0, -1] == 1.0 and curves.recall[0, -1] == 0.0
    assert (result.images, result.labels) == (2, 3)
    assert [(c.images, c.labels) for c in result.per_class] == [(1, 2), (1, 1)]


def test_a_detection_counts_at_a_confidence_equal_to_its_score() -> None:
    curves = coco_evaluate(truth_of({"bbox": BOX}), [hit(BOX, 1.0)]).curves
    assert curves.recall[0, -1] == curves.precision[0, -1] == 1.0


def test_precision_sees_the_hundred_best_of_an_image_as_the_metric_does() -> None:
    for labelled in (False, True):
        truth = truth_of({"bbox": BOX}, *([{"bbox": FAR, "image_id": 2}] if labelled else []))
        found = [hit(BOX, 0.5), *(hit([400.0 + n, 400.0, 9.0, 9.0], 0.9, 2) for n in range(150))]
        assert coco_evaluate(truth, found).precision == pytest.approx(1 / 101)


def test_size_figures_per_class() -> None:
    small, large = [5.0, 5.0, 10.0, 10.0], [100.0, 100.0, 200.0, 200.0]
    result = coco_evaluate(truth_of({"bbox": small}, {"bbox": large}), [hit(large)])
    assert result.per_class[0].ap_by_size == (0.0, -1.0, pytest.approx(1.0))
    assert result.per_class[1].ap_by_size == (-1.0, -1.0, -1.0)
    # an annotation's own area decides, not its box
    by_mask = coco_evaluate(truth_of({"bbox": large, "area": 500.0}), [hit(large)])
    assert by_mask.per_class[0].ap_by_size == (pytest.approx(1.0), -1.0, -1.0)


@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
def test_nothing_found_and_nothing_to_find_are_zero(backend: str) -> None:
    nothing_found = coco_evaluate(truth_of({"bbox": BOX}), [], backend=backend)
    nothing_there = coco_evaluate(truth_of(), [hit(BOX)], backend=backend)
    neither = coco_evaluate(truth_of(images=1), [], backend=backend)
    for result in (nothing_found, nothing_there, neither):
        assert set(result.metrics().values()) == {0.0}
        assert all(c.ap == c.ap50 == c.precision == c.recall == 0.0 for c in result.per_class)
    assert nothing_found.stats[0] == 0.0 and nothing_there.stats == (-1.0,) * 12


def test_only_misses_are_zero_everywhere() -> None:
    result = coco_evaluate(truth_of({"bbox": BOX}), [hit(FAR)])
    assert set(result.metrics().values()) == {0.0}


def test_a_class_without_labels_takes_no_part_in_the_means() -> None:
    result = coco_evaluate(truth_of({"bbox": BOX}), [hit(BOX), hit(FAR, category_id=2)])
    assert result.map50_95 == pytest.approx(1.0) and result.precision == result.recall == 1.0
    assert result.per_class[1].labels == 0 and result.per_class[1].ap == 0.0


def test_ids_as_strings_and_repeated_annotation_ids_change_nothing() -> None:
    truth_path, found_path, _ = oracle("coco_sampled_bbox")
    truth, found = json.loads(truth_path.read_text()), json.loads(found_path.read_text())
    expected = coco_evaluate(truth, found)
    for entry in truth["images"] + truth["categories"]:
        entry["id"] = f"{entry['id']:012d}"
    for annotation in truth["annotations"]:
        annotation.update(id=0, image_id=str(annotation["image_id"]), category_id=float(annotation["category_id"]))
    for detection in found:
        detection["image_id"] = str(detection["image_id"])
    changed = coco_evaluate(truth, found)
    assert changed.stats == expected.stats and changed.metrics() == expected.metrics()


def test_a_hundred_thousand_detections() -> None:
    generator = np.random.default_rng(0)
    truth = truth_of(*({"bbox": BOX, "image_id": 1 + n % 50} for n in range(50)), images=50)
    corner = generator.uniform(300, 900, (100_000, 2))
    found = [hit([x, y, 20.0, 20.0], 0.5, 1 + n % 50) for n, (x, y) in enumerate(corner.tolist())]
    found += [hit(BOX, 0.9, n) for n in range(1, 51)]
    assert coco_evaluate(truth, found).map50_95 == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("detections", "words"),
    [
        ([hit(BOX), hit(BOX, float("nan"))], r"detections\[1\]: score nan is not a finite number"),
        ([hit([1, 2, float("inf"), 4])], r"detections\[0\]: bbox \[1.0, 2.0, inf, 4.0\] must be finite"),
        ([hit([1, 2, -3, 4])], "no negative side"),
        ([hit([1, 2, 3])], r"bbox \[1, 2, 3\] is not four numbers"),
        ([hit(BOX, "high")], "score 'high' is not a number"),  # type: ignore[arg-type]
        ([hit(BOX, image_id=77)], "image_id 77 is not among the ground truth's 2 images"),
        ([hit(BOX, category_id=12)], "category_id 12 is not among the ground truth's 2 categories"),
        ([hit(BOX, image_id="street.jpg")], r"image_id 'street.jpg' is not an integer"),
        ([hit(BOX, image_id=True)], r"image_id True is not an integer"),
        ([hit(BOX, image_id=1 << 63)], r"image_id 9223372036854775808 is not an integer \(64 bits"),
        ([hit(BOX, image_id="9" * 30)], r"is not an integer \(64 bits at most\)"),
        ([hit(BOX, image_id=1.5)], r"image_id 1.5 is not an integer"),
        ([{"image_id": 1, "category_id": 1, "bbox": BOX}], r"detections\[0\]: has no 'score'"),
        ([None], r"detections\[0\]: has no 'score'"),
        ({"annotations": []}, "must be a list of detections"),
    ],
)
def test_bad_detections_are_refused_in_one_line(detections: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        coco_evaluate(truth_of({"bbox": BOX}), detections)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": [{"id": 1}, {"id": 2}, {"id": 1}]}, r"images\[2\]: id 1 is already taken by entry 0"),
        ({"categories": [{"id": 1}, {"id": 2}, {"id": 2}]}, r"categories\[2\]: id 2 is already taken"),
        ({"images": []}, "images is empty"),
        ({"categories": []}, "categories is empty"),
        ({"images": None}, "not a COCO ground truth"),
        ({"images": [{"id": 1}, {"name": "x"}]}, r"images\[1\]: has no 'id'"),
        ({"annotations": [{"image_id": 9, "category_id": 1, "bbox": BOX}]}, "image_id 9 is not among images"),
        ({"annotations": [{"image_id": 1, "category_id": 5, "bbox": BOX}]}, "category_id 5 is not among categories"),
        ({"annotations": [{"image_id": 1, "category_id": 1, "bbox": "wide"}]}, "bbox 'wide' is not four numbers"),
        (
            {"annotations": [{"image_id": 1, "category_id": 1, "bbox": BOX, "area": "big"}]},
            "area 'big' is not a number",
        ),
    ],
)
def test_bad_ground_truth_is_refused_in_one_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        coco_evaluate({**truth_of({"bbox": BOX}), **change}, [])
    assert "\n" not in str(refused.value)


def test_files_are_named_in_the_refusal(tmp_path: Path) -> None:
    truth = tmp_path / "truth.json"
    with pytest.raises(UserError, match=r"truth\.json: no such ground truth file"):
        coco_evaluate(truth, [])
    with pytest.raises(UserError, match="cannot be read as a ground truth file: Is a directory"):
        coco_evaluate(tmp_path, [])
    truth.write_text('{"images": [],\n oops}')
    with pytest.raises(UserError, match=r"truth\.json:2: not a JSON file"):
        coco_evaluate(truth, [])
    truth.write_text(json.dumps(truth_of({"bbox": BOX})))
    found = tmp_path / "found.json"
    found.write_text(json.dumps([hit(BOX, category_id=9)]))
    with pytest.raises(UserError, match=r"found\.json\[0\]: category_id 9"):
        coco_evaluate(truth, found)
    with pytest.raises(UserError, match="backend 'slow' is unknown"):
        coco_evaluate(truth, [], backend="slow")


def collected(truth: dict[str, Any], order: list[int], rows: dict[int, torch.Tensor]) -> CocoEvaluator:
    evaluator = CocoEvaluator(truth, [1, 2], ["cat", "dog"])
    evaluator.update(order, [rows[n] for n in order])
    return evaluator


def random_rows(seed: int, images: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for image in range(1, images + 1):
        draws = torch.rand(12, 6, generator=generator)
        corner = draws[:, :2] * 100
        label = (draws[:, 5:] * 2).floor()
        rows[image] = torch.cat((corner, corner + 10 + 60 * draws[:, 2:4], draws[:, 4:5], label), 1)
    return rows


def evaluator_truth(images: int = 6) -> dict[str, Any]:
    rows = random_rows(1, images)
    annotations = [
        {"image_id": n, "category_id": 1 + int(r[5]), "bbox": [*r[:2].tolist(), *(r[2:4] - r[:2]).tolist()]}
        for n, values in rows.items()
        for r in values[:5]
    ]
    return truth_of(*annotations, images=images)


def test_evaluator_equals_its_own_detections_as_a_file(tmp_path: Path) -> None:
    truth, rows = evaluator_truth(), random_rows(1, 6)
    evaluator = collected(truth, [1, 2, 3, 4, 5, 6], rows)
    result = evaluator.compute()
    assert 0.1 < result.map50_95 < 1 and [c.name for c in result.per_class] == ["cat", "dog"]
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(evaluator.detections()))
    from_file = coco_evaluate(truth, path)
    assert from_file.stats == result.stats and from_file.metrics() == result.metrics()
    first = evaluator.detections()[0]
    corner = rows[1][0].double()
    assert first["category_id"] == 1 + int(corner[5]) and first["image_id"] == 1
    assert first["score"] == float(rows[1][0, 4])
    expected = [*corner[:2].tolist(), *(corner[2:4] - corner[:2]).tolist()]
    assert first["bbox"] == pytest.approx(expected, abs=5.1e-4) and first["bbox"] != expected


def test_evaluator_order_ranks_and_repeats_do_not_change_a_bit() -> None:
    truth, rows = evaluator_truth(), random_rows(1, 6)
    whole = collected(truth, [1, 2, 3, 4, 5, 6], rows).compute()
    first, second = collected(truth, [6, 1, 3], rows), collected(truth, [5, 2, 4, 6], rows)  # 6 pads the last batch
    first.merge([second.state()])
    assert first.compute().stats == whole.stats
    assert first.compute().metrics() == whole.metrics()


def test_evaluator_reset_and_unseen_images() -> None:
    truth, rows = evaluator_truth(), random_rows(1, 6)
    evaluator = collected(truth, [1, 2, 3, 4, 5, 6], rows)
    whole = evaluator.compute()
    evaluator.reset()
    assert evaluator.compute().map50_95 == 0.0
    evaluator.update([1, 2], [rows[1], torch.zeros(0, 6)])
    assert 0 < evaluator.compute().recall < whole.recall


def test_evaluator_maps_class_indices_to_sparse_category_ids() -> None:
    truth = truth_of({"bbox": BOX, "category_id": 90})
    truth["categories"] = [{"id": 90, "name": "toothbrush"}, {"id": 13, "name": "stop sign"}]
    evaluator = CocoEvaluator(truth, [13, 90])
    evaluator.update([1], [torch.tensor([[10.0, 10.0, 60.0, 50.0, 0.9, 1.0]])])
    assert evaluator.detections()[0]["category_id"] == 90
    result = evaluator.compute()
    assert result.map50_95 == pytest.approx(1.0) and [c.name for c in result.per_class] == ["stop sign", "toothbrush"]


def test_evaluator_refuses_what_the_data_set_does_not_have() -> None:
    with pytest.raises(UserError, match="has no category 7, which class 1 maps to"):
        CocoEvaluator(evaluator_truth(), [1, 7])
    evaluator = CocoEvaluator(evaluator_truth(), [1, 2])
    with pytest.raises(UserError, match="image id 99 is not in the ground truth"):
        evaluator.update([99], [torch.zeros(0, 6)])
    with pytest.raises(UserError, match="class index 5 found, but the data set has 2 classes"):
        evaluator.update([1], [torch.tensor([[0.0, 0, 5, 5, 0.5, 5]])])
    with pytest.raises(NonFiniteError, match="image id 1: a detection is not finite"):
        evaluator.update([1], [torch.tensor([[0.0, 0, float("nan"), 5, 0.5, 1]])])
