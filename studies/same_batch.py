"""Does the published update (docs/the-method.md, eqs. 1-6) train when s and y come from one batch, every N steps?

    python studies/same_batch.py

The gradient of the batch is taken again after the step, so that y holds curvature instead of the difference of two
batches; N = 10 costs 1.1 gradients a step. MNIST, 1,000 images, six learning rates on the validation split with seed
1000, then the best of them with other seeds on the test split.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence

import paired
import torch
from torch import Tensor, nn
from torch.nn import functional

from sp_yolo.experiments.classify import Splits, build_classifier, make_splits, open_source
from sp_yolo.experiments.classify.training import batches
from sp_yolo.optim.damping import newton_damping
from sp_yolo.optim.saliency import keep_masks, prune_count, saliency

EPOCHS, BATCH, MOMENTUM, DECAY = 20, 50, 0.9, 5e-4
RATES = (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16)
# name: (steps between pairs, 0 without; sigma)
ROWS = {
    "D = 1 (SGD-Nesterov)": (0, 0.0),
    "pair every step, sigma 0": (1, 0.0),
    "pair every 10 steps, sigma 0": (10, 0.0),
    "pair every step, sigma 0.1": (1, 0.1),
    "pair every 10 steps, sigma 0.1": (10, 0.1),
}


def train(splits: Splits, row: str, lr0: float, seed: int) -> nn.Module | None:
    """The trained network; None if its loss stopped being finite."""
    every, sigma = ROWS[row]
    torch.manual_seed(seed)
    model = build_classifier("cnn", len(splits.names), tuple(splits.train.images.shape[1:]))  # type: ignore[arg-type]
    params = list(model.parameters())
    v = [torch.zeros_like(p) for p in params]
    damping: list[Tensor] = [torch.ones_like(p) for p in params]
    steps = EPOCHS * math.ceil(len(splits.train) / BATCH)
    step = 0
    for epoch in range(EPOCHS):
        for images, labels in batches(splits.train, BATCH, seed=seed, epoch=epoch, augmented=False):
            lr = lr0 * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
            gradients = _gradients(model, params, splits, images, labels)
            if gradients is None:
                return None
            before = [p.detach().clone() for p in params]
            for p, g, own, d in zip(params, gradients, v, damping, strict=True):
                own.mul_(MOMENTUM).add_(g)
                _move(p, lr * d * (g + MOMENTUM * own), d, sigma)
            if every and step % every == 0:
                after = _gradients(model, params, splits, images, labels)
                if after is None:
                    return None
                displacements = [p.detach() - x for p, x in zip(params, before, strict=True)]
                products = [
                    (s * (b - a)).sum(dtype=torch.float64)
                    for s, a, b in zip(displacements, gradients, after, strict=True)
                ]
                damping = [newton_damping(s, sy)[0] for s, sy in zip(displacements, products, strict=True)]
            step += 1
    return model.eval()


def _gradients(
    model: nn.Module, params: Sequence[Tensor], splits: Splits, images: Tensor, labels: Tensor
) -> list[Tensor] | None:
    loss = functional.cross_entropy(model(paired.pixels(splits, images)), labels)
    if not torch.isfinite(loss):
        return None
    return [g + DECAY * p.detach() for g, p in zip(torch.autograd.grad(loss, params), params, strict=True)]


@torch.no_grad()
def _move(param: Tensor, step: Tensor, damping: Tensor, sigma: float) -> None:
    param.sub_(step)
    count = prune_count(sigma, param.numel()) if param.ndim >= 2 else 0
    if count:
        (keep,), _ = keep_masks([saliency(param, 1 / damping)], count)
        param.mul_(keep)


@torch.no_grad()
def accuracy(model: nn.Module | None, splits: Splits, part: str) -> float:
    if model is None:
        return 1 / len(splits.names)
    data = getattr(splits, part)
    right = [
        int((model(paired.pixels(splits, images)).argmax(1) == labels).sum())
        for images, labels in zip(data.images.split(500), data.labels.split(500), strict=True)
    ]
    return sum(right) / len(data)


def validated(row: str, lr0: float) -> float:
    splits = make_splits(open_source("mnist"), samples=1000, seed=1000)
    return accuracy(train(splits, row, lr0, 1000), splits, "val")


def run(rates: dict[str, float], row: str, seed: int) -> float:
    splits = make_splits(open_source("mnist"), samples=1000, seed=seed)
    return accuracy(train(splits, row, rates[row], seed), splits, "test")


def main() -> None:
    given: argparse.Namespace = paired.parser(__doc__).parse_args()
    rates = paired.tuned(validated, list(ROWS), RATES, given.jobs)
    paired.paired_table(functools.partial(run, rates), list(ROWS), given.seeds, given.jobs)


if __name__ == "__main__":
    main()
