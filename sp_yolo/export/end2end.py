"""NMS inside an ONNX file: what it takes, the graph nodes, and the same computation outside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

from sp_yolo.boxes import cxcywh_to_xyxy
from sp_yolo.errors import UserError

NMS_INPUTS = ("detections", "nms_boxes", "nms_scores")


@dataclass(frozen=True)
class EndToEnd:
    """Settings of the NMS inside an ONNX file.

    ``max_wh``: pixels that boxes of neighbouring classes are moved apart, so that classes do not suppress each other;
    0 lets them. ``topk`` detections are kept per image.
    """

    topk: int = 100
    iou_thres: float = 0.45
    conf_thres: float = 0.25
    max_wh: float = 4096

    def __post_init__(self) -> None:
        if self.topk < 1 or self.max_wh < 0 or not 0 <= self.iou_thres <= 1 or not 0 <= self.conf_thres <= 1:
            raise UserError(f"end2end: topk from 1, max-wh from 0, thresholds in 0..1 are needed, got {self}")


def nms_inputs(decoded: Tensor, max_wh: float, label: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Decoded boxes [B, N, 5+nc] -> (detections [B, N, 6]: x1, y1, x2, y2 in pixels, class, score; the boxes that NMS
    compares [B, N, 4], moved by class * max_wh; the scores [B, 1, N]: objectness * class).

    ``label`` [B, N, 1] are the classes to take, by default each box's best.
    """
    boxes_xyxy = cxcywh_to_xyxy(decoded[..., :4])
    label = decoded[..., 5:].argmax(-1, keepdim=True) if label is None else label
    score = decoded[..., 4:5]
    if decoded.shape[-1] > 6:
        score = score * decoded[..., 5:].gather(-1, label)
    label = label.to(decoded.dtype)
    return torch.cat((boxes_xyxy, label, score), -1), boxes_xyxy + label * max_wh, score.transpose(1, 2)


def with_nms(graph: Any, settings: EndToEnd) -> Any:
    """A copy of an ONNX model with outputs detections, nms_boxes, nms_scores, and NMS behind them.

    Its output [K, 7] has a row per kept box: image index, x1, y1, x2, y2, class, score.
    """
    from onnx import TensorProto, helper

    result = type(graph)()
    result.CopyFrom(graph)
    nodes, constants = result.graph.node, result.graph.initializer
    constants.append(helper.make_tensor("nms_topk", TensorProto.INT64, [1], [settings.topk]))
    constants.append(helper.make_tensor("nms_iou", TensorProto.FLOAT, [1], [settings.iou_thres]))
    constants.append(helper.make_tensor("nms_confidence", TensorProto.FLOAT, [1], [settings.conf_thres]))
    constants.append(helper.make_tensor("nms_image", TensorProto.INT64, [1], [0]))
    constants.append(helper.make_tensor("nms_image_and_box", TensorProto.INT64, [2], [0, 2]))
    limits = ["nms_topk", "nms_iou", "nms_confidence"]
    for operation, sources, target, attributes in (
        ("NonMaxSuppression", ["nms_boxes", "nms_scores", *limits], "nms_selected", {}),
        ("Gather", ["nms_selected", "nms_image"], "nms_image_index", {"axis": 1}),
        ("Gather", ["nms_selected", "nms_image_and_box"], "nms_place", {"axis": 1}),
        ("Cast", ["nms_image_index"], "nms_image_column", {"to": TensorProto.FLOAT}),
        ("GatherND", ["detections", "nms_place"], "nms_kept", {}),
        ("Concat", ["nms_image_column", "nms_kept"], "output", {"axis": 1}),
    ):
        nodes.append(helper.make_node(operation, sources, [target], **attributes))
    del result.graph.output[:]
    result.graph.output.append(helper.make_tensor_value_info("output", TensorProto.FLOAT, ["detections_kept", 7]))
    return result


def reference_nms(inputs: Sequence[Tensor], settings: EndToEnd) -> Tensor:
    """What ``with_nms`` computes of the three NMS_INPUTS, by torchvision: [K, 7], image by image, best score first."""
    detections, boxes, scores = inputs
    rows = []
    for index, (own, own_boxes, own_scores) in enumerate(zip(detections, boxes, scores[:, 0], strict=True)):
        passed = torch.nonzero(own_scores > settings.conf_thres)[:, 0]
        kept = passed[nms(own_boxes[passed], own_scores[passed], settings.iou_thres)[: settings.topk]]
        rows.append(torch.cat((torch.full((len(kept), 1), float(index)), own[kept]), 1))
    return torch.cat(rows)
