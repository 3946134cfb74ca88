"""NMS inside an ONNX file: what it takes, the graph nodes, and the same computation outside it.

Three forms of it. ``rows``: one output [K, 7], a row per kept box of any image. ``efficient``: the four outputs of
TensorRT's EfficientNMS, made of standard operators, so that any runtime has them. ``tensorrt``: that plug-in itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from sp_yolo.boxes import cxcywh_to_xyxy
from sp_yolo.errors import UserError

FORMS = ("rows", "efficient", "tensorrt")
# What the network hands to NMS, by the kind of output; and what the file then returns.
NMS_INPUTS = {"rows": ("detections", "nms_boxes", "nms_scores"), "efficient": ("nms_boxes", "nms_scores")}
NMS_OUTPUTS = {"rows": ("output",), "efficient": ("num_dets", "det_boxes", "det_scores", "det_classes")}


@dataclass(frozen=True)
class EndToEnd:
    """Settings of the NMS inside an ONNX file.

    ``max_wh``: pixels that boxes of neighbouring classes are moved apart, so that classes do not suppress each other;
    0 lets them. ``topk`` detections are kept per image. ``form``: see the module. In ``rows`` a box has its best class;
    in the others, as in the plug-in, every class above ``conf_thres``, each suppressed for itself.
    """

    topk: int = 100
    iou_thres: float = 0.45
    conf_thres: float = 0.25
    max_wh: float = 4096
    form: str = "rows"

    def __post_init__(self) -> None:
        if self.topk < 1 or self.max_wh < 0 or not 0 <= self.iou_thres <= 1 or not 0 <= self.conf_thres <= 1:
            raise UserError(f"end2end: topk from 1, max-wh from 0, thresholds in 0..1 are needed, got {self}")
        if self.form not in FORMS:
            raise UserError(f"end2end: form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if self.form != "rows" and not self.max_wh:
            raise UserError(f"end2end: max-wh 0 (NMS over all classes) is for the form rows, not {self.form}")

    @property
    def kind(self) -> str:
        """The kind of the file's outputs."""
        return "rows" if self.form == "rows" else "efficient"


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


def suppression_inputs(decoded: Tensor) -> tuple[Tensor, Tensor]:
    """Decoded boxes [B, N, 5+nc] -> (corners [B, N, 4] in pixels, scores [B, N, nc]: objectness * class)."""
    scores = decoded[..., 4:5]
    if decoded.shape[-1] > 6:
        scores = scores * decoded[..., 5:]
    return cxcywh_to_xyxy(decoded[..., :4]), scores


def with_nms(graph: Any, settings: EndToEnd) -> Any:
    """A copy of an ONNX model whose outputs are NMS_INPUTS, with NMS behind them.

    rows: ``output`` [K, 7], a row per kept box: image index, x1, y1, x2, y2, class, score.
    efficient, tensorrt: num_dets [B, 1] int32, det_boxes [B, topk, 4], det_scores [B, topk], det_classes [B, topk]
    int32; best first. Behind the last detection ours has zeros and class -1; the plug-in leaves that open.
    """
    result = type(graph)()
    result.CopyFrom(graph)
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0]
    size = batch.dim_param or batch.dim_value
    del result.graph.output[:]
    {"rows": _add_rows, "efficient": _add_efficient, "tensorrt": _add_plugin}[settings.form](result, settings, size)
    return result


def _add(graph: Any, constants: dict[str, Any], nodes: Sequence[tuple[str, str, str, dict[str, Any]]]) -> None:
    """``constants``: name -> NumPy array. A node: operator, inputs and outputs apart by blanks, attributes."""
    from onnx import helper, numpy_helper

    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    graph.node.extend(
        helper.make_node(operator, sources.split(), targets.split(), **attributes)
        for operator, sources, targets, attributes in nodes
    )


