"""Detections -> EvalResult: COCO and VOC metrics, reports and pictures. Knows no model."""

from sp_yolo.eval.coco import ClassResult, EvalResult, coco_evaluate
from sp_yolo.eval.evaluator import CocoEvaluator
from sp_yolo.eval.original import OriginalResult, yolov7_evaluate
from sp_yolo.eval.pictures import boxes_of_targets, draw_mosaic
from sp_yolo.eval.report import per_class_table, write_report
from sp_yolo.eval.voc import VocClassResult, VocResult, voc_evaluate

__all__ = [
    "ClassResult",
    "CocoEvaluator",
    "EvalResult",
    "OriginalResult",
    "VocClassResult",
    "VocResult",
    "boxes_of_targets",
    "coco_evaluate",
    "draw_mosaic",
    "per_class_table",
    "voc_evaluate",
    "write_report",
    "yolov7_evaluate",
]
