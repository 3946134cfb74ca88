"""The one table of optimizers, and the one builder: SP, those people compare it with, or any of another package."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sp_yolo.config import OptimizerRecipe
from sp_yolo.engine.foreign import ForeignOptimizer, find_foreign, require_usable, torch_classes
from sp_yolo.engine.schedule import StepPlan
from sp_yolo.errors import UserError
from sp_yolo.optim import DEFAULTS, SP, build_param_groups

Groups = list[dict[str, Any]]
Keywords = Mapping[str, Any]
# Learning rates that a classifier is tuned over: half-decade steps over two and a half decades.
_LOW, _WIDE = (1e-4, 3.16e-4, 1e-3, 3.16e-3, 0.01, 0.0316), (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16)


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer by name.

    ``make(groups, recipe, keywords)``: builds it over the groups of ``build_param_groups``. ``hyp``: its recipe in hyp/
    for detectors, "" where it has none. ``classifier``: its hyperparameters for classifiers where they differ from what
    all share; ``grid``: the learning rates that one is tuned over. ``momentum``: the recipe's is its momentum, or the
    first of its betas. ``own_lr``: its own default, where ``hyp`` was made for another optimizer. ``schedule_free``: it
    needs a constant rate and averages the weights itself.
    """

    make: Callable[[Groups, OptimizerRecipe, Keywords], torch.optim.Optimizer]
    hyp: str
    classifier: dict[str, Any]
    grid: tuple[float, ...]
    momentum: bool = True
    own_lr: float | None = None
    schedule_free: bool = False


def _make_sp(groups: Groups, recipe: OptimizerRecipe, keywords: Keywords) -> torch.optim.Optimizer:
    if keywords:
        raise UserError(f"--opt {next(iter(keywords))}: SP's settings are the recipe's sp_*: --set sp_...=...")
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


def _make_sgd(groups: Groups, recipe: OptimizerRecipe, keywords: Keywords) -> torch.optim.Optimizer:
    own: dict[str, Any] = {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0, **keywords}
    return torch.optim.SGD(_without_sp(groups), lr=recipe.lr0, **own)


def _make_adam(
    kind: type[torch.optim.Adam], groups: Groups, recipe: OptimizerRecipe, keywords: Keywords
) -> torch.optim.Optimizer:
    own: dict[str, Any] = {"betas": (recipe.momentum, 0.999), **keywords}
    return kind(_without_sp(groups), lr=recipe.lr0, **own)


# A classifier has SP's own defaults, for sp-paper the lr and sigma of its authors' example, for AdamW its usual decay.
OPTIMIZERS = {
    "sp": OptimizerEntry(
        _make_sp, "sp.yaml", {"lr0": DEFAULTS["lr"], "weight_decay": DEFAULTS["weight_decay"]}, (*_LOW[1:], 0.1)
    ),
    "sp-paper": OptimizerEntry(
        _make_sp, "", {"lr0": 1.0, "sp_mode": "paper", "sp_sigma_backbone": 0.1, "sp_sigma_head": 0.1}, _WIDE
    ),
    "sgd": OptimizerEntry(_make_sgd, "sgd.yaml", {"lr0": 0.03}, _WIDE),
    "adam": OptimizerEntry(partial(_make_adam, torch.optim.Adam), "adamw.yaml", {"lr0": 0.001}, _LOW),
    "adamw": OptimizerEntry(
        partial(_make_adam, torch.optim.AdamW), "adamw.yaml", {"lr0": 0.001, "weight_decay": 0.01}, _LOW
    ),
}


def find_optimizer(name: str, keywords: Keywords | None = None) -> OptimizerEntry:
    """The entry of ``name``: of the table, or one of another package with its own defaults (see ``find_foreign``).

    ``keywords``: arguments of its class (``--opt``). What is not of the table is tried on a few weights first.

    Raises:
        UserError: neither, with the nearest names; one that training cannot be done with.
        EnvironmentFault: its package is not installed.
    """
    if name in OPTIMIZERS:
        return _with_keywords(name, OPTIMIZERS[name], keywords or {})
    found = find_foreign(name)
    if found is not None:
        require_usable(found, keywords or {})
        return _entry_of(found)
    near = difflib.get_close_matches(name.lower(), [*OPTIMIZERS, *torch_classes()], n=3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise UserError(
        f"--optimizer {name}: not {', '.join(OPTIMIZERS)}, the name of a class in torch.optim, timm:NAME, "
        f"pytorch_optimizer:NAME or module:Class{hint}"
    )


def _with_keywords(name: str, entry: OptimizerEntry, keywords: Keywords) -> OptimizerEntry:
    """An entry of the table that was given arguments of its class; a momentum among them stays as it is."""
    if not keywords:
        return entry
    weight = nn.Parameter(torch.zeros(2, 2))
    try:
        entry.make([{"params": [weight], "name": "head", "weight_decay": 0.0}], OptimizerRecipe(), keywords)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {name}: {str(error).splitlines()[0]}") from None
    return dataclasses.replace(entry, momentum=entry.momentum and not {"betas", "momentum"} & set(keywords))


def _entry_of(found: ForeignOptimizer) -> OptimizerEntry:
    """One of another package, built from a learning rate; a classifier has its own, and a decade to each side."""
    lr = 0.01 if math.isnan(found.lr) else found.lr
    return OptimizerEntry(
        lambda groups, recipe, keywords: found.build(groups, recipe.lr0, keywords),
        "sgd.yaml",
        {"lr0": lr},
        tuple(float(f"{lr * 10 ** (half / 2):.3g}") for half in range(-2, 3)),
        momentum=False,
        own_lr=lr,
        schedule_free=found.schedule_free,
    )


def build_optimizer(
    name: str,
    model: nn.Module,
    recipe: OptimizerRecipe,
    *,
    weight_decay: float,
    total_steps: int,
    keywords: Keywords | None = None,
    check_finite: bool = True,
) -> torch.optim.Optimizer:
    """The optimizer called ``name`` over the groups backbone, head, bias (index 2) and norm of ``model``.

    ``weight_decay``: scaled to the batch. ``total_steps``: optimizer steps of the run, the length of SP's sparsity
    ramp. ``keywords``: arguments of its class. ``check_finite``: whether SP looks at the gradients itself.

    Raises:
        UserError: see :func:`find_optimizer`.
    """
    groups = build_param_groups(
        model,
        weight_decay=weight_decay,
        sigma_backbone=recipe.sp_sigma_backbone,
        sigma_head=recipe.sp_sigma_head,
        total_steps=total_steps,
        check_finite=check_finite,
    )
    return find_optimizer(name, keywords).make(groups, recipe, keywords or {})


def set_rates(optimizer: torch.optim.Optimizer, plan: StepPlan, *, momentum: bool = True, betas: bool = True) -> None:
    """Give each group its lr of ``plan``; unless told otherwise its momentum too, which is beta_1 of Adam's kin."""
    for group in optimizer.param_groups:
        group["lr"] = plan.lr[group["name"]]
        if momentum and "momentum" in group:
            group["momentum"] = plan.momentum
        elif betas and "betas" in group:
            group["betas"] = (plan.momentum, group["betas"][1])
