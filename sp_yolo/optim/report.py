"""Saliency as a product: what pruning did to every tensor and group, from an optimizer or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from sp_yolo.optim.damping import fisher_metric
from sp_yolo.optim.saliency import saliency
from sp_yolo.optim.settings import prunable_flags
from sp_yolo.optim.sp import SP

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
# A layer that keeps fewer than this share of its weights hardly passes anything on.
COLLAPSED = 0.01
# torch.load(weights_only=True) is safe from here on (CVE-2026-24747).
SAFE_TORCH = "2.10"
# torch.quantile refuses larger inputs.
_LARGEST_SAMPLE = 1 << 24


@dataclass(frozen=True)
class TensorSaliency:
    """One tensor. ``quantiles``: of the saliency S = 0.5 h x^2 of the weights that are not zero, at QUANTILES; empty
    without such weights. ``metric``: smallest and largest D of eq. (19), 1 without."""

    name: str
    group: str
    numel: int
    zeros: int
    prunable: bool
    quantiles: tuple[float, ...]
    metric: tuple[float, float]


@dataclass(frozen=True)
class GroupSaliency:
    """One group: zeros among its ``numel`` prunable weights, and lambda of its last proximal step (None: never)."""

    name: str
    numel: int
    zeros: int
    sigma: float
    threshold: float | None


@dataclass(frozen=True)
class SaliencyReport:
    """``warnings`` names the collapsed layers: prunable tensors, or output channels of them, without weights."""

    tensors: list[TensorSaliency]
    groups: list[GroupSaliency]
    warnings: list[str]

    def __str__(self) -> str:
        width = max([len(t.name) for t in self.tensors] + [6])
        lines = [f"{'tensor':{width}} {'group':>9} {'weights':>10} {'zeros':>7} {'S median':>10} {'S max':>10}  D"]
        for t in self.tensors:
            median, largest = (f"{t.quantiles[i]:10.3g}" for i in (2, 4)) if t.quantiles else (" " * 10, " " * 10)
            share = f"{t.zeros / t.numel:7.1%}" if t.numel else " " * 7
            bounds = f"{t.metric[0]:.3g}-{t.metric[1]:.3g}"
            lines.append(f"{t.name:{width}} {t.group:>9} {t.numel:10} {share} {median} {largest}  {bounds}")
        for g in self.groups:
            share = f"{g.zeros / g.numel:.2%} of {g.numel}" if g.numel else "nothing prunable"
            threshold = "never pruned" if g.threshold is None else f"threshold {g.threshold:.3g}"
            lines.append(f"{g.name}: zeros {share}, sigma {g.sigma:g}, {threshold}")
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


def saliency_report(source: SP | Mapping[str, Any] | nn.Module | str | PathLike[str]) -> SaliencyReport:
    """Zeros, saliency quantiles, thresholds and metric per tensor and group.

    ``source``: an SP optimizer; a checkpoint, or its path, with "model" or "ema" (module or state dict) and "optimizer"
    (the state_dict of an SP whose groups carry ``param_names``); or weights alone (module or state dict), whose
    saliency is then their magnitude. Files are read with ``weights_only=True``.

    Raises:
        ValueError: the mapping holds neither weights nor an SP state; names of parameters are missing.
        RuntimeError: a path, with a torch whose reader is not safe.
    """
    if isinstance(source, (str, PathLike)):
        if torch.__version__ < SAFE_TORCH:
            raise RuntimeError(
                f"a file is read with torch {SAFE_TORCH} or newer only: torch.load of {torch.__version__} can be made "
                "to run code (CVE-2025-32434, CVE-2026-24747); give the loaded content instead"
            )
        return saliency_report(torch.load(source, map_location="cpu", weights_only=True))
    if isinstance(source, SP):
        groups, state = source.param_groups, source.state
        rows = [(group, list(zip(_names(group, i), group["params"], strict=True))) for i, group in enumerate(groups)]
        return _report(rows, state, {id(p): p for group in groups for p in group["params"]})
    checkpoint: Mapping[str, Any] = {"model": source} if isinstance(source, nn.Module) else source
    tensors = _tensors(checkpoint.get("model") or checkpoint.get("ema") or checkpoint)
    saved = checkpoint.get("optimizer")
    if not saved or "averages" not in saved["param_groups"][0]:
        group = {"name": "weights", "params": list(tensors.values())}
        return _report([(group, list(tensors.items()))], {}, {id(p): p for p in tensors.values()})
    rows, keys = [], {}
    for group in saved["param_groups"]:
        if "param_names" not in group:
            raise ValueError("the optimizer's groups carry no param_names: they cannot be matched with the weights")
        params = [tensors[name] for name in group["param_names"]]
        keys.update({id(p): key for p, key in zip(params, group["params"], strict=True)})
        rows.append(({**group, "params": params}, list(zip(group["param_names"], params, strict=True))))
    return _report(rows, saved["state"], keys)


def _names(group: dict[str, Any], index: int) -> list[str]:
    return group.get("param_names") or [f"{index}.{j}" for j in range(len(group["params"]))]


def _tensors(weights: Any) -> dict[str, Tensor]:
    """Floating-point parameters by name. In a state dict running statistics are told apart by their names."""
    if isinstance(weights, nn.Module):
        return {name: p.detach() for name, p in weights.named_parameters()}
    if not isinstance(weights, Mapping):
        raise ValueError(f"no weights in the checkpoint: 'model' is a {type(weights).__name__}")
    found = {
        name: value
        for name, value in weights.items()
        if isinstance(value, Tensor) and value.is_floating_point() and ".running_" not in f".{name}"
    }
    if not found:
        raise ValueError("no weights in the checkpoint: it has neither 'model' nor tensors by name")
    return found


def _report(
    rows: list[tuple[dict[str, Any], list[tuple[str, Tensor]]]], state: Mapping[Any, Any], keys: Mapping[int, Any]
) -> SaliencyReport:
    """``keys``: from the identity of a parameter to its key in ``state``."""
    tensors: list[TensorSaliency] = []
    groups: list[GroupSaliency] = []
    warnings: list[str] = []
    for index, (group, named) in enumerate(rows):
        name = group.get("name", f"group{index}")
        own = []
        for (tensor_name, param), prunable in zip(named, prunable_flags(group), strict=True):
            entry = state.get(keys[id(param)], {})
            own.append(_tensor_report(tensor_name, name, group, param, prunable, entry))
            if prunable:
                warnings += _collapse(tensor_name, param)
        tensors += own
        counted = [t for t in own if t.prunable]
        threshold = group.get("threshold")
        groups.append(
            GroupSaliency(
                name,
                sum(t.numel for t in counted),
                sum(t.zeros for t in counted),
                float(group.get("sigma", 0.0)),
                None if threshold is None else float(threshold),
            )
        )
    return SaliencyReport(tensors, groups, warnings)


def _tensor_report(
    name: str, group_name: str, group: dict[str, Any], param: Tensor, prunable: bool, state: Any
) -> TensorSaliency:
    x = param.detach().to(torch.promote_types(param.dtype, torch.float32))
    metric = torch.ones(1)
    if group.get("metric") == "fisher" and "square_avg" in state:
        metric = fisher_metric(state["square_avg"].to(x.device), group["momentum"])
    h = None
    if group.get("saliency") == "fisher" and "square_avg" in state:
        h = state["square_avg"].to(x.device)
    elif metric.numel() > 1:
        h = 1.0 / metric
    scores = saliency(x, h)[x != 0].flatten()
    if scores.numel() > _LARGEST_SAMPLE:
        scores = scores[:: scores.numel() // _LARGEST_SAMPLE + 1]
    levels = torch.tensor(QUANTILES, dtype=x.dtype, device=x.device)
    quantiles = torch.quantile(scores, levels).tolist() if scores.numel() else []
    return TensorSaliency(
        name,
        group_name,
        x.numel(),
        x.numel() - int(torch.count_nonzero(x)),
        prunable,
        tuple(quantiles),
        (float(metric.min()), float(metric.max())),
    )


def _collapse(name: str, param: Tensor) -> Iterator[str]:
    kept = int(torch.count_nonzero(param))
    if kept < COLLAPSED * param.numel():
        yield f"{name} has collapsed: {kept} of {param.numel()} weights are left"
        return
    alive = int(param.detach().flatten(1).any(dim=1).sum())
    if alive < param.shape[0]:
        yield f"{name}: {param.shape[0] - alive} of {param.shape[0]} output channels have no weight left"
