"""`sp-yolo eval GT DETECTIONS`: metrics of a detections file, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sp_yolo.config import REQUIRED, Rule, option
from sp_yolo.errors import StorageError, UserError
from sp_yolo.eval.coco import coco_evaluate
from sp_yolo.eval.voc import VocResult, voc_evaluate
from sp_yolo.report.evaluation import per_class_table, write_report

EXAMPLES = """
  {prog} instances_val2017.json detections.json
  {prog} truth.json detections.json --metric voc07 --iou 0.5
  {prog} truth.json detections.json --report runs/eval
"""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluation."""

    ground_truth: str = option(REQUIRED, "COCO ground truth (JSON)", "ground_truth")
    detections: str = option(
        REQUIRED, "COCO results (JSON): a list of {image_id, category_id, bbox, score}", "detections"
    )
    metric: str = option("coco", "metric", rule=Rule(words=("coco", "voc07", "voc12")))
    iou_thres: float | None = option(None, "IoU threshold of the VOC metrics (default 0.5)", "--iou-thres", "--iou")
    fast: bool = option(False, "COCO figures by faster-coco-eval (extra `fast`), the default where it is installed")
    report: str = option("", "write report.html, per_class.csv and the plots there (COCO)", metavar="DIR")


OPTIONS = (EvalOptions,)


def run(options: EvalOptions) -> int:
    """Print the metrics; returns the exit code.

    Raises:
        UserError: malformed input, or a flag that does not belong to the metric.
    """
    if options.metric == "coco":
        if options.iou_thres is not None:
            raise UserError("--iou-thres belongs to --metric voc07 and voc12; COCO averages over its own ten")
        return _run_coco(options)
    for flag, given in (("--fast", options.fast), ("--report", options.report)):
        if given:
            raise UserError(f"{flag} belongs to --metric coco, not {options.metric}")
    iou = 0.5 if options.iou_thres is None else options.iou_thres
    print(_voc_table(voc_evaluate(options.ground_truth, options.detections, iou, options.metric)))
    return 0


def _run_coco(options: EvalOptions) -> int:
    backend = "faster" if options.fast else ""
    result = coco_evaluate(options.ground_truth, options.detections, backend=backend)
    print(per_class_table(result))
    print(f"\n{result.summary_text}")
    if options.report:
        folder = Path(options.report)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"--report {folder}: cannot be made: {error.strerror}") from None
        facts = {"ground truth": options.ground_truth, "detections": options.detections}
        title = f"Evaluation of {Path(options.detections).name}"
        notes = write_report(folder, result, options.ground_truth, options.detections, title=title, facts=facts)
        print("\n" + "\n".join(notes))
    return 0


def _voc_table(result: VocResult) -> str:
    lines = [("%20s" + "%12s" * 5) % ("Class", "Images", "Labels", "Detections", "Hits", "AP")]
    for c in result.per_class:
        lines.append(
            ("%20s" + "%12i" * 4 + "%12.4f") % (c.name[:20], c.images, c.labels, c.detections, c.true_positives, c.ap)
        )
    return "\n".join([*lines, "", result.summary_text])
