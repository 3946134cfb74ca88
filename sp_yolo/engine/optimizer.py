"""The one table of optimizers, and the one builder: SP, those people compare it with, or any class of torch.optim."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sp_yolo.config import OptimizerRecipe
from sp_yolo.engine.schedule import StepPlan
from sp_yolo.errors import UserError
from sp_yolo.optim import DEFAULTS, SP, build_param_groups

Groups = list[dict[str, Any]]
# Learning rates that a classifier is tuned over: half-decade steps over two and a half decades.
_LOW, _WIDE = (1e-4, 3.16e-4, 1e-3, 3.16e-3, 0.01, 0.0316), (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16)


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer by name.

    ``make(groups, recipe)``: builds it over the groups of ``build_param_groups``. ``hyp``: its recipe in hyp/ for
    detectors, "" where it has none. ``classifier``: its hyperparameters for classifiers where they differ from what all
    share; ``grid``: the learning rates that one is tuned over. ``momentum``: the recipe's is its momentum, or the first
    of its betas. ``own_lr``: its own default, where ``hyp`` was made for another optimizer.
    """

    make: Callable[[Groups, OptimizerRecipe], torch.optim.Optimizer]
    hyp: str
    classifier: dict[str, Any]
    grid: tuple[float, ...]
    momentum: bool = True
    own_lr: float | None = None


def _make_sp(groups: Groups, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    robust = recipe.sp_mode == "robust"
    return SP(
        groups,
        lr=recipe.lr0,
        momentum=recipe.momentum,
        mode=recipe.sp_mode,
        metric=recipe.sp_metric,
        # As in AdamW: an L2 term would be divided by the size of the gradients.
        decoupled=robust and recipe.sp_metric == "fisher",
        saliency=recipe.sp_saliency,
        every=recipe.sp_every,
        start=recipe.sp_start,
        end=recipe.sp_end,
        rho=recipe.sp_rho,
        rcap=recipe.sp_rcap,
    )


def _without_sp(groups: Groups) -> Groups:
    """The groups with what every optimizer of torch understands, without SP's settings."""
    return [{key: group[key] for key in ("params", "name", "weight_decay")} for group in groups]


def _make_sgd(groups: Groups, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(_without_sp(groups), lr=recipe.lr0, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _make_adam(groups: Groups, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    return torch.optim.Adam(_without_sp(groups), lr=recipe.lr0, betas=(recipe.momentum, 0.999))


def _make_adamw(groups: Groups, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_without_sp(groups), lr=recipe.lr0, betas=(recipe.momentum, 0.999))


# A classifier has SP's own defaults, for sp-paper the lr and sigma of its authors' example, for AdamW its usual decay.
OPTIMIZERS = {
    "sp": OptimizerEntry(
        _make_sp, "sp.yaml", {"lr0": DEFAULTS["lr"], "weight_decay": DEFAULTS["weight_decay"]}, (*_LOW[1:], 0.1)
    ),
    "sp-paper": OptimizerEntry(
        _make_sp, "", {"lr0": 1.0, "sp_mode": "paper", "sp_sigma_backbone": 0.1, "sp_sigma_head": 0.1}, _WIDE
    ),
    "sgd": OptimizerEntry(_make_sgd, "sgd.yaml", {"lr0": 0.03}, _WIDE),
    "adam": OptimizerEntry(_make_adam, "adamw.yaml", {"lr0": 0.001}, _LOW),
    "adamw": OptimizerEntry(_make_adamw, "adamw.yaml", {"lr0": 0.001, "weight_decay": 0.01}, _LOW),
}


def find_optimizer(name: str) -> OptimizerEntry:
    """The entry of ``name``: of the table, or a class of torch.optim with its own defaults.

    Raises:
        UserError: neither, with the nearest names.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    classes = _torch_classes()
    if name.lower() in classes:
        return _entry_of(name, classes[name.lower()])
    near = difflib.get_close_matches(name.lower(), [*OPTIMIZERS, *classes], n=3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise UserError(f"--optimizer {name}: not {', '.join(OPTIMIZERS)} or the name of a class in torch.optim{hint}")


def _torch_classes() -> dict[str, type[torch.optim.Optimizer]]:
    found = {entry.lower(): getattr(torch.optim, entry) for entry in dir(torch.optim) if entry[0].isupper()}
    useless = (torch.optim.Optimizer, torch.optim.SparseAdam)  # the latter takes sparse gradients only
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind not in useless
    }


def _entry_of(name: str, kind: type[torch.optim.Optimizer]) -> OptimizerEntry:
    """A class of torch.optim, built from a learning rate alone; a classifier has its own, and a decade to each side."""
    default = inspect.signature(kind).parameters["lr"].default
    lr = float(default) if isinstance(default, int | float) else 0.01

    def make(groups: Groups, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
        try:
            return kind(_without_sp(groups), lr=recipe.lr0)  # type: ignore[call-arg]
        except (TypeError, ValueError) as error:
            raise UserError(f"--optimizer {name}: {str(error).splitlines()[0]}") from None

    grid = tuple(float(f"{lr * 10 ** (half / 2):.3g}") for half in range(-2, 3))
    return OptimizerEntry(make, "sgd.yaml", {"lr0": lr}, grid, momentum=False, own_lr=lr)


def build_optimizer(
    name: str,
    model: nn.Module,
    recipe: OptimizerRecipe,
    *,
    weight_decay: float,
    total_steps: int,
    check_finite: bool = True,
) -> torch.optim.Optimizer:
    """The optimizer called ``name`` over the groups backbone, head, bias (index 2) and norm of ``model``.

    ``weight_decay``: scaled to the batch. ``total_steps``: optimizer steps of the run, the length of SP's sparsity
    ramp. ``check_finite``: whether SP looks at the gradients itself.

    Raises:
        UserError: see :func:`find_optimizer`; one that cannot be built from a learning rate alone.
    """
    groups = build_param_groups(
        model,
        weight_decay=weight_decay,
        sigma_backbone=recipe.sp_sigma_backbone,
        sigma_head=recipe.sp_sigma_head,
        total_steps=total_steps,
        check_finite=check_finite,
    )
    return find_optimizer(name).make(groups, recipe)


def set_rates(optimizer: torch.optim.Optimizer, plan: StepPlan, *, momentum: bool = True, betas: bool = True) -> None:
    """Give each group its lr of ``plan``; unless told otherwise its momentum too, which is beta_1 of Adam's kin."""
    for group in optimizer.param_groups:
        group["lr"] = plan.lr[group["name"]]
        if momentum and "momentum" in group:
            group["momentum"] = plan.momentum
        elif betas and "betas" in group:
            group["betas"] = (plan.momentum, group["betas"][1])
