"""Box formats, the IoU family, letterbox and its inverse, and non-maximum suppression.

Every box variable carries its format: `_xyxy` is (x1, y1, x2, y2), `_cxcywh` is (centre x, centre y, width, height).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import cv2
import numpy as np
import torch
import torchvision
from torch import Tensor

from sp_yolo.suppression import CLASS_OFFSET, Scored, suppress_batch

Boxes = TypeVar("Boxes", Tensor, np.ndarray)

MAX_CANDIDATES = 30000  # per image, before suppression


def cxcywh_to_xyxy(boxes_cxcywh: Boxes) -> Boxes:
    """[..., 4] centre form -> [..., 4] corner form, same unit and type (torch or NumPy)."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:4] / 2
    return _join(centre - half, centre + half)


def xyxy_to_cxcywh(boxes_xyxy: Boxes) -> Boxes:
    """[..., 4] corner form -> [..., 4] centre form, same unit and type (torch or NumPy)."""
    top_left, bottom_right = boxes_xyxy[..., :2], boxes_xyxy[..., 2:4]
    return _join((top_left + bottom_right) / 2, bottom_right - top_left)


def _join(first: Boxes, second: Boxes) -> Boxes:
    if isinstance(first, Tensor):
        return torch.cat((first, second), dim=-1)
    return np.concatenate((first, second), axis=-1)


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Plain IoU of every pair: [n, 4] and [m, 4] -> [n, m]; 0/0 (two empty boxes) is NaN."""
    area_a = (a_xyxy[:, 2:] - a_xyxy[:, :2]).prod(1)
    area_b = (b_xyxy[:, 2:] - b_xyxy[:, :2]).prod(1)
    top_left = torch.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    bottom_right = torch.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    intersection = (bottom_right - top_left).clamp_(min=0).prod(2)
    return intersection / (area_a[:, None] + area_b[None] - intersection)


def complete_iou(pred_cxcywh: Tensor, target_cxcywh: Tensor) -> Tensor:
    """CIoU of matching rows, [n, 4] and [n, 4] -> [n].

    The epsilons (1e-7, on heights, union, diagonal and alpha) are the original's; no gradient flows through alpha.
    """
    eps = 1e-7
    pred, target = cxcywh_to_xyxy(pred_cxcywh), cxcywh_to_xyxy(target_cxcywh)
    w1, h1 = pred[:, 2] - pred[:, 0], pred[:, 3] - pred[:, 1] + eps
    w2, h2 = target[:, 2] - target[:, 0], target[:, 3] - target[:, 1] + eps
    overlap = (torch.minimum(pred[:, 2:], target[:, 2:]) - torch.maximum(pred[:, :2], target[:, :2])).clamp(min=0)
    intersection = _product(overlap)
    iou = intersection / (w1 * h1 + w2 * h2 - intersection + eps)

    enclosing = torch.maximum(pred[:, 2:], target[:, 2:]) - torch.minimum(pred[:, :2], target[:, :2])
    diagonal = enclosing.square().sum(1) + eps
    distance = (pred[:, :2] + pred[:, 2:] - target[:, :2] - target[:, 2:]).square().sum(1) / 4
    v = (4 / math.pi**2) * (torch.atan(w2 / (h2 + eps)) - torch.atan(w1 / (h1 + eps))).square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + eps))
    return iou - (distance / diagonal + v * alpha)


def asking_is_free(tensor: Tensor) -> bool:
    """Whether the host can ask for values without waiting: on a CPU."""
    return tensor.device.type == "cpu"


def _product(wh: Tensor) -> Tensor:
    """[n, 2] -> [n], w * h.

    The backward pass of ``prod`` asks the host whether a factor is 0, which would make an accelerator wait. On a CPU it
    stays, because its gradient is rounded otherwise: a seed keeps its run.
    """
    if asking_is_free(wh):
        return wh.prod(1)
    width, height = wh.unbind(1)
    return width * height


def letterbox(
    image: np.ndarray,
    shape_hw: int | tuple[int, int],
    *,
    color: int = 114,
    auto: bool = False,
    scale_up: bool = True,
    stride: int = 32,
) -> tuple[np.ndarray, float, tuple[float, float]]:
    """Resize [H, W, 3] keeping the aspect ratio and pad it to `shape_hw`.

    `auto` pads only up to the next multiple of `stride`; without `scale_up` a small image is padded, never enlarged.
    Returns the image, the scale ratio, and the half pads (pad_w, pad_h) in pixels, which may end in .5.
    """
    target_h, target_w = (shape_hw, shape_hw) if isinstance(shape_hw, int) else shape_hw
    height, width = image.shape[:2]
    ratio = min(target_h / height, target_w / width)
    if not scale_up:
        ratio = min(ratio, 1.0)
    resized_w, resized_h = max(round(width * ratio), 1), max(round(height * ratio), 1)
    pad_w, pad_h = float(target_w - resized_w), float(target_h - resized_h)
    if auto:
        pad_w, pad_h = pad_w % stride, pad_h % stride
    pad_w, pad_h = pad_w / 2, pad_h / 2
    if (resized_w, resized_h) != (width, height):
        image = cv2.resize(image, (resized_w, resized_h), interpolation=cv2.INTER_LINEAR)
    # an odd pixel goes to the bottom and to the right
    top, bottom = round(pad_h - 0.1), round(pad_h + 0.1)
    left, right = round(pad_w - 0.1), round(pad_w + 0.1)
    if top or bottom or left or right:
        image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(color, color, color))
    return image, ratio, (pad_w, pad_h)


def boxes_to_original(
    boxes_xyxy: Tensor,
    input_hw: tuple[int, int],
    original_hw: tuple[int, int],
    ratio_pad: tuple[tuple[float, float], tuple[float, float]] | None = None,
) -> Tensor:
    """Corner boxes [n, 4] in network-input pixels -> pixels of the original image, clipped to it.

    `ratio_pad` is ((ratio_h, ratio_w), (pad_w, pad_h)); each axis is divided by its own ratio, because an image resized
    to whole pixels has two. Without it the letterbox of `original_hw` into `input_hw` is assumed.
    """
    if ratio_pad is None:
        gain = min(input_hw[0] / original_hw[0], input_hw[1] / original_hw[1])
        ratio_h = ratio_w = gain
        pad_w, pad_h = (input_hw[1] - original_hw[1] * gain) / 2, (input_hw[0] - original_hw[0] * gain) / 2
    else:
        (ratio_h, ratio_w), (pad_w, pad_h) = ratio_pad
    shift = boxes_xyxy.new_tensor([pad_w, pad_h, pad_w, pad_h])
    scale = boxes_xyxy.new_tensor([ratio_w, ratio_h, ratio_w, ratio_h])
    limit = boxes_xyxy.new_tensor([original_hw[1], original_hw[0], original_hw[1], original_hw[0]])
    return ((boxes_xyxy - shift) / scale).clamp(min=torch.zeros_like(limit), max=limit)


@torch.no_grad()
def non_max_suppression(
    prediction: Tensor,
    conf_thres: float = 0.001,
    iou_thres: float = 0.65,
    *,
    multi_label: bool = True,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    max_det: int = 300,
) -> list[Tensor]:
    """Decoded predictions [B, N, 5+nc] (cx, cy, w, h px, objectness, class scores) -> per image [k, 6] float32.

    Rows are x1, y1, x2, y2, score, class, best score first. With one class the
    score is the objectness alone. `multi_label` makes one candidate per (box, class) above `conf_thres`. Of predictions
    on a CUDA device the results lie on the CPU: the host waits once for the whole batch.
    """
    if prediction.is_cuda:
        return _suppress_there(prediction, conf_thres, iou_thres, multi_label, classes, agnostic, max_det)
    # one comparison over the whole batch: at 0.001 it leaves a few per cent of the rows of a trained model
    keep = prediction[..., 4].float() > conf_thres
    results = []
    for rows, mask in zip(prediction, keep, strict=True):
        rows = rows[mask].float()
        row, score, label = _candidates(rows, conf_thres, multi_label, classes)
        best = _best_first(score)
        boxes_xyxy = cxcywh_to_xyxy(rows[row[best], :4])
        results.append(_suppress(boxes_xyxy, score[best], label[best], iou_thres, agnostic, max_det))
    return results


def _suppress_there(
    prediction: Tensor,
    conf_thres: float,
    iou_thres: float,
    multi_label: bool,
    classes: Sequence[int] | None,
    agnostic: bool,
    max_det: int,
) -> list[Tensor]:
    """The same on the GPU, fetched at once; the few images that fixed sizes do not settle are done here."""
    if not prediction.shape[1]:
        return [torch.zeros(0, 6) for _ in prediction]
    rows = prediction.float()
    objectness, labels = rows[..., 4:5], None
    scores = objectness if rows.shape[2] == 6 else rows[..., 5:] * objectness
    if rows.shape[2] == 6:
        labels = torch.zeros_like(rows[..., 0], dtype=torch.long)
    elif not multi_label:
        scores, labels = scores.max(2, keepdim=True)
        labels = labels[..., 0]
    sure = (objectness > conf_thres) & (scores > conf_thres)
    if classes is not None:
        label = torch.arange(scores.shape[2], device=rows.device) if labels is None else labels[..., None]
        sure = sure & sum((label == each for each in classes), torch.zeros_like(label, dtype=torch.bool))
    scored = Scored(cxcywh_to_xyxy(rows[..., :4]), torch.where(sure, scores, 0.0), labels)
    results = []
    found = suppress_batch(scored, conf_thres, iou_thres, agnostic, max_det).cpu()
    for image, (rows_found, (count, exact, *_)) in enumerate(zip(found[:, :-1], found[:, -1].tolist(), strict=True)):
        if exact:
            results.append(rows_found[: int(count)].clone())
        else:
            own = prediction[image : image + 1].cpu()
            results += non_max_suppression(
                own, conf_thres, iou_thres, multi_label=multi_label, classes=classes, agnostic=agnostic, max_det=max_det
            )
    return results


def _candidates(
    rows: Tensor, conf_thres: float, multi_label: bool, classes: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, 5+nc] float32 -> (row index, score, class index), each [k], of every candidate above the threshold."""
    if rows.shape[1] == 6:
        row = torch.arange(len(rows), device=rows.device)
        score, label = rows[:, 4], torch.zeros_like(row)
    elif multi_label:
        scores = rows[:, 5:] * rows[:, 4:5]
        row, label = (scores > conf_thres).nonzero(as_tuple=True)
        score = scores[row, label]
    else:
        best, index = (rows[:, 5:] * rows[:, 4:5]).max(1)
        row = (best > conf_thres).nonzero(as_tuple=True)[0]
        score, label = best[row], index[row]
    if classes is not None:
        wanted = torch.isin(label, torch.as_tensor(list(classes), device=label.device, dtype=label.dtype))
        row, score, label = row[wanted], score[wanted], label[wanted]
    return row, score, label


