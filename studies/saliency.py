"""Which weighting h of the saliency S = 0.5 h x^2 loses least at a given share of zeros? SP, forms it has not and has.

    python studies/saliency.py --zeros 0.97
    python studies/saliency.py --dataset cifar10 --samples 5000 --model cnn-bn --epochs 10 --lr0 0.1 --zeros 0.97

A common factor of all h does not change the order, so a bias correction of the averages cannot matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import paired
import torch
from torch import Tensor, nn

from sp_yolo.config import OptimizerRecipe
from sp_yolo.experiments.classify import fit, load_classify_config, open_source
from sp_yolo.experiments.classify.splits import config_splits
from sp_yolo.optim import SP, build_param_groups

# What is gathered at every step, by name: (decay, f(g, s, y)), s and y of eq. (1).
AVERAGES: dict[str, tuple[float, Callable[..., Tensor]]] = {
    "g2": (0.95, lambda g, s, y: g * g),
    "g2_slow": (0.99, lambda g, s, y: g * g),
    "g2_whole": (0.999, lambda g, s, y: g * g),
    "g": (0.95, lambda g, s, y: g),
    "sy": (0.99, lambda g, s, y: s * y),
    "ss": (0.99, lambda g, s, y: s * s),
}
FORMS: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "magnitude, h = 1": lambda x, e: torch.ones_like(x),
    "E[g²], decay 0.95 (Fisher)": lambda x, e: e["g2"],
    "E[g²], decay 0.99": lambda x, e: e["g2_slow"],
    "E[g²], decay 0.999": lambda x, e: e["g2_whole"],
    "sqrt E[g²]": lambda x, e: e["g2"].sqrt(),
    "E[g²] / its mean in the tensor": lambda x, e: e["g2"] / e["g2"].mean(),
    "1 / mean x² of the tensor": lambda x, e: torch.ones_like(x) / (x * x).mean(),
    "E[g]² (first order)": lambda x, e: e["g"] ** 2,
    "abs E[sy] / E[s²] (averaged secant)": lambda x, e: e["sy"].abs() / e["ss"].clamp(min=1e-30),
    "random": lambda x, e: torch.rand_like(x) / (x * x).clamp(min=1e-30),
}


class WeighedSP(SP):
    """SP whose proximal step weighs x^2 with ``form``."""

    def __init__(self, params: Any, form: str, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.form = FORMS[form]
        self.averages: dict[Tensor, dict[str, Tensor]] = {}
        self.previous: dict[Tensor, Tensor] = {}
        self.before: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if group["sigma"] and param.ndim >= 2 and param.grad is not None:
                    self._gather(param, param.grad, param - self.before.get(param, param))
                    self.before[param] = param.clone()
        return super().step(closure)

    def _gather(self, x: Tensor, g: Tensor, s: Tensor) -> None:
        y = g - self.previous.get(x, g)
        self.previous[x] = g.clone()
        own = self.averages.setdefault(x, {name: torch.zeros_like(x) for name in AVERAGES})
        for name, (decay, value) in AVERAGES.items():
            own[name].lerp_(value(g, s, y), 1 - decay)

    def _prune(self, step: int) -> None:
        kept = {}
        for x, own in self.averages.items():
            if "square_avg" in self.state[x]:
                kept[x] = self.state[x]["square_avg"]
                self.state[x]["square_avg"] = self.form(x, own).contiguous(memory_format=_order(x))
        super()._prune(step)
        for x, square in kept.items():
            self.state[x]["square_avg"] = square


def _order(x: Tensor) -> torch.memory_format:
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def run(options: dict[str, Any], lr0: float, zeros: float, row: str, seed: int) -> float:
    """Test accuracy of one run; ``row`` "dense" does not prune."""
    overrides = {"lr0": lr0, "weight_decay": 5e-4}
    config = load_classify_config(optimizer="sp", seed=seed, overrides=overrides, **options)
    splits = config_splits(config, open_source(config.dataset))

    def make(model: nn.Module, recipe: OptimizerRecipe, steps: int) -> SP:
        share = 0.0 if row == "dense" else zeros
        decay = recipe.weight_decay
        groups = build_param_groups(model, weight_decay=decay, sigma_backbone=share, sigma_head=share)
        settings: dict[str, Any] = {"lr": recipe.lr0, "momentum": recipe.momentum, "total_steps": steps}
        settings |= {"metric": "none", "decoupled": False}
        return WeighedSP(groups, "magnitude, h = 1" if row == "dense" else row, **settings)

    return float(fit(config, splits, make_optimizer=make).summary["test_accuracy"])


def main() -> None:
    parser = paired.options_parser(__doc__)
    parser.add_argument("--lr0", type=float, default=0.316)
    parser.add_argument("--zeros", type=float, default=0.97)
    given = vars(parser.parse_args())
    seeds, jobs, lr0, zeros = (given.pop(name) for name in ("seeds", "jobs", "lr0", "zeros"))
    paired.paired_table(functools.partial(run, given, lr0, zeros), ["dense", *FORMS], seeds, jobs)


if __name__ == "__main__":
    main()
