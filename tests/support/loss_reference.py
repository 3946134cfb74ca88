"""The loss of YOLOv7 written plainly: one image, one target at a time, nothing shared with sp_yolo.

Slow on purpose. The second opinion of the tests, and the per-image implementation benchmarks/loss.py measures against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Match(NamedTuple):
    """The matches of one level: indices [n], target rows [n, 6], anchors [n, 2] in grid units."""

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    anchor_wh: Tensor


def candidates(grid_yx: tuple[int, int], targets: Tensor, anchors: Tensor, anchor_t: float, g: float = 0.5) -> Match:
    """One level: anchors within a factor ``anchor_t`` of the target, in its cell and the two nearest neighbours."""
    ny, nx = grid_yx
    gain = torch.tensor([nx, ny, nx, ny], dtype=torch.float32)
    pairs: list[tuple[int, int]] = []
    for a in range(len(anchors)):
        ratio = targets[:, 4:6] * gain[2:] / anchors[a]
        fits = torch.max(ratio, 1 / ratio).max(1).values < anchor_t
        pairs += [(a, t) for t in fits.nonzero()[:, 0].tolist()]
    anchor = torch.tensor([a for a, _ in pairs], dtype=torch.long)
    target = torch.tensor([t for _, t in pairs], dtype=torch.long)
    xy = targets[target, 2:4] * gain[:2]
    back = gain[:2] - xy
    blocks = [
        (torch.ones(len(pairs), dtype=torch.bool), (0.0, 0.0)),
        ((xy[:, 0] % 1 < g) & (xy[:, 0] > 1), (g, 0.0)),
        ((xy[:, 1] % 1 < g) & (xy[:, 1] > 1), (0.0, g)),
        ((back[:, 0] % 1 < g) & (back[:, 0] > 1), (-g, 0.0)),
        ((back[:, 1] % 1 < g) & (back[:, 1] > 1), (0.0, -g)),
    ]
    rows, columns, anchor_ids, target_ids = [], [], [], []
    for keep, offset in blocks:
        cell = (xy[keep] - torch.tensor(offset)).long()
        columns.append(cell[:, 0].clamp(0, nx - 1))
        rows.append(cell[:, 1].clamp(0, ny - 1))
        anchor_ids.append(anchor[keep])
        target_ids.append(target[keep])
    target, anchor = torch.cat(target_ids), torch.cat(anchor_ids)
    image = targets[target, 0].long()
    return Match(image, anchor, torch.cat(rows), torch.cat(columns), targets[target], anchors[anchor])


def ota(
    maps: Sequence[Tensor], found: Sequence[Match], targets: Tensor, strides: Sequence[float],
    scale_wh: tuple[float, float], most: int, ties: str = "first",
) -> list[Match]:  # fmt: skip
    """SimOTA, image after image. ties: equal costs go to the "first" candidate or as "topk" leaves them."""
    kept: list[list[Match]] = [[] for _ in maps]
    for b in range(len(maps[0])):
        mine = targets[targets[:, 0] == b]
        pool = [Match(*(field[match.image == b] for field in match)) for match in found]
        sizes = [len(match.image) for match in pool]
        if not len(mine) or not sum(sizes):
            continue
        rows = torch.cat([raw[b, m.anchor, m.row, m.column] for raw, m in zip(maps, pool, strict=True)]).float()
        boxes = []
        for match, part, stride in zip(pool, rows.split(sizes), strides, strict=True):
            sig = part[:, :4].sigmoid()
            xy = (2 * sig[:, :2] - 0.5 + torch.stack((match.column, match.row), 1)) * stride
            wh = (2 * sig[:, 2:]) ** 2 * match.anchor_wh * stride
            boxes.append(torch.cat((xy - wh / 2, xy + wh / 2), 1))
        pick = ota_one_image(rows, torch.cat(boxes), mine, scale_wh, most, ties)
        for level, (match, part) in enumerate(zip(pool, pick.split(sizes), strict=True)):
            on = part >= 0
            image, anchor, row, column, _, anchor_wh = (field[on] for field in match)
            kept[level].append(Match(image, anchor, row, column, mine[part[on]], anchor_wh))
    empty = torch.zeros(0, dtype=torch.long)
    nothing = Match(empty, empty, empty, empty, torch.zeros(0, 6), torch.zeros(0, 2))
    return [Match(*(torch.cat(field) for field in zip(*(parts or [nothing]), strict=True))) for parts in kept]


def ota_one_image(
    rows: Tensor, boxes_xyxy: Tensor, targets: Tensor, scale_wh: tuple[float, float], most: int, ties: str
) -> Tensor:
    """Target index of each candidate, -1 where it is matched to none."""
    size = torch.tensor([*scale_wh, *scale_wh])
    wanted = targets[:, 2:] * size
    wanted = torch.cat((wanted[:, :2] - wanted[:, 2:] / 2, wanted[:, :2] + wanted[:, 2:] / 2), 1)
    low = torch.max(wanted[:, None, :2], boxes_xyxy[None, :, :2])
    high = torch.min(wanted[:, None, 2:], boxes_xyxy[None, :, 2:])
    inter = (high - low).clamp(min=0).prod(2)
    area = (wanted[:, 2:] - wanted[:, :2]).prod(1)[:, None] + (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
    iou = inter / (area - inter)

    nc = rows.shape[1] - 5
    y = (rows[:, 5:].sigmoid() * rows[:, 4:5].sigmoid()).sqrt()[None].repeat(len(targets), 1, 1)
    hot = F.one_hot(targets[:, 1].long(), nc).float()[:, None].repeat(1, len(rows), 1)
    cost = F.binary_cross_entropy_with_logits(torch.log(y / (1 - y)), hot, reduction="none").sum(2)
    cost = cost + 3.0 * -torch.log(iou + 1e-8)

    marks = torch.zeros_like(cost, dtype=torch.bool)
    for t in range(len(targets)):
        k = max(1, int(iou[t].topk(min(most, len(rows))).values.sum()))
        cheap = cost[t].topk(k, largest=False).indices if ties == "topk" else cost[t].argsort(stable=True)[:k]
        marks[t, cheap] = True
    contested = marks.sum(0) > 1
    winner = cost[:, contested].argmin(0)
    marks[:, contested] = False
    marks[winner, contested] = True
    return torch.where(marks.any(0), marks.int().argmax(0), -1)


def complete_iou(a: Tensor, b: Tensor) -> Tensor:
    """CIoU (Zheng et al., 2020, eq. 10), [n, 4] and [n, 4] centre form -> [n]."""
    eps = 1e-7
    ax1, ax2, ay1, ay2 = a[:, 0] - a[:, 2] / 2, a[:, 0] + a[:, 2] / 2, a[:, 1] - a[:, 3] / 2, a[:, 1] + a[:, 3] / 2
    bx1, bx2, by1, by2 = b[:, 0] - b[:, 2] / 2, b[:, 0] + b[:, 2] / 2, b[:, 1] - b[:, 3] / 2, b[:, 1] + b[:, 3] / 2
    inter = (torch.min(ax2, bx2) - torch.max(ax1, bx1)).clamp(0) * (torch.min(ay2, by2) - torch.max(ay1, by1)).clamp(0)
    w1, h1, w2, h2 = ax2 - ax1, ay2 - ay1 + eps, bx2 - bx1, by2 - by1 + eps
    iou = inter / (w1 * h1 + w2 * h2 - inter + eps)
    cw, ch = torch.max(ax2, bx2) - torch.min(ax1, bx1), torch.max(ay2, by2) - torch.min(ay1, by1)
    rho = ((bx1 + bx2 - ax1 - ax2) ** 2 + (by1 + by2 - ay1 - ay2) ** 2) / 4
    v = 4 / math.pi**2 * (torch.atan(w2 / (h2 + eps)) - torch.atan(w1 / (h1 + eps))) ** 2
    alpha = (v / (v - iou + 1 + eps)).detach()
    return iou - (rho / (cw**2 + ch**2 + eps) + v * alpha)


def bce(logits: Tensor, wanted: Tensor, positive_weight: float, gamma: float) -> Tensor:
    """Mean binary cross entropy, focal for gamma > 0."""
    p = logits.sigmoid()
    loss = -(positive_weight * wanted * F.logsigmoid(logits) + (1 - wanted) * F.logsigmoid(-logits))
    if gamma > 0:
        p_t = wanted * p + (1 - wanted) * (1 - p)
        loss = loss * (0.25 * wanted + 0.75 * (1 - wanted)) * (1 - p_t) ** gamma
    return loss.mean()


def terms(maps: Sequence[Tensor], matches: Sequence[Match], hyp: Mapping[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms before gains: box, obj, cls."""
    balance = [4.0, 1.0, 0.4] if len(maps) == 3 else [4.0, 1.0, 0.25, 0.06]
    box, obj, cls = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for level, (raw, match) in enumerate(zip(maps, matches, strict=True)):
        _, _, ny, nx, no = raw.shape
        quality = torch.zeros(raw.shape[:4])
        if len(match.image):
            rows = raw[match.image, match.anchor, match.row, match.column].float()
            sig = rows[:, :4].sigmoid()
            predicted = torch.cat((2 * sig[:, :2] - 0.5, (2 * sig[:, 2:]) ** 2 * match.anchor_wh), 1)
            wanted = match.target[:, 2:] * torch.tensor([nx, ny, nx, ny])
            wanted = torch.cat((wanted[:, :2] - torch.stack((match.column, match.row), 1), wanted[:, 2:]), 1)
            iou = complete_iou(predicted, wanted)
            box = box + (1 - iou).mean()
            quality[match.image, match.anchor, match.row, match.column] = iou.detach().clamp(min=0)
            if no > 6:
                eps = hyp.get("label_smoothing", 0.0)
                hot = F.one_hot(match.target[:, 1].long(), no - 5) * (1 - eps) + 0.5 * eps
                cls = cls + bce(rows[:, 5:], hot, hyp["cls_pw"], hyp["fl_gamma"])
        obj = obj + balance[level] * bce(raw[..., 4].float(), quality, hyp["obj_pw"], hyp["fl_gamma"])
    return box, obj, cls


