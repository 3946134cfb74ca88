"""Box, objectness and class loss of raw prediction maps: base, OTA and OTA with auxiliary heads.

Source: docs/provenance.md; the paper is YOLOv7 (Wang et al., 2022), the
assignment SimOTA (Ge et al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_yolo.boxes import asking_is_free, complete_iou
from sp_yolo.config import LossRecipe
from sp_yolo.losses.assign import (
    Candidates,
    PaddedTargets,
    choose,
    find_candidates,
    pad_targets,
    send_candidates,
    send_targets,
)

AUXILIARY_WEIGHT = 0.25
FOCAL_ALPHA = 0.25


class LossParts(NamedTuple):
    """The logged parts, gains applied, not multiplied by the batch size: detached scalars."""

    box: Tensor
    obj: Tensor
    cls: Tensor
    total: Tensor


class Gains(NamedTuple):
    box: float
    obj: float
    cls: float


def scale_gains(recipe: LossRecipe, num_levels: int, num_classes: int, image_size: int) -> Gains:
    """The gains of a recipe adapted to the number of levels and classes and the training size."""
    per_level = 3 / num_levels
    return Gains(
        box=recipe.box * per_level,
        obj=recipe.obj * (image_size / 640) ** 2 * per_level,
        cls=recipe.cls * num_classes / 80 * per_level,
    )


class DetectionLoss:
    """Loss of the raw maps of ``model`` (only its ``head``'s constants and its ``stride`` are read).

    hyp: the recipe's part, or a table with the original's keys (others are left aside). image_size: the training size
    in px. assigner: "ota", or "anchor" (every candidate is a match); a model with auxiliary heads always trains with
    OTA, and its lead maps alone are always taken with "anchor".
    compat: OTA as the original does it where ours differs: the image height for both axes of a target (matters for
    non-square input only), and the accidents of torch.topk between candidates of equal cost (a slow loop).
    average: mean of a small tensor over the processes of a distributed run. With it a term is divided by the number of
    matches of the global batch, not of this process's share, and the processes' losses and gradients add up to those of
    one process with all the images. Every process must then call the loss equally often.
    class_weights [nc]: what an object of each class counts in the class term.
    Raises ValueError for another assigner.
    """

    def __init__(
        self,
        model: nn.Module,
        hyp: LossRecipe | Mapping[str, float],
        image_size: int,
        assigner: str = "ota",
        *,
        compat: bool = False,
        average: Callable[[Tensor], Tensor] | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        if assigner not in ("ota", "anchor"):
            raise ValueError(f'assigner must be "ota" or "anchor", got {assigner!r}')
        self.head = cast(Any, model.head)
        self.strides = [float(stride) for stride in cast(Tensor, model.stride)]
        recipe = hyp if isinstance(hyp, LossRecipe) else LossRecipe.of(hyp)
        self.gains = scale_gains(recipe, self.head.nl, self.head.nc, image_size)
        self.balance = (4.0, 1.0, 0.4) if self.head.nl == 3 else (4.0, 1.0, 0.25, 0.06, 0.02)[: self.head.nl]
        self.assigner = assigner
        self.compat = compat
        self.average = average
        self.anchor_t, self.cls_pw, self.obj_pw = recipe.anchor_t, recipe.cls_pw, recipe.obj_pw
        own = cast(Tensor, self.head.anchors)
        self._class_weights = None if class_weights is None else torch.tensor(class_weights, device=own.device)
        self._fetched: tuple[tuple[int, int], Tensor] | None = None
        self.fl_gamma, self.label_smoothing = recipe.fl_gamma, recipe.label_smoothing

    def __call__(
        self, raw_maps: Sequence[Tensor], targets: Tensor, image_hw: tuple[int, int]
    ) -> tuple[Tensor, LossParts]:
        """Mean loss times the batch size (a scalar to call backward on) and its parts.

        raw_maps: nl maps [B, na, ny, nx, 5 + nc] of logits, of any floating type; 2 * nl, lead first, to train
        auxiliary heads. targets [n, 6]: image index, class, cx, cy, w, h normalised by the input; leave them on the
        CPU to spare an accelerator one synchronisation. image_hw: size of the network input in px.
        Raises ValueError for a wrong number of maps and for targets outside the batch or the classes.
        """
        nl, batch = self.head.nl, raw_maps[0].shape[0]
        if len(raw_maps) not in ((nl, 2 * nl) if self.head.auxiliary else (nl,)):
            raise ValueError(f"expected one map for each of {nl} levels, got {len(raw_maps)}")
        lead = list(raw_maps[:nl])
        on_host = pad_targets(targets, batch, self.head.nc)
        padded = send_targets(on_host, lead[0].device)
        candidates = self._candidates(lead, on_host, reach=0.5)
        rows, objectness = read_maps(lead, candidates)
        if len(raw_maps) == nl:
            use_ota = self.assigner == "ota" and not self.head.auxiliary
            matches = self._choose(rows, candidates, padded, image_hw, 10) if use_ota else candidates
            box, obj, cls = self._terms(lead, rows, objectness, matches, padded)
        else:
            matches = self._choose(rows, candidates, padded, image_hw, 20)
            box, obj, cls = self._terms(lead, rows, objectness, matches, padded)
            coarse = self._candidates(lead, on_host, reach=1.0)
            with torch.no_grad():
                lead_rows, _ = read_maps(lead, coarse)
            matches = self._choose(lead_rows, coarse, padded, image_hw, 20)
            auxiliary = list(raw_maps[nl:])
            rows, objectness = read_maps(auxiliary, matches)
            extra = self._terms(auxiliary, rows, objectness, matches, padded)
            box, obj, cls = (a + AUXILIARY_WEIGHT * b for a, b in zip((box, obj, cls), extra, strict=True))
        box, obj, cls = box * self.gains.box, obj * self.gains.obj, cls * self.gains.cls
        total = box + obj + cls
        return total * batch, LossParts(box.detach(), obj.detach(), cls.detach(), total.detach())

    def _candidates(self, maps: Sequence[Tensor], targets: PaddedTargets, reach: float) -> Candidates:
        grids = [(raw.shape[2], raw.shape[3]) for raw in maps]
        found = find_candidates(targets, grids, self._host_anchors(), self.anchor_t, reach)
        return send_candidates(found, maps[0].device)

    def _host_anchors(self) -> Tensor:
        """The head's anchors [nl, na, 2] on the CPU; from an accelerator they are fetched when they have changed."""
        anchors = self.head.anchors
        if asking_is_free(anchors):
            return cast(Tensor, anchors)
        key = (anchors.data_ptr(), anchors._version)
        if self._fetched is None or self._fetched[0] != key:
            self._fetched = key, anchors.cpu()
        return self._fetched[1]

    def _choose(
        self, rows: Tensor, candidates: Candidates, targets: PaddedTargets, image_hw: tuple[int, int], most: int
    ) -> Candidates:
        height, width = image_hw
        scale_wh = (float(height if self.compat else width), float(height))
        return choose(rows.detach().float(), candidates, targets, self.strides, scale_wh, most, compat=self.compat)

    def _terms(
        self, maps: Sequence[Tensor], rows: Tensor, objectness: Tensor, matches: Candidates, targets: PaddedTargets
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Box, objectness and class term before gains (0-dimensional each), summed over levels."""
        keep = kept(matches.valid)
        valid = matches.valid.flatten()[keep].float()
        level = matches.level.repeat(len(rows))[keep]
        count = per_level_count(matches)
        if self.average is not None:
            count = self.average(count)
        share = valid / count.clamp(min=torch.finfo(count.dtype).tiny)[level]  # of a match in its level's mean
        logits = rows.flatten(0, 1)[keep]

        sig = logits[:, :4].sigmoid()
        predicted = torch.cat((2 * sig[:, :2] - 0.5, (2 * sig[:, 2:]) ** 2 * matches.anchor_wh.flatten(0, 1)[keep]), 1)
        wanted, classes = self._matched_targets(maps, matches, targets, keep, level)
        iou = complete_iou(predicted, wanted)
        box = ((1 - iou) * share).sum()

        quality = objectness_target(iou.detach().clamp(min=0), matches.cell.flatten()[keep], valid, len(objectness))
        per_cell = self._bce(objectness, quality, self.obj_pw)
        obj = objectness.new_zeros(())
        sizes = [raw.shape[:4].numel() for raw in maps]
        for balance, part in zip(self.balance, per_cell.split(sizes), strict=True):
            obj = obj + balance * part.mean()

        cls = logits.new_zeros(())
        if self.head.nc > 1:
            hot = torch.full_like(logits[:, 5:], 0.5 * self.label_smoothing, requires_grad=False)
            hot.scatter_(1, classes[:, None], 1 - 0.5 * self.label_smoothing)
            counts = share if self._class_weights is None else share * self._class_weights[classes]
            cls = (self._bce(logits[:, 5:], hot, self.cls_pw).mean(1) * counts).sum()
        return box, obj, cls

    def _matched_targets(
        self, maps: Sequence[Tensor], matches: Candidates, targets: PaddedTargets, keep: Tensor | slice, level: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Matched boxes relative to their cell in grid units (cxcywh [n, 4]) and classes [n]."""
        image = torch.arange(len(matches.target), device=level.device)[:, None]
        boxes = targets.boxes_cxcywh[image, matches.target].flatten(0, 1)[keep]
        classes = targets.classes[image, matches.target].flatten()[keep]
        sizes = torch.tensor([[float(raw.shape[3]), float(raw.shape[2])] for raw in maps])
        grid = sizes.to(level.device, non_blocking=True)[level]
        cells = torch.stack((matches.column.flatten()[keep], matches.row.flatten()[keep]), 1)
        return torch.cat((boxes[:, :2] * grid - cells, boxes[:, 2:] * grid), 1), classes

    def _bce(self, logits: Tensor, wanted: Tensor, positive_weight: float) -> Tensor:
        """Element-wise binary cross entropy, focal when ``fl_gamma`` > 0."""
        weight = torch.full((), positive_weight, device=logits.device)
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none", pos_weight=weight)
        if self.fl_gamma > 0:
            p = logits.sigmoid()
            miss = wanted * (1 - p) + (1 - wanted) * p
            # The clamp keeps the gradient finite at miss = 0 for gamma < 1.
            alpha = FOCAL_ALPHA * wanted + (1 - FOCAL_ALPHA) * (1 - wanted)
            loss = loss * alpha * miss.clamp(min=1e-12) ** self.fl_gamma
        return loss


class _ReadMap(torch.autograd.Function):
    """Rows of a map at given cells and all its objectness logits, in float32 or better.

    One function for both, because autograd would otherwise build a whole zeroed map for each and add them: that costs
    more than the rest of the loss.
    """

    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, image: Tensor, anchor: Tensor, row: Tensor, column: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(raw, image, anchor, row, column)
        dtype = torch.promote_types(raw.dtype, torch.float32)
        return raw[image, anchor, row, column].to(dtype), raw[..., 4].to(dtype).flatten()

    @staticmethod
    def backward(ctx: Any, rows_grad: Tensor, objectness_grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        raw, image, anchor, row, column = ctx.saved_tensors
        grad = torch.zeros_like(raw)
        grad[..., 4] = objectness_grad.view(raw.shape[:4])
        grad.index_put_((image, anchor, row, column), rows_grad.to(raw.dtype), accumulate=True)
        return grad, None, None, None, None


def read_maps(maps: Sequence[Tensor], candidates: Candidates) -> tuple[Tensor, Tensor]:
    """The candidates' logits [B, K, 5 + nc] and all levels' objectness logits end to end [N], float32 or better."""
    indices = zip(*(field.split(candidates.per_level, 1) for field in candidates[:3]), strict=True)
    image = torch.arange(len(maps[0]), device=maps[0].device)[:, None]
    parts = [_ReadMap.apply(raw, image, *index) for raw, index in zip(maps, indices, strict=True)]
    rows, objectness = zip(*parts, strict=True)
    return torch.cat(rows, 1), torch.cat(objectness)


def kept(valid: Tensor) -> Tensor | slice:
    """Index of the valid entries of a flattened mask on the CPU; everything elsewhere, to spare a synchronisation."""
    return valid.flatten().nonzero().squeeze(1) if asking_is_free(valid) else slice(None)


def per_level_count(matches: Candidates) -> Tensor:
    """Number of matches of each level [nl] float32."""
    parts = matches.valid.split(matches.per_level, 1)
    return torch.stack([part.sum() for part in parts]).float()


def objectness_target(quality: Tensor, cell: Tensor, valid: Tensor, cells: int) -> Tensor:
    """Target [cells]: a matched cell's quality, of its last match in order where it has several; 0 elsewhere.

    quality, cell, valid: [n]. Every match of a cell writes the same value, so the result does not depend on the order
    in which a device writes.
    """
    cell = torch.where(valid > 0, cell, cells)  # one cell more than there are takes what is not a match
    order = torch.arange(len(cell), device=cell.device)
    last = torch.zeros(cells + 1, dtype=torch.long, device=cell.device).scatter_reduce_(0, cell, order, "amax")
    return quality.new_zeros(cells + 1).scatter_(0, cell, quality[last[cell]])[:cells]
