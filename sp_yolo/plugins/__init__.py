"""SP inside other people's trainers: the original YOLOv7, ultralytics, any torch loop (docs/plugins.md)."""

from typing import Any

from sp_yolo.plugins.generic import swap_optimizer
from sp_yolo.plugins.yolov7 import patch_yolov7

__all__ = ["SPTrainer", "patch_yolov7", "swap_optimizer"]


def __getattr__(name: str) -> Any:
    """SPTrainer on demand: its base class is ultralytics', which is nobody's dependency here."""
    if name != "SPTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sp_yolo.plugins.ultralytics import SPTrainer

    return SPTrainer
