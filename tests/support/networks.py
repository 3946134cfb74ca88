"""Small networks: what a flag, a fault or a tool does to a run shows on them in a tenth of the time."""

import torch
import yaml
from torch import nn

from sp_yolo.models import DetectionModel, build_model

# 9,000 parameters, strides 2, 4 and 8

MINI = """
nc: 6
depth_multiple: 1.0
width_multiple: 1.0
anchors: [[8,8, 12,12, 16,16], [20,20, 28,28, 36,36], [40,40, 50,50, 60,60]]
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [1, 1, Conv, [16, 1, 1]]
  - [2, 1, Conv, [16, 1, 1]]
  - [3, 1, Conv, [16, 1, 1]]
  - [[4, 5, 6], 1, IDetect, [nc, anchors]]
"""


def mini(classes: int = 6) -> DetectionModel:
    torch.manual_seed(0)
    return build_model(yaml.safe_load(MINI), classes)


def one_layer(kernel: int, head: str) -> DetectionModel:
    """The least that is a model: one convolution and a head of two classes."""
    backbone, heads = [[-1, 1, "Conv", [8, kernel, 8]]], [[[0], 1, head, ["nc", "anchors"]]]
    return build_model({"nc": 2, "anchors": [[10, 10]], "backbone": backbone, "head": heads})


def model_with_detections(classes: int = 3, head: str = "IAuxDetect") -> DetectionModel:
    """Strides 8 and 16; statistics and biases such that an image has dozens of confident boxes of every class."""
    auxiliary = [[3, 1, "Conv", [16, 3, 1]], [2, 1, "Conv", [16, 3, 2]]] if head == "IAuxDetect" else []
    inputs = [3, 4, 5, 6] if auxiliary else [3, 4]
    torch.manual_seed(5)
    model = build_model(
        {
            "nc": classes,
            "anchors": [[24, 24, 40, 30], [60, 50, 80, 90]],
            "backbone": [[-1, 1, "ReOrg", []], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "DownC", [32]]],
            "head": [
                [-1, 1, "RepConv", [32, 3, 1]],
                [-2, 1, "Conv", [40, 3, 2, None, 1, "nn.LeakyReLU(0.1)"]],
                *auxiliary,
                [inputs, 1, head, ["nc", "anchors"]],
            ],
        }
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, 0, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 0.4)
    for conv in model.head.m:
        nn.init.normal_(conv.weight, 0, 0.2)
        nn.init.constant_(conv.bias, 0.3)
    return model.eval()
