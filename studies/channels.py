"""A proximal step on whole channels by their summed saliency: what does it cost, and what does removing them gain?

    python studies/channels.py

MNIST, 1,000 images, network cnn, SP. Each layer but the last loses the same share of its output channels (rows of its
weight, with their biases), on SP's ramp, held at zero. They are then cut out for real: the smaller network must compute
the same, and is timed against the whole one. "from scratch": a network with so few channels from the start.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from typing import Any

import paired
import torch
from torch import Tensor, nn

from sp_yolo.config import OptimizerRecipe
from sp_yolo.experiments.classify import (
    ClassifyConfig,
    Splits,
    fit,
    load_classify_config,
    make_splits,
    open_source,
)
from sp_yolo.experiments.classify.training import EVAL_BATCH
from sp_yolo.optim import SP, build_param_groups
from sp_yolo.optim.prune import forget_displacement
from sp_yolo.optim.saliency import prox_due, sigma_at

LR0, EPOCHS = 0.316, 20
ROWS = {
    "all channels": (0.0, ""),
    "half, by Fisher": (0.5, "fisher"),
    "half, by magnitude": (0.5, "magnitude"),
    "half, from scratch": (0.5, "scratch"),
    "a quarter left, by Fisher": (0.75, "fisher"),
    "a quarter left, by magnitude": (0.75, "magnitude"),
    "a quarter, from scratch": (0.75, "scratch"),
}


class ChannelSP(SP):
    """SP that zeroes the ``share`` of each layer's channels whose summed saliency is least. ``layers``: (weight, bias)
    of each layer to prune."""

    def __init__(self, params: Any, layers: list[tuple[Tensor, Tensor]], share: float, form: str, **settings: Any):
        super().__init__(params, **settings)
        self.layers, self.share, self.form = layers, share, form
        self.squares = [torch.zeros_like(weight) for weight, _ in layers]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for (weight, _), square in zip(self.layers, self.squares, strict=True):
            if weight.grad is not None:
                square.lerp_(weight.grad**2, 0.05)
        return super().step(closure)

    def _prune(self, step: int) -> None:
        group = self.param_groups[0]
        schedule = (group["start"], group["end"], group["total_steps"])
        if not self.share or not prox_due(step, group["every"], *schedule):
            return
        for (weight, bias), square in zip(self.layers, self.squares, strict=True):
            saliency = weight**2 * (square if self.form == "fisher" else 1)
            count = int(sigma_at(step, self.share, *schedule) * len(weight))
            keep = torch.ones(len(weight), dtype=torch.bool)
            keep[saliency.flatten(1).sum(1).argsort()[:count]] = False
            for param in (weight, bias):
                mask = torch.ones_like(param, dtype=torch.bool) & keep.view(-1, *[1] * (param.ndim - 1))
                self.state[param]["mask"] = mask
                param.mul_(mask)
        forget_displacement(self.state.values())
        self._plan = None  # there are new masks


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def cut(model: nn.Module, kept: list[Tensor]) -> nn.Module:
    """A copy without the channels that ``kept`` (indices for each layer but the last) does not name."""
    model = copy.deepcopy(model)
    inputs, before = None, 0
    for layer, outputs in itertools.zip_longest(layers_of(model), kept):
        weight, bias = layer.weight.detach(), layer.bias.detach()
        after = len(weight)
        if inputs is not None:
            pixels = weight.shape[1] // before  # more than one where the picture is flattened
            weight = weight[:, (inputs[:, None] * pixels + torch.arange(pixels)).flatten()]
        if outputs is not None:
            weight, bias = weight[outputs], bias[outputs]
        layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        inputs, before = outputs, after
    return model.eval()


def settings(seed: int) -> tuple[ClassifyConfig, Splits]:
    overrides = {"lr0": LR0, "weight_decay": 5e-4}
    config = load_classify_config(optimizer="sp", samples=1000, epochs=EPOCHS, seed=seed, overrides=overrides)
    return config, make_splits(open_source("mnist"), samples=1000, seed=seed)


def trained(row: str, seed: int) -> tuple[float, nn.Module, Splits]:
    """(test accuracy, the network with its dead channels cut out, the data)."""
    share, form = ROWS[row]
    config, splits = settings(seed)

    def make(model: nn.Module, recipe: OptimizerRecipe, steps: int) -> SP:
        if form == "scratch":
            shrink(model, share)
        groups = build_param_groups(model, weight_decay=recipe.weight_decay)
        layers = [(layer.weight, layer.bias) for layer in layers_of(model)[:-1]]
        wish = 0.0 if form == "scratch" else share
        common: dict[str, Any] = {"lr": recipe.lr0, "momentum": recipe.momentum, "total_steps": steps}
        common |= {"metric": "none", "decoupled": False}
        return ChannelSP(groups, layers, wish, form, **common)

    outcome = fit(config, splits, make_optimizer=make)
    model = outcome.model
    if share and form != "scratch":
        kept = [alive(layer) for layer in layers_of(model)[:-1]]
        model = cut(model, kept)
        images = paired.pixels(splits, splits.test.images[:EVAL_BATCH])
        difference = (model(images) - outcome.model(images)).abs().max().item()
        if difference > 1e-3:
            raise ArithmeticError(f"{row}: the cut network differs by {difference}")
    return outcome.summary["test_accuracy"], model, splits


def shrink(model: nn.Module, share: float) -> None:
    """Keep the first channels of each layer but the last, in place, before training."""
    kept = [torch.arange(len(layer.weight) - int(share * len(layer.weight))) for layer in layers_of(model)[:-1]]
    for old, new in zip(layers_of(model), layers_of(cut(model, kept)), strict=True):
        old.weight, old.bias = new.weight, new.bias


def alive(layer: Any) -> Tensor:
    """Indices of the channels that are not all zero."""
    return layer.weight.detach().flatten(1).abs().sum(1).nonzero().view(-1)


def run(row: str, seed: int) -> float:
    return trained(row, seed)[0]


@torch.no_grad()
def speed(rounds: int = 15) -> None:
    """Forward passes of the cut networks against the whole one, one thread, interleaved."""
    torch.set_num_threads(1)
    with torch.enable_grad():
        models = {row: trained(row, 0) for row in ("all channels", "half, by Fisher", "a quarter left, by Fisher")}
    splits = next(iter(models.values()))[2]
    images = paired.pixels(splits, splits.test.images[: 4 * EVAL_BATCH])
    seconds: dict[str, list[float]] = {row: [] for row in models}
    for _ in range(rounds):
        for row, (_, model, _) in models.items():
            started = time.perf_counter()
            model(images)
            seconds[row].append(time.perf_counter() - started)
    whole = seconds["all channels"]
    for row, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(whole, own, strict=True))
        weights = sum(p.numel() for p in models[row][1].parameters())
        median, low, high = statistics.median(ratios), ratios[0], ratios[-1]
        print(f"{row}: {weights} weights, forward {median:.2f} times as fast ({low:.2f} to {high:.2f})")


def main() -> None:
    given = paired.parser(__doc__).parse_args()
    paired.paired_table(run, list(ROWS), given.seeds, given.jobs)
    print()
    speed()


if __name__ == "__main__":
    main()
