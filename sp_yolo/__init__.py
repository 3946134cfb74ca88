"""sp-yolo: YOLOv7 detectors trained with the Spectral Proximal (SP) optimizer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sp_yolo.detector import Detector
    from sp_yolo.engine import Trainer
    from sp_yolo.optim import SP, build_param_groups
    from sp_yolo.trackers import Callback

__version__ = "0.2.0"
__all__ = ["SP", "Callback", "Detector", "Trainer", "__version__", "build_param_groups"]

_HOMES = {
    "SP": "sp_yolo.optim",
    "build_param_groups": "sp_yolo.optim",
    "Detector": "sp_yolo.detector",
    "Trainer": "sp_yolo.engine",
    "Callback": "sp_yolo.trackers",
}


def __getattr__(name: str) -> Any:
    """The public names on demand: who wants the optimizer alone does not wait for OpenCV."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
