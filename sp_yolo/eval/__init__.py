"""Detections -> EvalResult: COCO and VOC metrics. Knows no model and draws nothing."""

from sp_yolo.eval.coco import ClassResult, EvalResult, coco_evaluate
from sp_yolo.eval.evaluator import CocoEvaluator
from sp_yolo.eval.original import OriginalResult, yolov7_evaluate
from sp_yolo.eval.voc import VocClassResult, VocResult, voc_evaluate

__all__ = [
    "ClassResult",
    "CocoEvaluator",
    "EvalResult",
    "OriginalResult",
    "VocClassResult",
    "VocResult",
    "coco_evaluate",
    "voc_evaluate",
    "yolov7_evaluate",
]
