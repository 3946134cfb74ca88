"""The one optimizer builder: SP, the torch optimizers people compare it with, or any other in torch.optim by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sp_yolo.config import Hyp
from sp_yolo.engine.schedule import StepPlan
from sp_yolo.errors import UserError
from sp_yolo.optim import SP, build_param_groups


def build_optimizer(
    name: str, model: nn.Module, hyp: Hyp, *, weight_decay: float, total_steps: int, check_finite: bool = True
) -> torch.optim.Optimizer:
    """An optimizer over the groups backbone, head, bias (index 2) and norm of ``model``.

    ``name``: sp, sgd (Nesterov), adam, adamw, or a class name of torch.optim. ``weight_decay``: scaled to the batch.
    ``total_steps``: optimizer steps of the run, the length of SP's sparsity ramp. ``check_finite``: whether SP looks at
    the gradients itself.

    Raises:
        UserError: no optimizer of that name, or one that cannot be built from a learning rate alone.
    """
    lr, momentum = hyp["lr0"], hyp["momentum"]
    if name == "sp":
        groups = build_param_groups(
            model,
            weight_decay=weight_decay,
            sigma_backbone=hyp["sp_sigma_backbone"],
            sigma_head=hyp["sp_sigma_head"],
        )
        return SP(
            groups,
            lr=lr,
            momentum=momentum,
            nesterov=True,
            mode=hyp["sp_mode"],
            metric=hyp["sp_metric"],
            # As in AdamW: an L2 term would be divided by the size of the gradients.
            decoupled=hyp["sp_mode"] == "robust" and hyp["sp_metric"] == "fisher",
            saliency=hyp["sp_saliency"],
            every=hyp["sp_every"],
            start=hyp["sp_start"],
            end=hyp["sp_end"],
            total_steps=total_steps,
            rho=hyp["sp_rho"],
            rcap=hyp["sp_rcap"],
            check_finite=check_finite,
        )
    keep = ("params", "name", "weight_decay")
    groups = [
        {key: value for key, value in group.items() if key in keep}
        for group in build_param_groups(model, weight_decay=weight_decay)
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(groups, lr=lr, betas=(momentum, 0.999))
    return _from_torch(name, groups, lr)


def set_rates(optimizer: torch.optim.Optimizer, plan: StepPlan, *, momentum: bool = True, betas: bool = True) -> None:
    """Give each group its lr of ``plan``; unless told otherwise its momentum too, which is beta_1 of Adam's kin."""
    for group in optimizer.param_groups:
        group["lr"] = plan.lr[group["name"]]
        if momentum and "momentum" in group:
            group["momentum"] = plan.momentum
        elif betas and "betas" in group:
            group["betas"] = (plan.momentum, group["betas"][1])


def _from_torch(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    known = {entry.lower(): getattr(torch.optim, entry) for entry in dir(torch.optim) if entry[0].isupper()}
    kind = known.get(name.lower())
    useless = (torch.optim.Optimizer, torch.optim.SparseAdam)  # the latter takes sparse gradients only
    if kind is None or kind in useless or not issubclass(kind, torch.optim.Optimizer):
        raise UserError(f"--optimizer {name}: not sp, sgd, adam, adamw or the name of a class in torch.optim")
    try:
        return kind(groups, lr=lr)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {name}: {str(error).splitlines()[0]}") from None
