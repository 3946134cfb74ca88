"""Which predictions answer for which target: anchor candidates and the SimOTA-like choice among them.

Everything works on the whole batch at once in tensors padded per image: B images, at most M targets and K candidates
per image. Nothing loops over images or boxes, so the number of kernels depends on the number of levels only.

Candidates depend on targets and anchors alone. They are found on the host, which can look how many there are and keep
no more, and sent to the device; the choice among them, which needs the predictions, is made there and asks nothing.
Source: docs/provenance.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sp_yolo.boxes import cxcywh_to_xyxy

# Elements of one [B, targets, K] cost tensor. A handful of them live at once, so this bounds the working memory of the
# assignment near 0.5 GB; a batch with more pairs is treated in slices of targets.
PAIR_LIMIT = 1 << 24
IOU_COST_WEIGHT = 3.0
_INFINITY_BITS = 0x7F800000  # of float32


class PaddedTargets(NamedTuple):
    """The targets of each image in file order, padded to the fullest image."""

    boxes_cxcywh: Tensor  # [B, M, 4] float32, normalised by the network input
    classes: Tensor  # [B, M] int64
    valid: Tensor  # [B, M] bool


class Candidates(NamedTuple):
    """Predictions paired with a target, in the order level, block (centre, left, up, right, down), anchor, target.

    Also the result of an assignment: then ``valid`` marks the matches and ``target`` is the target matched.
    """

    anchor: Tensor  # [B, K] int64, index of the anchor within its level
    row: Tensor  # [B, K] int64
    column: Tensor  # [B, K] int64
    cell: Tensor  # [B, K] int64, position in all levels' objectness logits laid end to end
    target: Tensor  # [B, K] int64, row of PaddedTargets
    valid: Tensor  # [B, K] bool
    anchor_wh: Tensor  # [B, K, 2] grid units
    level: Tensor  # [K] int64
    per_level: tuple[int, ...]  # how many of the K columns each level has


def pad_targets(targets: Tensor, batch_size: int, num_classes: int) -> PaddedTargets:
    """Sort rows [n, 6] (image, class, cx, cy, w, h) into one padded table per image, on the CPU.

    Targets on an accelerator cost a synchronisation. Raises ValueError for a shape, an image index or a class outside
    its range.
    """
    targets = targets.cpu()
    if targets.ndim != 2 or targets.shape[1] != 6:
        raise ValueError(f"targets must have shape [n, 6] (image, class, cx, cy, w, h), got {list(targets.shape)}")
    image, classes = targets[:, 0].long(), targets[:, 1].long()
    count = torch.zeros(batch_size + 2, dtype=torch.long)
    count.scatter_add_(0, (image + 1).clamp(0, batch_size + 1), torch.ones_like(image))
    wrong_class = ((classes < 0) | (classes >= num_classes)).sum()
    (below, *per_image, above), wrong_classes = count.tolist(), int(wrong_class)
    if below or above:
        raise ValueError(f"targets name an image outside the batch of {batch_size}")
    if wrong_classes:
        raise ValueError(f"targets name a class outside 0..{num_classes - 1}")

    most = max(per_image, default=0)
    order = torch.argsort(image, stable=True)
    sorted_image = image[order]
    first = count.cumsum(0) - count
    slot = torch.arange(len(order)) - first[sorted_image + 1]
    table = torch.zeros(batch_size, most, 6)
    table[sorted_image, slot] = targets[order].float()
    table[sorted_image, slot, 0] = 1.0
    return PaddedTargets(table[..., 2:], table[..., 1].long(), table[..., 0] > 0)


def find_candidates(
    targets: PaddedTargets, grids_yx: Sequence[tuple[int, int]], anchors: Tensor, anchor_t: float, reach: float = 0.5
) -> Candidates:
    """All predictions near a target whose anchor is within a factor ``anchor_t`` of its size.

    anchors [nl, na, 2] in grid units, on the CPU as the targets are. ``reach`` 0.5 takes the cell and its two nearest
    neighbours, 1.0 all four.
    """
    offsets = torch.tensor([[0.0, 0.0], [reach, 0.0], [0.0, reach], [-reach, 0.0], [0.0, -reach]])
    parts, first_cell = [], 0
    for level, (ny, nx) in enumerate(grids_yx):
        parts.append(_level_candidates(targets, (ny, nx), anchors[level].float(), anchor_t, offsets, reach, first_cell))
        first_cell += len(targets.valid) * anchors.shape[1] * ny * nx
    per_level = tuple(part[0].shape[1] for part in parts)
    anchor, row, column, cell, target, valid, anchor_wh = (torch.cat(field, 1) for field in zip(*parts, strict=True))
    levels = torch.cat([torch.full((n,), i) for i, n in enumerate(per_level)])
    return Candidates(anchor, row, column, cell, target, valid, anchor_wh, levels, per_level)


def _level_candidates(
    targets: PaddedTargets, grid_yx: tuple[int, int], anchors: Tensor, anchor_t: float, offsets: Tensor, reach: float,
    first_cell: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of Candidates up to ``anchor_wh`` for one level, each [B, K_level, ...]."""
    batch, most = targets.valid.shape
    na, (ny, nx) = len(anchors), grid_yx
    size = torch.tensor([float(nx), float(ny)])
    xy, wh = targets.boxes_cxcywh[..., :2] * size, targets.boxes_cxcywh[..., 2:] * size

    ratio = wh[:, None] / anchors[:, None]  # [B, na, M, 2]
    fits = (torch.maximum(ratio, 1 / ratio).amax(-1) < anchor_t) & targets.valid[:, None]
    from_end = size - xy
    near = (xy % 1 < reach) & (xy > 1)  # left, up
    far = (from_end % 1 < reach) & (from_end > 1)  # right, down
    block = torch.cat((torch.ones_like(near[..., :1]), near, far), -1).transpose(1, 2)  # [B, 5, M]
    valid = (block[:, :, None] & fits[:, None]).flatten(1)  # [B, 5 * na * M]

    cell_xy = (xy[:, None] - offsets[:, None]).long()  # [B, 5, M, 2]
    column = cell_xy[..., 0].clamp(0, nx - 1)
    row = cell_xy[..., 1].clamp(0, ny - 1)
    position = torch.arange(5 * na * most).expand(batch, -1)
    position, valid = _squeeze(position, valid)
    target = position % max(most, 1)
    anchor = position // max(most, 1) % na
    place = position // max(na * most, 1) * most + target  # block and target
    row, column = row.flatten(1).gather(1, place), column.flatten(1).gather(1, place)
    image = torch.arange(batch)[:, None]
    cell = first_cell + ((image * na + anchor) * ny + row) * nx + column
    return anchor, row, column, cell, target, valid, anchors[anchor]