def _limits(settings: EndToEnd) -> dict[str, Any]:
    return {
        "nms_topk": np.array([settings.topk], np.int64),
        "nms_iou": np.array([settings.iou_thres], np.float32),
        "nms_confidence": np.array([settings.conf_thres], np.float32),
    }


def _add_rows(model: Any, settings: EndToEnd, size: str | int) -> None:
    from onnx import TensorProto, helper

    places = {"nms_image": np.array([0]), "nms_image_and_box": np.array([0, 2])}
    nodes: list[tuple[str, str, str, dict[str, Any]]] = [
        ("NonMaxSuppression", "nms_boxes nms_scores nms_topk nms_iou nms_confidence", "nms_selected", {}),
        ("Gather", "nms_selected nms_image", "nms_image_index", {"axis": 1}),
        ("Gather", "nms_selected nms_image_and_box", "nms_place", {"axis": 1}),
        ("Cast", "nms_image_index", "nms_image_column", {"to": TensorProto.FLOAT}),
        ("GatherND", "detections nms_place", "nms_kept", {}),
        ("Concat", "nms_image_column nms_kept", "output", {"axis": 1}),
    ]
    _add(model.graph, {**_limits(settings), **places}, nodes)
    model.graph.output.append(helper.make_tensor_value_info("output", TensorProto.FLOAT, ["detections_kept", 7]))


def _efficient_outputs(model: Any, settings: EndToEnd, size: str | int) -> None:
    from onnx import TensorProto, helper

    shapes = {"num_dets": [size, 1], "det_boxes": [size, settings.topk, 4]}
    for name in NMS_OUTPUTS["efficient"]:
        kind = TensorProto.INT32 if name in ("num_dets", "det_classes") else TensorProto.FLOAT
        shape = shapes.get(name, [size, settings.topk])
        model.graph.output.append(helper.make_tensor_value_info(name, kind, shape))


def _add_plugin(model: Any, settings: EndToEnd, size: str | int) -> None:
    """TensorRT's plug-in, attributes as its README lists them: corners, scores as they are, no background class."""
    from onnx import helper

    attributes = {
        "plugin_version": "1",
        "background_class": -1,
        "box_coding": 0,
        "score_activation": 0,
        "max_output_boxes": settings.topk,
        "iou_threshold": settings.iou_thres,
        "score_threshold": settings.conf_thres,
        "domain": "TRT",
    }
    node = ("EfficientNMS_TRT", "nms_boxes nms_scores", " ".join(NMS_OUTPUTS["efficient"]), attributes)
    _add(model.graph, {}, [node])
    model.opset_import.append(helper.make_opsetid("TRT", 1))
    _efficient_outputs(model, settings, size)


