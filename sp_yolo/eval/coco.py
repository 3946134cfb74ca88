"""COCO detection metrics as pycocotools defines them: one number for the trainer, `sp-yolo val` and `sp-yolo eval`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.eval.curves import Curves, Matches, confidence_curves
from sp_yolo.eval.records import (
    Detections,
    DetectionSource,
    GroundTruth,
    GroundTruthSource,
    load_detections,
    load_ground_truth,
)

ALL_AREAS, SMALL, LARGE, MOST_DETECTIONS = 0, 1, 3, -1  # indices into COCOeval's areaRng and maxDets


@dataclass(frozen=True)
class ClassResult:
    """One class. Precision and recall are at IoU .5 and the confidence that maximises the mean F1.

    A class without labels has zeros here and takes no part in any mean.
    """

    name: str
    images: int  # with at least one label of the class
    labels: int  # without crowd and ignored ones
    precision: float
    recall: float
    ap50: float
    ap: float
    ap_by_size: tuple[float, float, float]  # small, medium, large; -1 where the class has no such label


@dataclass(frozen=True)
class EvalResult:
    """COCO metrics of a data set.

    `stats` and `summary_text` are pycocotools' twelve figures and lines as they are, with its -1 for "no such label in
    the ground truth"; the named means are 0.0 then. `confidence` is where precision, recall and F1 were read.
    """

    map50_95: float
    map50: float
    map75: float
    precision: float
    recall: float
    f1: float
    confidence: float
    images: int
    labels: int
    per_class: list[ClassResult]
    stats: tuple[float, ...]
    summary_text: str
    curves: Curves

    def metrics(self) -> dict[str, float]:
        """The scalar figures, ready for JSON."""
        names = ("map50_95", "map50", "map75", "precision", "recall", "f1", "confidence")
        return {name: float(getattr(self, name)) for name in names}


def coco_evaluate(ground_truth: GroundTruthSource, detections: DetectionSource, *, backend: str = "") -> EvalResult:
    """COCO metrics of detections, from files or objects.

    Args:
        ground_truth: path of a COCO JSON, or its dictionary. Crowd regions and annotations with a true `ignore` or
            `difficult` count neither as hit nor as miss.
        detections: path of a COCO results JSON, or its list: {image_id, category_id, bbox [x, y, w, h] px, score}.
        backend: "pycocotools", or "faster" for the same figures from faster-coco-eval (extra `fast`), to 1e-9 and in
            less than half of the time; "": the faster one where it is installed.

    Raises:
        UserError: malformed input; one line with the entry, the value and the rule.
        EnvironmentFault: the backend is not installed.
    """
    truth = load_ground_truth(ground_truth)
    return evaluate_records(truth, load_detections(detections, truth), backend)


def evaluate_records(truth: GroundTruth, found: Detections, backend: str) -> EvalResult:
    """`coco_evaluate` of input that has been read and checked."""
    backend = backend or ("faster" if importlib.util.find_spec("faster_coco_eval") else "pycocotools")
    truth_index, found_index = _truth_records(truth), _found_records(truth, found)
    if backend == "pycocotools":
        evaluation, summary = _run(COCO, _IgnoringCOCOeval, truth_index, found_index)
        matches = _matches(evaluation, truth)
    elif backend == "faster":
        evaluation, summary = _run_faster(truth_index, found_index)
        # that backend keeps its matches to itself; one threshold and one area are cheap to repeat here
        short, _ = _run(COCO, _IgnoringCOCOeval, truth_index, found_index, only_iou50=True)
        matches = _matches(short, truth)
    else:
        raise UserError(f"backend {backend!r} is unknown: pycocotools or faster")
    return _result(truth, evaluation, summary, matches)


class _IgnoringCOCOeval(COCOeval):
    """COCOeval that honours an annotation's `ignore`, which pycocotools overwrites with `iscrowd`."""

    def _prepare(self) -> None:
        super()._prepare()
        for annotation in self.cocoGt.dataset["annotations"]:
            annotation["ignore"] = annotation["skip"]

    def computeIoU(self, imgId: int, catId: int) -> Any:
        """The same, where there is a label: elsewhere `evaluateImg` does not ask for it."""
        return super().computeIoU(imgId, catId) if self._gts.get((imgId, catId)) else []

    def evaluateImg(self, imgId: int, catId: int, aRng: Any, maxDet: int) -> Any:
        """The same result, without looping over thresholds and detections where there is no label to match."""
        found = self._dts.get((imgId, catId), [])
        if self._gts.get((imgId, catId)) or not found:
            return super().evaluateImg(imgId, catId, aRng, maxDet)
        found = sorted(found, key=lambda detection: -detection["score"])[:maxDet]
        area = np.array([detection["area"] for detection in found])
        thresholds = len(self.params.iouThrs)
        return {
            "dtMatches": np.zeros((thresholds, len(found))),
            "gtIgnore": np.zeros(0),
            "dtScores": [detection["score"] for detection in found],
            "dtIgnore": np.tile((area < aRng[0]) | (area > aRng[1]), (thresholds, 1)),
        }


def _truth_records(truth: GroundTruth) -> dict[str, Any]:
    columns = zip(
        truth.image_ids.tolist(),
        truth.category_ids.tolist(),
        truth.boxes_xywh.tolist(),
        truth.areas.tolist(),
        truth.crowd.astype(int).tolist(),
        truth.ignore.astype(int).tolist(),
        strict=True,
    )
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd", "skip")
    # pycocotools reads id 0 as "not matched", so ids are ours and start at 1
    return _records(truth, [{"id": n, **dict(zip(keys, row, strict=True))} for n, row in enumerate(columns, 1)])


