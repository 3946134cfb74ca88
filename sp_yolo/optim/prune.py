"""The proximal step of ``mode="robust"`` on one parameter group, eqs. (5) and (18)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim import native
from sp_yolo.optim.damping import parameter_damping
from sp_yolo.optim.saliency import keep_masks, saliency
from sp_yolo.optim.update import CARRIED, flat


def prune_group(
    group: dict[str, Any], params: list[Tensor], state: Mapping[Any, Any], count: int, r_gamma: Tensor, compiled: bool
) -> None:
    """Zero the ``count`` weights of least saliency among all ``params``, and hold them there if the group says so.

    ``r_gamma``: the current r * gamma, for the diagonal. ``compiled``: rank in C where that applies. The group's
    "threshold" becomes lambda, the largest saliency removed.
    """
    states = [state[param] for param in params]
    ranked = _rank_natively(group, params, states, count) if compiled else None
    rows, group["threshold"] = ranked or _rank(group, params, states, count, r_gamma)
    for param, own, row in zip(params, states, rows, strict=True):
        mask = torch.empty_like(param, dtype=torch.bool)
        flat(mask).copy_(row)
        moving = row.view(torch.uint8)
        if "mask" in own:
            # What gathered behind the old mask must not move a weight that is now set free.
            moving = moving & flat(own["mask"]).view(torch.uint8)
        if group["held"]:
            own["mask"] = mask
        param.mul_(mask.view(torch.uint8))  # as bytes: bool is several times slower
        flat(own["momentum_buffer"]).mul_(moving)


def forget_displacement(states: Iterable[dict[str, Any]]) -> None:
    """The proximal jump would enter the next secant pair and break training: a displacement of 0 is no pair."""
    for state in states:
        state["displacement"].zero_()
        for name in CARRIED:
            if isinstance(state[name], Tensor):
                state[name].zero_()
            else:
                state[name] = 0.0


def _rank(
    group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]], count: int, r_gamma: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Masks as rows in memory order, and lambda. Saliencies go where the displacements are, which are forgotten."""
    scores = []
    for param, state in zip(params, states, strict=True):
        score = state["displacement"].copy_(param)
        scale = None
        if group["saliency"] == "fisher":
            scale = state["square_avg"]
        elif group["damping"] == "diagonal":
            scalar = r_gamma.to(score.device, score.dtype)
            scale = 1.0 / parameter_damping(score, scalar, group["damping_bounds"])
        saliency(score, scale, out=score)
        if "mask" in state:
            # Held zeros rank first, at -1: another weight whose saliency happens to be 0 does not set them free.
            score.sub_(state["mask"].view(torch.uint8).bitwise_xor(1))
        scores.append(flat(score))
    return keep_masks(scores, count)


def _rank_natively(
    group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]], count: int
) -> tuple[list[Tensor], Tensor] | None:
    """The same in C, where that applies."""
    diagonal = group["saliency"] == "damping" and group["damping"] == "diagonal"
    if diagonal or not all(map(native.plain, params)):
        return None
    kernels = native.library()
    if kernels is None:
        return None
    squares = [state["square_avg"] if group["saliency"] == "fisher" else None for state in states]
    return native.keep_masks(kernels, params, squares, [state.get("mask") for state in states], count)
