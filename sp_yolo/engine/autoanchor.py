"""Do the anchors fit the boxes of a dataset, and better ones where they do not.

Source: docs/provenance.md. A box and an anchor agree by the worse of their width
and height ratios, min(r, 1/r); an anchor can answer for a box where that exceeds 1 / threshold (``anchor_t``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

GOOD_RECALL = 0.98
SMALLEST_SIDE = 2.0  # px; smaller boxes do not shape anchors, and no anchor is smaller
KMEANS_RESTARTS = 30
KMEANS_TOLERANCE = 1e-5  # of the mean distance
# So many boxes, drawn at random, shape anchors as well as a million would, in seconds.
MOST_BOXES = 20_000


class AnchorFit(NamedTuple):
    bpr: float  # best possible recall: the share of boxes that some anchor can answer for
    above: float  # mean number of anchors that can answer for a box
    fitness: float  # mean agreement with the best anchor, 0 for boxes without one


def anchor_fit(wh_px: np.ndarray, anchors_px: np.ndarray, threshold: float) -> AnchorFit:
    """How boxes [n, 2] and anchors [k, 2], both width and height in px, agree; n >= 1."""
    agreement = _agreement(wh_px, anchors_px)
    best, fits = agreement.max(1), agreement > 1 / threshold
    return AnchorFit(
        bpr=float(fits.any(1).mean()),
        above=float(fits.sum(1).mean()),
        fitness=float((best * (best > 1 / threshold)).mean()),
    )


def _agreement(wh_px: np.ndarray, anchors_px: np.ndarray) -> np.ndarray:
    """[n, k]: the worse of the two ratios."""
    width, height = (wh_px[:, None, axis] / anchors_px[None, :, axis] for axis in (0, 1))
    worse: np.ndarray = np.minimum(np.minimum(width, 1 / width), np.minimum(height, 1 / height))
    return worse


def best_anchors(
    wh_px: np.ndarray, count: int, threshold: float, *, generations: int = 1000, seed: int = 0
) -> np.ndarray:
    """Anchors [count, 2] in px, smallest area first, for boxes [n, 2] in px: k-means, then a genetic search.

    The same seed gives the same anchors. Raises ValueError when fewer than ``count`` boxes have a side of 2 px.
    """
    wh = wh_px[(wh_px >= SMALLEST_SIDE).any(1)].astype(np.float64)
    if len(wh) < count:
        raise ValueError(f"{count} anchors need at least as many boxes of {SMALLEST_SIDE:g} px, got {len(wh)}")
    generator = np.random.default_rng(seed)
    if len(wh) > MOST_BOXES:
        wh = wh[generator.choice(len(wh), MOST_BOXES, replace=False)]
    anchors = _evolve(wh, _kmeans(wh, count, generator), threshold, generations, generator)
    ordered: np.ndarray = anchors[anchors.prod(1).argsort()]
    return ordered


def _kmeans(wh: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Cluster centres [count, 2], each axis measured in its standard deviation.

    Of the restarts the one with the smallest mean distance wins, not squared distance: a few huge boxes would otherwise
    draw centres away from the many small ones.
    """
    spread = wh.std(0)
    spread[spread == 0] = 1.0
    points = wh / spread
    best, least = points[:count], np.inf
    for _ in range(KMEANS_RESTARTS):
        centres = points[generator.choice(len(points), count, replace=False)]
        distance, previous = np.inf, np.inf
        while True:
            gaps = np.square(points[:, None] - centres).sum(2)
            nearest = gaps.argmin(1)
            previous, distance = distance, float(np.sqrt(gaps.min(1)).mean())
            if not previous - distance > KMEANS_TOLERANCE:  # so written, not-a-number ends it too
                break
            size = np.bincount(nearest, minlength=count)
            sums = np.stack([np.bincount(nearest, axis, count) for axis in points.T], 1)
            centres = np.where(size[:, None] > 0, sums / np.maximum(size, 1)[:, None], centres)
        if distance < least:
            best, least = centres, distance
    found: np.ndarray = np.maximum(best * spread, SMALLEST_SIDE)
    return found


def _evolve(
    wh: np.ndarray, anchors: np.ndarray, threshold: float, generations: int, generator: np.random.Generator
) -> np.ndarray:
    """Keep every random change of the anchors that raises their fitness."""
    fitness = anchor_fit(wh, anchors, threshold).fitness
    for _ in range(generations):
        factor = np.ones_like(anchors)
        while (factor == 1).all():
            change = generator.random() * generator.standard_normal(anchors.shape) * 0.1
            factor = ((generator.random(anchors.shape) < 0.9) * change + 1).clip(0.3, 3.0)
        candidate = np.maximum(anchors * factor, SMALLEST_SIDE)
        candidate_fitness = anchor_fit(wh, candidate, threshold).fitness
        if candidate_fitness > fitness:
            anchors, fitness = candidate, candidate_fitness
    return anchors


def check_anchors(
    labels: Sequence[np.ndarray], shapes_wh: np.ndarray, model: nn.Module, image_size: int, threshold: float,
    *, seed: int = 0,
) -> str:  # fmt: skip
    """Replace the anchors of ``model.head`` in place when they miss boxes and better ones are found; say what was done.

    labels: for each image [n, 5] class and normalised cx, cy, w, h; shapes_wh: [images, 2] px. The longer side of an
    image counts as ``image_size`` px, give or take the 10 % that augmentation moves it. Anchors stay where the best
    possible recall is at least 0.98. Returns one line for the log.
    """
    head = cast(Any, model).head
    shapes = np.asarray(shapes_wh, dtype=np.float64)
    shapes = image_size * shapes / shapes.max(1, keepdims=True)
    wh = np.concatenate(
        [label[:, 3:5] * shape for label, shape in zip(labels, shapes, strict=True)] or [np.ones((0, 2))]
    )
    zoom = np.random.default_rng(seed).uniform(0.9, 1.1, len(labels)).repeat([len(label) for label in labels])[:, None]
    usable = (wh > 0).all(1)
    wh, zoom = wh[usable], zoom[usable]
    if not len(wh):
        return "autoanchor: no boxes, anchors kept"
    anchors = cast(Tensor, head.anchor_grid).detach().cpu().double().numpy().reshape(-1, 2)
    before = anchor_fit(wh * zoom, anchors, threshold)
    found = f"autoanchor: best possible recall {before.bpr:.4f}, {before.above:.2f} anchors above threshold per box"
    if before.bpr >= GOOD_RECALL:
        return f"{found}: anchors fit"
    try:
        better = best_anchors(wh, len(anchors), threshold, seed=seed)
    except ValueError as error:
        return f"{found}: anchors kept, {error}"
    after = anchor_fit(wh * zoom, better, threshold)
    if after.bpr <= before.bpr:
        return f"{found}: anchors kept, none found with a higher recall"
    with torch.no_grad():
        pixels = torch.from_numpy(better).to(head.anchor_grid)
        stride = cast(Tensor, model.stride).to(pixels).view(-1, 1, 1)
        head.anchor_grid.copy_(pixels.view_as(head.anchor_grid))
        head.anchors.copy_(pixels.view_as(head.anchors) / stride)
    listed = " ".join(f"{w:.0f},{h:.0f}" for w, h in better)
    return f"{found}: new anchors {listed} with recall {after.bpr:.4f}, {after.above:.2f} above threshold per box"