def _found_records(truth: GroundTruth, found: Detections) -> dict[str, Any]:
    columns = zip(
        found.image_ids.tolist(),
        found.category_ids.tolist(),
        found.boxes_xywh.tolist(),
        (found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3]).tolist(),
        found.scores.tolist(),
        strict=True,
    )
    keys = ("image_id", "category_id", "bbox", "area", "score")
    rows = [{"id": n, "iscrowd": 0, **dict(zip(keys, row, strict=True))} for n, row in enumerate(columns, 1)]
    return _records(truth, rows)


def _records(truth: GroundTruth, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "images": [{"id": number} for number in truth.images],
        "categories": [{"id": number, "name": name} for number, name in truth.categories.items()],
        "annotations": annotations,
    }


def _run(
    index: Any, evaluator: Any, truth: dict[str, Any], found: dict[str, Any], *, only_iou50: bool = False
) -> tuple[Any, str]:
    """Evaluate with an implementation of the pycocotools interface -> (COCOeval, its twelve lines)."""
    with contextlib.redirect_stdout(io.StringIO()):
        indices = []
        for dataset in (truth, found):
            indices.append(index())
            indices[-1].dataset = dataset
            indices[-1].createIndex()
        evaluation = evaluator(*indices, "bbox")
        if only_iou50:
            evaluation.params.iouThrs = evaluation.params.iouThrs[:1]
            evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
            evaluation.evaluate()
            return evaluation, ""
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        evaluation.summarize()
    return evaluation, lines.getvalue().rstrip("\n")


def _run_faster(truth: dict[str, Any], found: dict[str, Any]) -> tuple[Any, str]:
    try:
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        raise EnvironmentFault("the faster backend needs faster-coco-eval: pip install 'sp-yolo[fast]'") from None

    class Ignoring(COCOeval_faster):
        def _prepare(self) -> None:
            super()._prepare()
            for annotation in self.cocoGt.dataset["annotations"]:
                annotation["ignore"] = annotation["skip"]

    lines: list[str] = []

    def build(*arguments: Any) -> Any:
        evaluation = Ignoring(*arguments)
        evaluation.print_function = lines.append
        return evaluation

    evaluation, _ = _run(FasterCOCO, build, truth, found)
    figures = [line for line in lines if line.startswith(" Average")]
    return evaluation, "\n".join(figures[:12])  # it adds two lines of its own


def _matches(evaluation: Any, truth: GroundTruth) -> list[Matches]:
    """Per category, COCOeval's own hits and misses at IoU .5 over all areas, as `Matches`."""
    per_image, images = evaluation.evalImgs, len(truth.images)
    areas = len(evaluation.params.areaRng)
    result = []
    for k in range(len(truth.categories)):
        start = k * areas * images  # area "all" comes first
        entries = [entry for entry in per_image[start : start + images] if entry is not None]
        scores = np.concatenate([np.zeros(0), *(entry["dtScores"] for entry in entries)])
        hit = np.concatenate([np.zeros(0), *(entry["dtMatches"][0] for entry in entries)]) > 0
        skipped = np.concatenate([np.zeros(0), *(entry["dtIgnore"][0] for entry in entries)]) > 0
        labels = sum(int(np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)) for entry in entries)
        result.append(Matches(scores[~skipped], hit[~skipped], labels))
    return result


def _result(truth: GroundTruth, evaluation: Any, summary: str, matches: list[Matches]) -> EvalResult:
    precision = evaluation.eval["precision"]  # [IoU, recall, class, area, max detections], -1 where undefined
    stats = tuple(float(value) for value in evaluation.stats[:12])
    curves = confidence_curves(
        list(truth.categories.values()), matches, precision[0, :, :, ALL_AREAS, MOST_DETECTIONS].T
    )
    counted = ~truth.ignore
    per_class = []
    for k, (number, name) in enumerate(truth.categories.items()):
        mine = counted & (truth.category_ids == number)
        sizes = [_mean(precision[:, :, k, area, MOST_DETECTIONS], -1.0) for area in range(SMALL, LARGE + 1)]
        per_class.append(
            ClassResult(
                name=name,
                images=len(np.unique(truth.image_ids[mine])),
                labels=int(mine.sum()),
                precision=float(curves.precision[k, curves.best]),
                recall=float(curves.recall[k, curves.best]),
                ap50=_mean(precision[0, :, k, ALL_AREAS, MOST_DETECTIONS], 0.0),
                ap=_mean(precision[:, :, k, ALL_AREAS, MOST_DETECTIONS], 0.0),
                ap_by_size=(sizes[0], sizes[1], sizes[2]),
            )
        )
    mean_precision, mean_recall, mean_f1 = curves.means_at_best()
    return EvalResult(
        map50_95=max(stats[0], 0.0),
        map50=max(stats[1], 0.0),
        map75=max(stats[2], 0.0),
        precision=mean_precision,
        recall=mean_recall,
        f1=mean_f1,
        confidence=float(curves.confidence[curves.best]),
        images=len(truth.images),
        labels=int(counted.sum()),
        per_class=per_class,
        stats=stats,
        summary_text=summary,
        curves=curves,
    )


def _mean(values: np.ndarray, otherwise: float) -> float:
    """Mean over the defined entries, as COCOeval's summarize does."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else otherwise
