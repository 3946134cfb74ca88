"""Small networks: what a flag, a fault or a tool does to a run shows on them in a tenth of the time."""

import torch
import yaml

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