def _squeeze(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Move the valid entries of each row [B, K] to its front, in order, and cut what no row needs."""
    count = valid.sum(1)
    width = int(count.max()) if count.numel() else 0
    front = torch.where(valid, valid.cumsum(1) - 1, width)
    squeezed = values.new_zeros(len(values), width + 1).scatter_(1, front, values)[:, :width]
    return squeezed, torch.arange(width) < count[:, None]


def send_targets(targets: PaddedTargets, device: torch.device) -> PaddedTargets:
    """The same on ``device``; the copies are queued, the host does not wait for them."""
    return targets if device.type == "cpu" else PaddedTargets(*(_send(field, device) for field in targets))


def send_candidates(candidates: Candidates, device: torch.device) -> Candidates:
    """The same on ``device``, in two copies."""
    if device.type == "cpu":
        return candidates
    batch, total = candidates.valid.shape
    whole = torch.stack((*candidates[:5], candidates.valid.long())).flatten()
    sent = _send(torch.cat((whole, candidates.level)), device)
    anchor, row, column, cell, target, valid = sent[: len(whole)].view(6, batch, total).unbind()
    wh = _send(candidates.anchor_wh, device)
    return Candidates(anchor, row, column, cell, target, valid > 0, wh, sent[len(whole) :], candidates.per_level)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    # From pageable memory the host would wait until a large tensor is copied.
    return (tensor.pin_memory() if device.type == "cuda" and tensor.numel() else tensor).to(device, non_blocking=True)


def _constant(values: Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """A small float32 tensor on the device; the copy is queued, the host does not wait for it."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def predicted_boxes(rows: Tensor, candidates: Candidates, strides: Sequence[float]) -> Tensor:
    """Candidates' decoded boxes in input pixels, xyxy [B, K, 4], from their logits ``rows`` [B, K, 5 + nc]."""
    stride = _constant(list(strides), rows.device)[candidates.level][:, None]
    sig = rows[..., :4].sigmoid()
    cells = torch.stack((candidates.column, candidates.row), -1)
    xy = (2 * sig[..., :2] - 0.5 + cells) * stride
    wh = (2 * sig[..., 2:]) ** 2 * candidates.anchor_wh * stride
    return cxcywh_to_xyxy(torch.cat((xy, wh), -1))


def class_costs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross entropy of y = sqrt(sigmoid(class) * sigmoid(objectness)) against one-hot classes.

    Returns the sum over classes against "no class" [B, K], and what is added to it when class c is the right one,
    [B, nc, K]: their sum is the cost without a [B, M, K, nc] tensor. y is kept one float32 step inside (0, 1), where
    the cost is finite.
    """
    y = (rows[..., 5:].sigmoid() * rows[..., 4:5].sigmoid()).sqrt_()
    y.clamp_(torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps / 2)
    absent = (1 - y).log_().neg_()
    present = y.log_().neg_()
    return absent.sum(-1), present.sub_(absent).transpose(1, 2).contiguous()


@torch.no_grad()
def choose(
    rows: Tensor, candidates: Candidates, targets: PaddedTargets, strides: Sequence[float],
    scale_wh: tuple[float, float], most_per_target: int, *, compat: bool = False,
) -> Candidates:  # fmt: skip
    """SimOTA-like assignment: each target takes its k cheapest candidates, k = the sum of its largest IoUs.

    rows [B, K, 5 + nc] float32 logits at the candidates; ``scale_wh`` turns normalised targets into input pixels;
    ``most_per_target`` bounds k (10, or 20 with auxiliary heads). Of equal costs (a cell that two targets proposed is
    twice among the candidates) the earlier candidate is taken; with ``compat`` whichever torch.topk leaves in front, as
    in the original. Returns the candidates with ``valid`` marking the matches and ``target`` naming their target.
    """
    batch, most = targets.valid.shape
    total = candidates.valid.shape[1]
    pred_xyxy = predicted_boxes(rows, candidates, strides)
    absent, added = class_costs(rows)
    absent = absent.masked_fill_(~candidates.valid, torch.inf)
    target_xyxy = cxcywh_to_xyxy(targets.boxes_cxcywh * _constant([*scale_wh, *scale_wh], rows.device))
    image = torch.arange(batch, device=rows.device)[:, None]

    most_per_target = min(most_per_target, total)
    step = max(1, PAIR_LIMIT // max(1, batch * total))
    best_cost = torch.full_like(absent, torch.inf)
    best_target, marked_by, times_marked = (torch.zeros_like(candidates.target) for _ in range(3))
    for first in range(0, most, step):
        some = slice(first, first + step)
        iou = _pair_iou(target_xyxy[:, some], pred_xyxy, candidates.valid)  # [B, m, K]
        k = iou.topk(most_per_target, dim=2).values.sum(2).int().clamp_(min=1)
        cost = added[image, targets.classes[:, some]].add_(absent[:, None])
        cost.sub_(iou.add_(1e-8).log_(), alpha=IOU_COST_WEIGHT)
        cost.masked_fill_(~targets.valid[:, some, None], torch.inf)

        least = cost.min(1)
        better = least.values < best_cost
        best_cost = torch.where(better, least.values, best_cost)
        best_target = torch.where(better, least.indices + first, best_target)

        pick = _cheapest_as_the_original if compat else _cheapest
        chosen, mark = pick(cost, k, most_per_target)
        owner = torch.arange(first, first + cost.shape[1], device=rows.device)[:, None] * mark
        times_marked.scatter_add_(1, chosen.flatten(1), mark.long().flatten(1))
        marked_by.scatter_reduce_(1, chosen.flatten(1), owner.flatten(1), "amax")
    # A candidate that several targets marked goes to the cheapest of all targets, even one that had not marked it.
    target = torch.where(times_marked > 1, best_target, marked_by)
    return candidates._replace(target=target, valid=times_marked > 0)


def _cheapest(cost: Tensor, k: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The ``most`` cheapest candidates of each row of cost [B, m, K], and which of them are among its k [B, m] first.

    Costs are not negative, so their bits are ordered like integers; the candidate's index below them breaks ties alike
    on every device.
    """
    key = cost.view(torch.int32).long().bitwise_left_shift_(32)
    key = key.bitwise_or_(torch.arange(cost.shape[2], device=cost.device)).topk(most, dim=2, largest=False).values
    chosen = key.bitwise_and(0xFFFFFFFF)
    finite = key.bitwise_right_shift(32) < _INFINITY_BITS
    return chosen, (torch.arange(most, device=cost.device) < k[..., None]) & finite


def _cheapest_as_the_original(cost: Tensor, k: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The same row by row with torch.topk over exactly the candidates of the row, for its way with ties. Slow."""
    batch, some, _ = cost.shape
    chosen = torch.zeros(batch, some, most, dtype=torch.long, device=cost.device)
    mark = torch.zeros_like(chosen, dtype=torch.bool)
    for b, m in cost.isfinite().any(2).nonzero().tolist():
        own = cost[b, m].isfinite().nonzero().squeeze(1)
        count = int(k[b, m])
        chosen[b, m, :count] = own[cost[b, m, own].topk(count, largest=False).indices]
        mark[b, m, :count] = True
    return chosen, mark


def _pair_iou(a_xyxy: Tensor, b_xyxy: Tensor, b_valid: Tensor) -> Tensor:
    """IoU [B, m, K] of boxes [B, m, 4] and [B, K, 4]; 0 where b is padding and where both boxes are empty."""
    a_x1, a_y1, a_x2, a_y2 = a_xyxy[:, :, None].unbind(-1)
    b_x1, b_y1, b_x2, b_y2 = b_xyxy[:, None].unbind(-1)
    width = torch.minimum(a_x2, b_x2).sub_(torch.maximum(a_x1, b_x1)).clamp_(min=0)
    height = torch.minimum(a_y2, b_y2).sub_(torch.maximum(a_y1, b_y1)).clamp_(min=0)
    inter = width.mul_(height).mul_(b_valid[:, None])
    area_a, area_b = (a_x2 - a_x1) * (a_y2 - a_y1), (b_x2 - b_x1) * (b_y2 - b_y1)
    union = (area_a + area_b).sub_(inter).clamp_(min=torch.finfo(torch.float32).tiny)
    return inter.div_(union)
