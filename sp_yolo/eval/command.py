"""`sp-yolo eval GT DETECTIONS`: metrics of a detections file, without a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from sp_yolo.errors import StorageError, UserError
from sp_yolo.eval.coco import coco_evaluate
from sp_yolo.eval.report import per_class_table, write_report
from sp_yolo.eval.voc import VocResult, voc_evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ground_truth", help="COCO ground truth (JSON)")
    parser.add_argument("detections", help="COCO results (JSON): a list of {image_id, category_id, bbox, score}")
    parser.add_argument("--metric", choices=("coco", "voc07", "voc12"), default="coco")
    parser.add_argument("--iou-thres", "--iou", type=float, help="IoU threshold of the VOC metrics (default 0.5)")
    parser.add_argument("--fast", action="store_true", help="COCO figures by faster-coco-eval (extra `fast`)")
    parser.add_argument("--report", metavar="DIR", help="write report.html, per_class.csv and the plots there (COCO)")


def run(arguments: argparse.Namespace) -> int:
    """Print the metrics; returns the exit code.

    Raises:
        UserError: malformed input, or a flag that does not belong to the metric.
    """
    if arguments.metric == "coco":
        if arguments.iou_thres is not None:
            raise UserError("--iou-thres belongs to --metric voc07 and voc12; COCO averages over its own ten")
        return _run_coco(arguments)
    for flag, given in (("--fast", arguments.fast), ("--report", arguments.report)):
        if given:
            raise UserError(f"{flag} belongs to --metric coco, not {arguments.metric}")
    iou = 0.5 if arguments.iou_thres is None else arguments.iou_thres
    print(_voc_table(voc_evaluate(arguments.ground_truth, arguments.detections, iou, arguments.metric)))
    return 0


def _run_coco(arguments: argparse.Namespace) -> int:
    backend = "faster" if arguments.fast else "pycocotools"
    result = coco_evaluate(arguments.ground_truth, arguments.detections, backend=backend)
    print(per_class_table(result))
    print(f"\n{result.summary_text}")
    if arguments.report:
        folder = Path(arguments.report)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"--report {folder}: cannot be made: {error.strerror}") from None
        facts = {"ground truth": arguments.ground_truth, "detections": arguments.detections}
        title = f"Evaluation of {Path(arguments.detections).name}"
        notes = write_report(folder, result, arguments.ground_truth, arguments.detections, title=title, facts=facts)
        print("\n" + "\n".join(notes))
    return 0


def _voc_table(result: VocResult) -> str:
    lines = [("%20s" + "%12s" * 5) % ("Class", "Images", "Labels", "Detections", "Hits", "AP")]
    for c in result.per_class:
        lines.append(
            ("%20s" + "%12i" * 4 + "%12.4f") % (c.name[:20], c.images, c.labels, c.detections, c.true_positives, c.ap)
        )
    return "\n".join([*lines, "", result.summary_text])
