"""Decay as a proximal step in SP's metric against uniform decay, equally tuned: a question, no option of the product.

    python studies/metric_decay.py studies/results/metric-decay/mnist-1000.csv --samples 1000 --epochs 20
    python studies/metric_decay.py studies/results/metric-decay/cifar10-5000.csv --dataset cifar10 --samples 5000 \\
        --model cnn-bn --epochs 10

The proximal operator of lr lambda / 2 |x|^2 in the metric root = sqrt(E[g^2]), scaled so that a tensor's mean decay is
lambda: x <- x / (1 + lr gamma lambda mean(root) / root). Weights of little saliency shrink more. Uniform decay is SP's
own. Each gets the same six pairs of lr and lambda on the validation split, two seeds; the best pair then makes
twenty other seeds on test. Written down before these: their paired difference and its 95 % interval decide.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sp_yolo.config import OptimizerRecipe
from sp_yolo.engine.optimizer import build_optimizer
from sp_yolo.experiments.classify import fit, load_classify_config, open_source
from sp_yolo.experiments.classify.splits import config_splits
from sp_yolo.experiments.rows import append_row, raw_rows

RATES, DECAYS = (0.003, 0.01), (0.003, 0.03, 0.3)
TUNING_SEEDS, SEEDS = (1000, 1001), range(20)
COLUMNS = ("dataset", "samples", "model", "epochs", "decay", "lr0", "weight_decay", "seed", "split", "score")
EPS = 1e-8  # of SP's root


def in_the_metric(model: nn.Module, recipe: OptimizerRecipe, total_steps: int) -> torch.optim.Optimizer:
    """SP without decay, and the proximal step after each of its steps."""
    optimizer = build_optimizer("sp", model, recipe, weight_decay=recipe.weight_decay, total_steps=total_steps)
    amounts = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0

    @torch.no_grad()
    def shrink(*_: Any) -> None:
        gamma = float(optimizer.param_groups[0]["gamma"])
        for group, amount in zip(optimizer.param_groups, amounts, strict=True):
            for param in group["params"] if amount else []:
                root = optimizer.state[param]["square_avg"].reshape(param.shape).sqrt() + EPS
                param.div_(1 + group["lr"] * gamma * amount * root.mean() / root)

    optimizer.register_step_post_hook(shrink)
    return optimizer


class Study:
    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path, self.options = path, options

    def score(self, decay: str, lr0: float, weight_decay: float, seed: int, split: str) -> float:
        """Accuracy of a run; made unless the file holds it."""
        key = {"decay": decay, "lr0": f"{lr0:g}", "weight_decay": f"{weight_decay:g}", "seed": str(seed)}
        key["split"] = split
        for row in raw_rows(self.path):
            if key.items() <= row.items():
                return float(row["score"])
        overrides = {"lr0": lr0, "weight_decay": weight_decay}
        config = load_classify_config(**self.options, optimizer="sp", batch_size=50, seed=seed, overrides=overrides)
        source = open_source(config.dataset, config.root or None, download=False, image_size=config.image_size)
        make = in_the_metric if decay == "metric" else None
        summary = fit(config, config_splits(config, source), test=split == "test", make_optimizer=make).summary
        score = float(summary[f"{split}_accuracy"])
        told = {name: self.options[name] for name in COLUMNS if name in self.options}
        append_row(self.path, COLUMNS, {**told, **key, "score": f"{score:.6g}"})
        return score

    def run(self) -> None:
        for decay in ("uniform", "metric"):
            found = {
                trial: sum(self.score(decay, *trial, seed, "val") for seed in TUNING_SEEDS)
                for trial in itertools.product(RATES, DECAYS)
            }
            best = max(found, key=lambda trial: found[trial])
            for seed in SEEDS:
                self.score(decay, *best, seed, "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--root", default="")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--epochs", type=int, default=20)
    given = vars(parser.parse_args())
    torch.set_num_threads(1)
    Study(given.pop("file"), given).run()


if __name__ == "__main__":
    main()
