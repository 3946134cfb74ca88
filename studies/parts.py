"""What of SP in the Fisher metric makes the difference: the metric, Nesterov's look-ahead, or gamma?

    python studies/parts.py
    python studies/parts.py --dataset cifar10 --samples 9000 --model cnn-bn --epochs 6

Every row is tuned alike: four learning rates on the validation split with seed 1000; then other seeds on the test
split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import paired
import torch
from torch import nn

from sp_yolo.config import OptimizerRecipe
from sp_yolo.errors import NonFiniteError
from sp_yolo.experiments.classify import fit, load_classify_config, open_source
from sp_yolo.experiments.classify.splits import config_splits
from sp_yolo.optim import SP, build_param_groups

RATES = (0.001, 0.00316, 0.01, 0.0316)


class Undamped(SP):
    """SP whose gamma is 1: every step is as long as lr says."""

    def _damp(self, *_: Any) -> None:
        self.param_groups[0]["gamma"].fill_(1.0)


ROWS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SP": SP,
    "without gamma": Undamped,
    "without look-ahead (heavy ball)": functools.partial(SP, nesterov=False),
    "AdamW": torch.optim.AdamW,
    "NAdam, decoupled decay": functools.partial(torch.optim.NAdam, decoupled_weight_decay=True),
}


def accuracy(options: dict[str, Any], split: str, seed: int, row: str, lr0: float) -> float:
    config = load_classify_config(seed=seed, overrides={"lr0": lr0, "weight_decay": 0.01}, **options)
    source = open_source(config.dataset)
    splits = config_splits(config, source)

    def make(model: nn.Module, recipe: OptimizerRecipe, steps: int) -> torch.optim.Optimizer:
        groups = build_param_groups(model, weight_decay=recipe.weight_decay)
        keep = ("params", "name", "weight_decay")
        return ROWS[row]([{key: group[key] for key in keep} for group in groups], lr=lr0)

    try:
        outcome = fit(config, splits, test=split == "test", make_optimizer=make)
    except NonFiniteError:
        return 1 / len(source.names)
    return float(outcome.summary[f"{split}_accuracy"])


def run(options: dict[str, Any], rates: dict[str, float], row: str, seed: int) -> float:
    return accuracy(options, "test", seed, row, rates[row])


def main() -> None:
    parser = paired.options_parser(__doc__)
    given = vars(parser.parse_args())
    seeds, jobs = given.pop("seeds"), given.pop("jobs")
    rates = paired.tuned(functools.partial(accuracy, given, "val", 1000), list(ROWS), RATES, jobs)
    paired.paired_table(functools.partial(run, given, rates), list(ROWS), seeds, jobs)


if __name__ == "__main__":
    main()
