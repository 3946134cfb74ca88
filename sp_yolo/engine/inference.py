"""A model as it is only looked at, never trained."""

from __future__ import annotations

import copy

from torch import nn

from sp_yolo.models import DetectionModel
from sp_yolo.runtime.device import Compute


def for_inference(model: DetectionModel, compute: Compute) -> DetectionModel:
    """``model``; on a GPU with autocast a copy whose convolutions hold their weights in the type they compute in.

    Autocast would round them in every forward pass, a hundred small kernels; the rounded numbers are the same. The head
    is left alone: it merges its weights in float32 first.
    """
    if compute.amp is None or compute.device.type != "cuda":
        return model
    model = copy.deepcopy(model)
    of_head = set(model.head.modules())
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module not in of_head:
            module.to(compute.amp)
    return model