def _best_first(score: Tensor) -> Tensor:
    """Indices of the best MAX_CANDIDATES scores, falling; equal scores keep their order."""
    if len(score) <= MAX_CANDIDATES:
        return score.argsort(descending=True, stable=True)
    best = score.topk(MAX_CANDIDATES, sorted=False).indices.sort().values
    return best[score[best].argsort(descending=True, stable=True)]


def _suppress(
    boxes_xyxy: Tensor, score: Tensor, label: Tensor, iou_thres: float, agnostic: bool, max_det: int
) -> Tensor:
    """Candidates of one image, best first -> [k, 6].

    A box is only ever suppressed by a better one, so the best `max_det` survivors are known as soon as a prefix of the
    sorted candidates yields that many: prefixes of growing length give the exact result without the quadratic cost.
    """
    total = len(score)
    shifted = boxes_xyxy
    if not agnostic and total:
        # classes live on separate planes; beyond 4096 px the distance grows, so that they never touch
        extent = float(boxes_xyxy.max() - boxes_xyxy.min()) + 1
        shifted = boxes_xyxy + label[:, None].to(boxes_xyxy.dtype) * max(CLASS_OFFSET, extent)
    length = min(total, 4 * max_det)
    kept = torchvision.ops.nms(shifted[:length], score[:length], iou_thres)
    while len(kept) < max_det and length < total:
        length = min(total, 4 * length)
        kept = torchvision.ops.nms(shifted[:length], score[:length], iou_thres)
    kept = kept[:max_det]
    return torch.cat((boxes_xyxy[kept], score[kept, None], label[kept, None].to(score.dtype)), dim=1)
