"""For torch.hub: ``torch.hub.load("OWNER/REPO", "yolov7")``; of a checkout, with weights of one's own,
``torch.hub.load(DIR, "custom", source="local", weights=FILE)``.

Every entry gives a detector: call it with an image. The weights' licence is printed when they are downloaded.
"""

dependencies = ["torch", "torchvision", "cv2", "yaml", "safetensors"]

from functools import partial as _partial  # noqa: E402 (torch.hub reads `dependencies` first)
from typing import Any as _Any  # noqa: E402

from sp_yolo import Detector as _Detector  # noqa: E402


def custom(weights: str, **settings: _Any) -> _Detector:
    """A detector of any weights that `sp-yolo predict` takes. ``settings``: those of sp_yolo.Detector."""
    return _Detector(weights, **settings)


yolov7 = _partial(custom, "yolov7")
yolov7x = _partial(custom, "yolov7x")
yolov7_tiny = _partial(custom, "yolov7-tiny")
yolov7_w6 = _partial(custom, "yolov7-w6", image_size=1280)
yolov7_e6 = _partial(custom, "yolov7-e6", image_size=1280)
yolov7_d6 = _partial(custom, "yolov7-d6", image_size=1280)
yolov7_e6e = _partial(custom, "yolov7-e6e", image_size=1280)