def _add_efficient(model: Any, settings: EndToEnd, size: str | int) -> None:
    """NonMaxSuppression gives [K, 3] (image, class, box) of all images; each image then takes its best ``topk``.

    ``topk`` places that are no image's stand behind the K, so that every image has as many to choose from.
    """
    from onnx import TensorProto

    topk = settings.topk
    constants = {
        **_limits(settings),
        "nms_column0": np.array(0),
        "nms_column1": np.array(1),
        "nms_column2": np.array(2),
        "nms_one": np.array(1),
        "nms_first": np.array([0]),
        "nms_last": np.array([-1]),
        "nms_axis1": np.array([1]),
        "nms_no_image": np.full(topk, -1),
        "nms_no_box": np.zeros(topk, np.int64),
        "nms_no_score": np.full(topk, -1, np.float32),
        "nms_minus": np.array(-1, np.float32),
        "nms_zero": np.array(0, np.float32),
        "nms_no_class": np.array(-1),
    }
    nodes: list[tuple[str, str, str, dict[str, Any]]] = [
        ("Transpose", "nms_scores", "nms_by_class", {"perm": [0, 2, 1]}),
        ("NonMaxSuppression", "nms_boxes nms_by_class nms_topk nms_iou nms_confidence", "nms_selected", {}),
        ("GatherND", "nms_by_class nms_selected", "nms_found_score", {}),
        *(("Gather", f"nms_selected nms_column{c}", f"nms_found{c}", {"axis": 1}) for c in range(3)),
        ("Concat", "nms_found0 nms_no_image", "nms_image", {"axis": 0}),
        ("Concat", "nms_found1 nms_no_image", "nms_class", {"axis": 0}),
        ("Concat", "nms_found2 nms_no_box", "nms_box", {"axis": 0}),
        ("Concat", "nms_found_score nms_no_score", "nms_score", {"axis": 0}),
        ("Shape", "nms_boxes", "nms_shape", {"start": 0, "end": 1}),
        ("Squeeze", "nms_shape nms_first", "nms_count", {}),
        ("Range", "nms_column0 nms_count nms_one", "nms_images", {}),
        ("Unsqueeze", "nms_images nms_last", "nms_images_column", {}),
        ("Equal", "nms_images_column nms_image", "nms_own", {}),
        ("Where", "nms_own nms_score nms_minus", "nms_own_scores", {}),
        ("TopK", "nms_own_scores nms_topk", "nms_best nms_order", {"axis": 1}),
        ("GreaterOrEqual", "nms_best nms_zero", "nms_real", {}),
        ("Cast", "nms_real", "nms_real_int", {"to": TensorProto.INT32}),
        ("Cast", "nms_real", "nms_real_float", {"to": TensorProto.FLOAT}),
        ("ReduceSum", "nms_real_int nms_axis1", "num_dets", {"keepdims": 1}),
        ("Where", "nms_real nms_best nms_zero", "det_scores", {}),
        ("Gather", "nms_class nms_order", "nms_own_class", {"axis": 0}),
        ("Where", "nms_real nms_own_class nms_no_class", "nms_class_or_none", {}),
        ("Cast", "nms_class_or_none", "det_classes", {"to": TensorProto.INT32}),
        ("Gather", "nms_box nms_order", "nms_own_box", {"axis": 0}),
        ("Unsqueeze", "nms_own_box nms_last", "nms_own_place", {}),
        ("GatherND", "nms_boxes nms_own_place", "nms_corners", {"batch_dims": 1}),
        ("Unsqueeze", "nms_real_float nms_last", "nms_real_column", {}),
        ("Mul", "nms_corners nms_real_column", "det_boxes", {}),
    ]
    _add(model.graph, constants, nodes)
    _efficient_outputs(model, settings, size)


def reference_nms(inputs: Sequence[Tensor], settings: EndToEnd) -> list[Tensor]:
    """What ``with_nms`` computes of its NMS_INPUTS, by torchvision."""
    if settings.form == "rows":
        detections, boxes, scores = inputs
        rows = []
        for index, (own, own_boxes, own_scores) in enumerate(zip(detections, boxes, scores[:, 0], strict=True)):
            passed = torch.nonzero(own_scores > settings.conf_thres)[:, 0]
            kept = passed[nms(own_boxes[passed], own_scores[passed], settings.iou_thres)[: settings.topk]]
            rows.append(torch.cat((torch.full((len(kept), 1), float(index)), own[kept]), 1))
        return [torch.cat(rows)]
    boxes, scores = inputs
    batch, topk = len(boxes), settings.topk
    counts = torch.zeros(batch, 1, dtype=torch.int32)
    corners, best = torch.zeros(batch, topk, 4), torch.zeros(batch, topk)
    labels = torch.full((batch, topk), -1, dtype=torch.int32)
    for index, (own_boxes, own_scores) in enumerate(zip(boxes, scores, strict=True)):
        box, label = torch.nonzero(own_scores > settings.conf_thres).unbind(1)
        kept = batched_nms(own_boxes[box], own_scores[box, label], label, settings.iou_thres)[:topk]
        counts[index] = n = len(kept)
        corners[index, :n], best[index, :n] = own_boxes[box[kept]], own_scores[box[kept], label[kept]]
        labels[index, :n] = label[kept].int()
    return [counts, corners, best, labels]