def loss(
    maps: Sequence[Tensor], targets: Tensor, hyp: Mapping[str, float], anchors: Tensor, strides: Sequence[float],
    image_hw: tuple[int, int], *, kind: str, ties: str = "first",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, [box, obj, cls, total]) with ``hyp`` gains already scaled; kind: base, ota or aux."""
    nl, nc = len(anchors), maps[0].shape[-1] - 5
    grids = [(raw.shape[2], raw.shape[3]) for raw in maps[:nl]]
    lead, scale_wh = [raw.detach() for raw in maps[:nl]], (float(image_hw[1]), float(image_hw[0]))

    def assigned(g: float, most: int) -> list[Match]:
        found = [candidates(grid, targets, a, hyp["anchor_t"], g) for grid, a in zip(grids, anchors, strict=True)]
        return found if kind == "base" else ota(lead, found, targets, strides, scale_wh, most, ties)

    parts = terms(maps[:nl], assigned(0.5, 20 if kind == "aux" else 10), hyp)
    if kind == "aux":
        extra = terms(maps[nl:], assigned(1.0, 20), hyp)
        parts = tuple(a + 0.25 * b for a, b in zip(parts, extra, strict=True))  # type: ignore[assignment]
    box, obj, cls = parts[0] * hyp["box"], parts[1] * hyp["obj"], parts[2] * hyp["cls"]
    total = box + obj + (cls if nc > 1 else 0.0)
    return total * len(maps[0]), torch.stack((box, obj, cls, total)).detach()
