"""Parameter groups of a detector: backbone, head, bias, norm."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

GROUP_NAMES = ("backbone", "head", "bias", "norm")
_ROW = re.compile(r"^model\.(\d+)\.")
_WRAPPER = re.compile(r"^(module\.|_orig_mod\.)+")
_NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def build_param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 5e-4,
    backbone: int | Callable[[str], bool] | None = None,
    sigma_backbone: float = 0.0,
    sigma_head: float = 0.0,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one of four groups: "backbone", "head", "bias", "norm", in that order.

    norm: weights of normalisation layers, implicit parameters (names with ``.ia.``, ``.im.`` or ``implicit``) and
    other tensors of fewer than two dimensions; bias: names ending in ``bias``. Neither is decayed or pruned. The rest
    are backbone and head weights, decayed, and pruned to ``sigma_backbone`` and ``sigma_head``, but for the first
    weight of the network and its output layers: all weights of the last row (``model.<i>.``), or, in a model without
    rows, the last weight.

    ``backbone`` says which weights are the backbone's: a number of leading rows, or a predicate on parameter names;
    default ``model.backbone_rows``. A model without rows: the names with a component ``backbone``, ``features``,
    ``encoder`` or ``body``; where no name has one, everything before the last weight. Prefixes of wrappers (DDP,
    torch.compile) are ignored. Frozen parameters are left out; groups may be empty. ``settings`` go into every group.

    Raises:
        ValueError: ``backbone`` is a number but the model has no rows; nothing is trainable; a trainable parameter is
            in no group or in several.
    """
    names = {_WRAPPER.sub("", name): p for name, p in model.named_parameters()}
    norms = _normalisation_weights(model)
    weights = [name for name, p in names.items() if _kind(name, p, norms) == "weight"]
    in_backbone = _backbone_rule(model, backbone, weights)
    spared = _spared(weights)
    groups = _empty_groups(weight_decay, sigma_backbone, sigma_head, settings)
    for name, param in names.items():
        if not param.requires_grad:
            continue
        kind = _kind(name, param, norms)
        group = groups[kind if kind != "weight" else ("backbone" if in_backbone(name) else "head")]
        group["params"].append(param)
        group["param_names"].append(name)
        group["prunable"].append(kind == "weight" and name not in spared)
    _check_partition(model, list(groups.values()))
    return list(groups.values())


def _empty_groups(
    weight_decay: float, sigma_backbone: float, sigma_head: float, settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    own = {
        "backbone": {"weight_decay": weight_decay, "sigma": sigma_backbone},
        "head": {"weight_decay": weight_decay, "sigma": sigma_head},
        "bias": {"weight_decay": 0.0, "sigma": 0.0},
        "norm": {"weight_decay": 0.0, "sigma": 0.0},
    }
    return {
        name: {**settings, "params": [], "name": name, "param_names": [], "prunable": [], **own[name]}
        for name in GROUP_NAMES
    }


def _kind(name: str, param: Tensor, norms: set[int]) -> str:
    if name.endswith("bias"):
        return "bias"
    implicit = ".ia." in name or ".im." in name or "implicit" in name
    return "norm" if id(param) in norms or implicit or param.ndim < 2 else "weight"


def _normalisation_weights(model: nn.Module) -> set[int]:
    """Identities of the parameters that belong to a normalisation layer, by type or by the name of the type."""
    layers = (m for m in model.modules() if isinstance(m, _NORM_TYPES) or "norm" in type(m).__name__.lower())
    return {id(p) for layer in layers for p in layer.parameters(recurse=False)}


def _backbone_rule(
    model: nn.Module, backbone: int | Callable[[str], bool] | None, weights: list[str]
) -> Callable[[str], bool]:
    if callable(backbone):
        return backbone
    if backbone is None:
        backbone = getattr(getattr(model, "module", model), "backbone_rows", None)
    if backbone is not None:
        rows = int(backbone)
        if not any(_ROW.match(name) for name in weights):
            raise ValueError(f"backbone={rows} counts rows, but the model has no parameter named model.<row>.*")
        return lambda name: (match := _ROW.match(name)) is not None and int(match.group(1)) < rows
    parts = {"backbone", "features", "encoder", "body"}
    if any(parts & set(name.split(".")) for name in weights):
        return lambda name: bool(parts & set(name.split(".")))
    return lambda name: name != weights[-1]


def _spared(weights: list[str]) -> set[str]:
    """Weights never pruned: the network's first, and its output layers'."""
    if not weights:
        return set()
    rows = [int(match.group(1)) for name in weights if (match := _ROW.match(name))]
    outputs = [name for name in weights if rows and name.startswith(f"model.{max(rows)}.")]
    return {weights[0], *(outputs or weights[-1:])}


def _check_partition(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    grouped = [id(p) for group in groups for p in group["params"]]
    if not trainable:
        raise ValueError("the model has no trainable parameter")
    if len(grouped) != len(set(grouped)) or set(grouped) != trainable:
        raise ValueError(f"{len(trainable)} trainable parameters, but {len(grouped)} entries in the groups")
