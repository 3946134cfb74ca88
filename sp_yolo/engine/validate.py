"""One way to measure a model on a split: the trainer's validation and `sp-yolo val` both call this."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sp_yolo.backends import ExportedModel
from sp_yolo.boxes import boxes_to_original, non_max_suppression
from sp_yolo.data import Batch
from sp_yolo.engine.inference import for_inference
from sp_yolo.engine.inputs import to_input
from sp_yolo.eval import CocoEvaluator
from sp_yolo.losses import DetectionLoss
from sp_yolo.models import DetectionModel
from sp_yolo.runtime.device import Compute, Stopwatch, searched_convolutions

CONF_THRES, IOU_THRES = 0.001, 0.65
COMPAT_IOU_THRES = 0.6  # of the original's validations while it trains


@dataclass(frozen=True)
class Validation:
    """Outcome of one pass: ``losses`` are the mean (box, obj, cls), zeros without a loss; ``seconds`` by stage."""

    images: int
    losses: tuple[float, float, float]
    seconds: dict[str, float]


@torch.no_grad()
def validate(
    model: DetectionModel | ExportedModel,
    batches: Iterable[Batch],
    evaluator: CocoEvaluator,
    compute: Compute,
    *,
    loss: DetectionLoss | None = None,
    conf_thres: float = CONF_THRES,
    iou_thres: float = IOU_THRES,
    multi_label: bool = True,
    augment: bool = False,
    hybrid: bool = False,
    single_class: bool = False,
    on_batch: Callable[[int, Batch, list[Tensor]], None] | None = None,
) -> Validation:
    """Run ``model`` (eval mode) over ``batches`` and feed the detections, in original pixels, to ``evaluator``.

    ``loss``: a DetectionLoss whose parts are averaged over the batches. ``on_batch(index, batch, detections)`` sees
    each batch with its detections [k, 6] (xyxy in network input pixels, score, class), for pictures and text files.
    ``hybrid`` adds the labels as sure detections before NMS, to complete labels with a model (--save-hybrid).
    ``single_class`` takes every detection for class 0, whatever the model says (--single-cls).
    """
    model = for_inference(model, compute) if isinstance(model, DetectionModel) else model
    sums = torch.zeros(3, device=compute.device)
    watch = Stopwatch(compute.device, "inference", "nms")
    images = count = 0
    for index, batch in enumerate(batches):
        watch.mark()
        pixels = to_input(batch.images, compute)
        with compute.autocast(), searched_convolutions(shapes_repeat=False):
            decoded, raw_maps = model(pixels, augment=augment)
        if loss is not None and raw_maps is not None:
            _, parts = loss(raw_maps, batch.targets, (pixels.shape[2], pixels.shape[3]))
            sums += torch.stack((parts.box, parts.obj, parts.cls)).to(sums)
        watch.mark("inference")
        if hybrid:
            decoded = _with_labels(decoded, batch)
        found = non_max_suppression(decoded, conf_thres, iou_thres, multi_label=multi_label)
        if single_class:
            for rows in found:
                rows[:, 5] = 0
        watch.mark("nms")
        if on_batch is not None:
            on_batch(index, batch, found)
        evaluator.update(*to_original(batch, found))
        images += len(found)
        count += 1
    box, obj, cls = (sums / max(count, 1)).tolist()
    return Validation(images, (box, obj, cls), watch.seconds())


def _with_labels(decoded: Tensor, batch: Batch) -> Tensor:
    """``decoded`` [B, N, no] with the labels of the batch appended as rows of confidence 1, the others zero."""
    size, no = len(decoded), decoded.shape[2]
    image = batch.targets[:, 0].long()
    counts = torch.bincount(image, minlength=size)
    rows = decoded.new_zeros((size, int(counts.max()) if len(image) else 0, no))
    slot = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]  # targets are sorted by image
    height, width = batch.images.shape[2:]
    rows[image, slot, :4] = (batch.targets[:, 2:] * torch.tensor([width, height, width, height])).to(rows)
    rows[image, slot, 4] = 1
    rows[image, slot, 5 + batch.targets[:, 1].long()] = 1
    return torch.cat((decoded, rows), 1)


def to_original(batch: Batch, found: list[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Image ids and detections of a batch, boxes mapped from the network input to original pixels and clipped."""
    input_hw = (batch.images.shape[2], batch.images.shape[3])
    ids, detections = [], []
    for meta, rows in zip(batch.metas, found, strict=True):
        rows = rows.float().cpu()
        boxes_xyxy = boxes_to_original(rows[:, :4], input_hw, meta.original_hw, meta.ratio_pad)
        detections.append(torch.cat((boxes_xyxy, rows[:, 4:]), 1))
        ids.append(meta.image_id)
    return ids, detections
