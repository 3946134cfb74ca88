"""The proximal step of ``mode="robust"`` on one parameter group, eqs. (5) and (18)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim import native
from sp_yolo.optim.damping import parameter_damping
from sp_yolo.optim.saliency import keep_masks, saliency
from sp_yolo.optim.update import CARRIED


def prune_group(
    group: dict[str, Any], params: list[Tensor], state: Mapping[Any, Any], count: int, r_gamma: Tensor, compiled: bool
) -> None:
    """Zero the ``count`` weights of least saliency among all ``params``, and hold them there if the group says so.

    ``r_gamma``: the current r * gamma, for the diagonal. ``compiled``: rank in C where that applies. The group's
    "threshold" becomes lambda, the largest saliency removed.
    """
    states = [state[param] for param in params]
    ranked = _rank_natively(group, params, states, count) if compiled else None
    masks, group["threshold"] = ranked or _rank(group, params, states, count, r_gamma)
    for param, own, mask in zip(params, states, masks, strict=True):
        if group["held"]:
            own["mask"] = torch.empty_like(param, dtype=torch.bool).copy_(mask)
        for tensor in (param, own["momentum_buffer"]):
            tensor.mul_(mask.view(torch.uint8))  # as bytes: bool is several times slower


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
    saliencies = []
    for param, state in zip(params, states, strict=True):
        score = _saliency(group, param, state, r_gamma)
        if "mask" in state:
            # Held zeros rank first, at -1: another weight whose saliency happens to be 0 does not set them free.
            free = state["mask"].view(torch.uint8)
            state["momentum_buffer"].mul_(free)
            score.sub_(free.bitwise_xor(1))
        saliencies.append(score)
    return keep_masks(saliencies, count)


def _saliency(group: dict[str, Any], param: Tensor, state: dict[str, Any], r_gamma: Tensor) -> Tensor:
    """S of one tensor, eq. (5)."""
    wide = param.to(state["momentum_buffer"].dtype)
    if group["saliency"] == "fisher":
        return saliency(wide, state["square_avg"])
    if group["damping"] == "none":
        return saliency(wide)
    scalar = r_gamma.to(wide.device, wide.dtype)
    return saliency(wide, 1.0 / parameter_damping(wide, scalar, group["damping_bounds"]))


def _rank_natively(
    group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]], count: int
) -> tuple[list[Tensor], Tensor] | None:
    """The same in C, where that applies; then held zeros stay held, so nothing is to be cleared behind a mask."""
    diagonal = group["saliency"] == "damping" and group["damping"] == "diagonal"
    if diagonal or not all(map(native.plain, params)):
        return None
    kernels = native.library()
    if kernels is None:
        return None
    squares = [state["square_avg"] if group["saliency"] == "fisher" else None for state in states]
    return native.keep_masks(kernels, params, squares, [state.get("mask") for state in states], count)
