"""The proximal step of ``mode="robust"`` on one parameter group, eqs. (5) and (18)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim import native
from sp_yolo.optim.batch import flat, is_dense
from sp_yolo.optim.saliency import BLOCK, SAMPLE, bracket, keep_blocks, keep_masks, saliency, saliency_matrix


def prune_group(
    group: dict[str, Any], params: list[Tensor], state: Mapping[Any, Any], count: int, compiled: bool
) -> bool:
    """Zero the ``count`` weights of least saliency among all ``params``, and hold them there if the group says so.

    ``compiled``: work in C where that applies. The group's "threshold" becomes lambda, the largest saliency removed.
    Returns whether a state holds a mask that held none before.
    """
    plain = all(param.device.type == "cpu" and param.dtype == torch.float32 for param in params)
    kernels = native.library() if compiled and plain else None
    states = [state[param] for param in params]
    held = _held([own["mask"] for own in states if "mask" in own])
    if held == count:
        return False  # the held zeros are the weights of least saliency
    rows, group["threshold"] = _rank(group, params, states, count, held, kernels)
    # What gathers in v behind a mask must not move a weight that is set free; while it is held, it does not matter.
    clear = not group["held"] or count < held or params[0].device.type != "cpu"
    more = False
    for param, own, row in zip(params, states, rows, strict=True):
        mask = own.get("mask")
        if clear:
            moving = row if mask is None else row & flat(mask)
            flat(own["momentum_buffer"]).mul_(moving.view(torch.uint8))
        if mask is None:
            mask = torch.empty_like(param, dtype=torch.bool)
        flat(mask).copy_(row)
        if group["held"] and "mask" not in own:
            own["mask"], more = mask, True
        if kernels is not None and is_dense(param):
            native.zero(kernels, param, mask)
        else:
            param.mul_(mask.view(torch.uint8))  # as bytes: bool is several times slower
    return more


def forget_displacement(states: Iterable[dict[str, Any]]) -> None:
    """The proximal jump would enter the next secant pair and break training: a displacement of 0 is no pair."""
    torch._foreach_zero_([state[name] for state in states for name in ("displacement", "secant")])


def _held(masks: list[Tensor]) -> int:
    """Number of held zeros; 0 on an accelerator, which is not asked: there all weights are sorted anyway."""
    return sum(mask.numel() - int(mask.count_nonzero()) for mask in masks if mask.device.type == "cpu")


def _rank(
    group: dict[str, Any],
    params: list[Tensor],
    states: list[dict[str, Any]],
    count: int,
    held: int,
    kernels: ctypes.CDLL | None,
) -> tuple[list[Tensor], Tensor]:
    """Masks as rows in memory order, and lambda."""
    weights = [_Weights(group, *pair) for pair in zip(params, states, strict=True)]
    n = sum(p.numel() for p in params)
    if n > SAMPLE and count > held and params[0].device.type == "cpu":
        sample = torch.cat([w.sample(n // SAMPLE) for w in weights])
        low, high = bracket(sample, (count - held) / (n - held))
        if kernels is None:
            found = keep_blocks((s for w in weights for s in w.blocks()), n, count, low, high)
        else:
            found = native.keep(kernels, [w.rows for w in weights], n, count, low, high)
        if found:
            return list(found[0].split([p.numel() for p in params])), found[1]
    return keep_masks([w.saliency() for w in weights], count, held)


class _Weights:
    """One tensor as the ranking sees it: dense rows of x, of what weighs x^2, of the mask."""

    def __init__(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        x = param if is_dense(param) else torch.empty_like(param).copy_(param)
        scale = saliency_matrix(group, state)
        mask = state.get("mask")
        self.dtype = state["momentum_buffer"].dtype
        self.rows = flat(x), None if scale is None else flat(scale), None if mask is None else flat(mask)

    def sample(self, stride: int) -> Tensor:
        """The saliency of one weight in ``stride``, without the held ones."""
        x, scale, mask = self.rows
        score = saliency(x[::stride].to(self.dtype), None if scale is None else scale[::stride])
        return score if mask is None else score[mask[::stride]]

    def saliency(self) -> Tensor:
        return self._score(slice(None), None)

    def blocks(self) -> Iterator[Tensor]:
        """The saliencies in order, each block in the memory of the last."""
        n = self.rows[0].numel()
        scratch = torch.empty(min(n, BLOCK), dtype=self.dtype)
        for start in range(0, n, BLOCK):
            yield self._score(slice(start, start + BLOCK), scratch[: n - start])

    def _score(self, part: slice, out: Tensor | None) -> Tensor:
        x, scale, mask = self.rows
        score = saliency(x[part].to(self.dtype), None if scale is None else scale[part], out)
        # Held zeros rank first, at -1: another weight whose saliency happens to be 0 does not set them free.
        return score if mask is None else score.sub_(mask[part].view(torch.uint8).bitwise_xor(1))
