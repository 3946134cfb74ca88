"""Non-maximum suppression of a whole batch in tensors of fixed size: the host waits once, when it fetches the result.

Greedy suppression is settled by repetition: a candidate stays unless a better one that stays overlaps it too much. All
are asked at once, until no answer changes. As better ones never depend on worse ones, that is the greedy result, after
as many rounds as the longest chain of candidates has links. What is not settled in ``ROUNDS`` says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 24
ELEMENTS = 1 << 25  # scores that are sorted at once, which bounds the working memory near 0.5 GB
CLASS_OFFSET = 4096.0  # px between the planes of two classes


class Scored(NamedTuple):
    """``boxes_xyxy`` [B, N, 4]; ``scores`` [B, N, C], 0 for what is no candidate; ``labels`` [B, N] where C is 1."""

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor | None


def suppress_batch(scored: Scored, conf_thres: float, iou_thres: float, agnostic: bool, max_det: int) -> Tensor:
    """[B, max_det + 1, 6]: rows x1, y1, x2, y2, score, class, best first; the last: (how many, whether they are exact).

    Not exact: more candidates than the 4 * ``max_det`` best would have to be looked at, or more rounds be made.
    """
    count = scored.scores.shape[1] * scored.scores.shape[2]
    images = max(1, ELEMENTS // max(count, 1))
    parts = zip(*(field.split(images) for field in scored if field is not None), strict=True)
    groups = [Scored(*part, *([None] if scored.labels is None else [])) for part in parts]
    return torch.cat([_suppress_group(group, conf_thres, iou_thres, agnostic, max_det) for group in groups])


def _suppress_group(scored: Scored, conf_thres: float, iou_thres: float, agnostic: bool, max_det: int) -> Tensor:
    candidate = scored.scores > conf_thres
    score, row, label = _best(scored, 4 * max_det)
    boxes = scored.boxes_xyxy.gather(1, row[..., None].expand(-1, -1, 4))
    shifted = boxes if agnostic else boxes + label[..., None].to(boxes.dtype) * _plane_distance(scored, candidate)
    kept, settled = _greedy(shifted, score > conf_thres, iou_thres)

    place = kept.cumsum(1)
    place = torch.where(kept & (place <= max_det), place - 1, max_det)
    rows = torch.cat((boxes, score[..., None], label[..., None].to(score.dtype)), 2)
    found = rows.new_zeros(len(rows), max_det + 1, 6).scatter_(1, place[..., None].expand_as(rows), rows)
    survivors = kept.sum(1)
    exact = settled & ((survivors >= max_det) | (candidate.flatten(1).sum(1) <= row.shape[1]))
    found[:, max_det, 0] = survivors.clamp(max=max_det)
    found[:, max_det, 1] = exact
    return found


def _best(scored: Scored, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Score, row and class of the ``most`` best of each image, [B, k] each; equal scores keep their order."""
    flat = scored.scores.flatten(1)
    # Scores are not negative, so their bits are ordered as they are; the index below them breaks ties.
    key = flat.contiguous().view(torch.int32).long().bitwise_left_shift_(32)
    key = key.add_(torch.arange(flat.shape[1] - 1, -1, -1, device=flat.device))
    key = key.topk(min(most, flat.shape[1]), dim=1).values
    index = flat.shape[1] - 1 - key.bitwise_and(0xFFFFFFFF)
    score = key.bitwise_right_shift(32).int().view(torch.float32)
    classes = scored.scores.shape[2]
    row = index // classes
    return score, row, index % classes if scored.labels is None else scored.labels.gather(1, row)


def _plane_distance(scored: Scored, candidate: Tensor) -> Tensor:
    """[B, 1, 1]: classes live on planes this far apart; beyond 4096 px it grows with the boxes, so that none touch."""
    unused = ~candidate.any(2, keepdim=True)
    highest = scored.boxes_xyxy.masked_fill(unused, -torch.inf).amax((1, 2))
    extent = highest - scored.boxes_xyxy.masked_fill(unused, torch.inf).amin((1, 2)) + 1
    return torch.where(extent > CLASS_OFFSET, extent, CLASS_OFFSET)[:, None, None]  # also where a box is NaN


def _greedy(boxes_xyxy: Tensor, valid: Tensor, iou_thres: float) -> tuple[Tensor, Tensor]:
    """Which of the boxes [B, k, 4], best first, survive [B, k]; whether each image is settled [B]."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    area = (x2 - x1) * (y2 - y1)
    width = torch.minimum(x2[:, :, None], x2[:, None]).sub_(torch.maximum(x1[:, :, None], x1[:, None])).clamp_(min=0)
    height = torch.minimum(y2[:, :, None], y2[:, None]).sub_(torch.maximum(y1[:, :, None], y1[:, None])).clamp_(min=0)
    inter = width.mul_(height)
    over = inter.div_((area[:, :, None] + area[:, None]).sub_(inter)) > iou_thres
    over = over.triu_(1).to(boxes_xyxy.dtype)  # [better, worse]
    kept = before = valid
    for _ in range(ROUNDS):
        before = kept
        kept = valid & (torch.bmm(before[:, None].to(over.dtype), over)[:, 0] == 0)
    return kept, (kept == before).all(1)
