"""What a parameter group may say: bounds of its settings, its prunable tensors, the reference learning rate."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Bound(NamedTuple):
    """What a setting may be: a number from ``low`` to ``high`` (not itself where ``open``), or one of ``words``."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    words: tuple[str, ...] = ()

    def holds(self, value: Any) -> bool:
        if self.words:
            return value in self.words
        return bool(self.low <= value < self.high or (value == self.high and not self.open))

    def __str__(self) -> str:
        if self.words:
            return " or ".join(map(repr, self.words))
        if self.high == math.inf:
            return f">= {self.low:g}"
        return f"in [{self.low:g}, {self.high:g}{')' if self.open else ']'}"


# Recipes ask for these too.
BOUNDS = {
    "lr": Bound(0),
    "momentum": Bound(0, 1, open=True),
    "weight_decay": Bound(0),
    "mode": Bound(words=("robust", "paper")),
    "metric": Bound(words=("fisher", "none")),
    "sigma": Bound(0, 1, open=True),
    "saliency": Bound(words=("fisher", "metric")),
    "every": Bound(1),
    "start": Bound(0, 1),
    "end": Bound(0, 1),
    "rho": Bound(0, 1, open=True),
    "rcap": Bound(0),  # 0: derived
    "growth": Bound(1),
}


# Settings of other optimizers, and what SP has instead.
_COUNTERPARTS = {
    "betas": "momentum is the first of them, the average of g^2 has a fixed decay of .95",
    "beta1": "it is called momentum",
    "beta2": "the average of g^2 has a fixed decay of .95",
    "alpha": "the average of g^2 has a fixed decay of .95",
    "eps": "it is fixed at 1e-8",
    "amsgrad": "leave it out, SP has no such variant",
    "dampening": "leave it out, SP has no such variant",
    "centered": "leave it out, SP has no such variant",
    "fused": "native=True or False chooses the compiled step",
    "learning_rate": "it is called lr",
    "wd": "it is called weight_decay",
    "l2": "it is called weight_decay, with decoupled=False",
    "decay": "it is called weight_decay",
    "decoupled_weight_decay": "it is called decoupled",
    "weight_decouple": "it is called decoupled",
    "sparsity": "it is called sigma",
    "sigma_backbone": "groups have their own sigma: build_param_groups(model, sigma_backbone=...)",
    "sigma_head": "groups have their own sigma: build_param_groups(model, sigma_head=...)",
}


def prunable_flags(group: dict[str, Any]) -> list[bool]:
    """Whether the proximal step may zero elements of each tensor: two or more dimensions, and the group's flag."""
    flags = group.get("prunable") or [True] * len(group["params"])
    return [bool(f) and p.ndim >= 2 and p.numel() > 1 for p, f in zip(group["params"], flags, strict=True)]


def keeps_squares(group: dict[str, Any], prunable: bool) -> bool:
    """Whether a tensor's state holds E[g^2]: the metric or its saliency are made of it."""
    weighed = (prunable and group["sigma"] > 0) or bool(group.get("removal"))
    return bool(
        group["mode"] == "robust" and (group["metric"] == "fisher" or (weighed and group["saliency"] == "fisher"))
    )


def prunable_params(group: dict[str, Any]) -> list[Tensor]:
    return [p for p, flag in zip(group["params"], prunable_flags(group), strict=True) if flag]


def reference_lr(lrs: list[float | Tensor]) -> float | Tensor:
    """lr_ref: the largest lr of the groups that step; defined, and the same, whichever groups stand still."""
    tensors = [lr for lr in lrs if isinstance(lr, Tensor)]
    if not tensors:
        return max(float(lr) for lr in lrs)
    full = [lr if isinstance(lr, Tensor) else torch.full_like(tensors[0], lr) for lr in lrs]
    return torch.stack([lr.reshape(()) for lr in full]).max()


def check_settings(group: dict[str, Any]) -> None:
    """ValueError naming the first setting of the group that is out of bounds."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"a tensor lr must have one element, not {lr.numel()}")
    rules = [
        *(
            (name, isinstance(group[name], Tensor) or bound.holds(group[name]), str(bound))
            for name, bound in BOUNDS.items()
        ),
        ("end", group["start"] <= group["end"], "in [start, 1]"),
        ("total_steps", group["total_steps"] is None or group["total_steps"] >= 1, "None or >= 1"),
        ("native", group["native"] in (True, False, None), "True, False or None"),
    ]
    for name, holds, rule in rules:
        if not holds:
            raise ValueError(f"invalid {name}: {group[name]} (must be {rule})")
    if group["differentiable"]:
        raise ValueError("SP does not support differentiable=True")


def refuse_former(settings: dict[str, Any]) -> None:
    """TypeError for settings that SP has no more, or never had, naming what replaces them."""
    successors = {
        "damping": 'metric="fisher" (the default) or "none"',
        "compile": "native",
        "gamma_start": "nothing: SP finds its first step by itself",
        "damping_bounds": "nothing: there is no diagonal damping any more",
    }
    for name in settings:
        if name in successors:
            raise TypeError(f"{name} was replaced by {successors[name]}")
        near = difflib.get_close_matches(name, [*BOUNDS, "nesterov", "decoupled", "total_steps", "held"], 1)
        hint = _COUNTERPARTS.get(name) or (f"did you mean {near[0]}?" if near else "")
        raise TypeError(f"{name} is no setting of SP{hint and ': '}{hint}")


def warn_of_lasting_choice(groups: Iterable[dict[str, Any]]) -> None:
    """UserWarning where the weights to be zero are chosen for good after the first step: without ``total_steps`` there
    is no ramp, and zeros are held."""
    for group in groups:
        if group["mode"] == "robust" and group["sigma"] > 0 and group["held"] and group["total_steps"] is None:
            words = "all zeros are chosen after the first step, by one batch's gradients, and stay"
            advice = "give total_steps, the optimizer steps of the run, for a ramp"
            warnings.warn(f"SP: sigma={group['sigma']:g} without total_steps: {words}; {advice}", stacklevel=3)
            return
