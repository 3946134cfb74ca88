"""Whose tensors an optimizer gets: the network that holds them, and what each of them is in it."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sp_yolo.errors import UserError
from sp_yolo.optim import build_param_groups

# What a wrapper calls its only child.
_WRAPPED = ("module", "_orig_mod")


class Role(NamedTuple):
    """A parameter's name, what it is ("backbone", "head", "bias", "norm", "frozen"), and whether it may be pruned."""

    name: str
    role: str
    prunable: bool


def network_of(tensors: Iterable[Tensor]) -> nn.Module | None:
    """The living module that holds all ``tensors`` as parameters, without its wrapper; None where there is none.

    Of several, the one nearest to the root that keeps its configuration (``yaml``), else the smallest root.
    """
    wanted = {id(tensor) for tensor in tensors}
    roots = [module for module in _roots() if wanted and wanted <= _parameters(module)]
    if not roots:
        return None
    root = min(roots, key=lambda root: len(_parameters(root)))
    module: nn.Module | None = root
    while module is not None:
        if isinstance(getattr(module, "yaml", None), dict):
            return module
        module = next((child for child in module.children() if wanted <= _parameters(child)), None)
    return root


def roles_of(network: nn.Module, backbone: int | None = None) -> dict[int, Role]:
    """The role of every parameter of ``network``, by its identity; as ``build_param_groups`` sees them.

    ``backbone``: its rows; default: the length of the list ``backbone`` of the network's own configuration, or what
    ``build_param_groups`` takes from the names.

    Raises:
        UserError: ``backbone`` counts rows of a network without rows.
    """
    roles = {id(param): Role(name, "frozen", False) for name, param in network.named_parameters()}
    if not any(param.requires_grad for param in network.parameters()):
        return roles
    try:
        groups = build_param_groups(network, backbone=backbone_rows(network) if backbone is None else backbone)
    except ValueError as error:
        raise UserError(f"--sp backbone: {error}") from None
    for group in groups:
        for param, name, prunable in zip(group["params"], group["param_names"], group["prunable"], strict=True):
            roles[id(param)] = Role(name, group["name"], prunable)
    return roles


def backbone_rows(network: nn.Module) -> int | None:
    """Rows of the backbone in the configuration that the network keeps; None where it keeps none."""
    cfg = getattr(network, "yaml", None)
    rows = cfg.get("backbone") if isinstance(cfg, dict) else None
    return len(rows) if isinstance(rows, list) and rows else None


def copies_of(network: nn.Module) -> list[nn.Module]:
    """Living modules with the same parameters by name and shape but none of its tensors: averages (EMA)."""
    shapes = _shapes(network)
    own = _parameters(network)
    return [other for other in _roots() if _shapes(other) == shapes and not own & _parameters(other)]


@torch.no_grad()
def mask_copies(copies: Iterable[nn.Module], masks: dict[str, Tensor]) -> None:
    """Zero in each copy what is masked (False), by parameter name."""
    for copy in copies:
        for name, param in copy.named_parameters():
            if name in masks:
                param.mul_(masks[name].to(param.device))


def _roots() -> Iterator[nn.Module]:
    """Living modules that are part of no other, or of a wrapper (DDP, AveragedModel, torch.compile) alone."""
    # type(), not isinstance(): a proxy answers that with the class of what it stands for, and may wake it up.
    modules = [found for found in gc.get_objects() if issubclass(type(found), nn.Module) and "_modules" in vars(found)]
    inner = {id(child) for module in modules for child in module._modules.values()}
    return (_unwrapped(module) for module in modules if id(module) not in inner)


def _unwrapped(module: nn.Module) -> nn.Module:
    children = dict(module.named_children())
    while len(children) == 1 and not children.keys().isdisjoint(_WRAPPED):
        (module,) = children.values()
        children = dict(module.named_children())
    return module


def _parameters(module: nn.Module) -> set[int]:
    return {id(param) for param in module.parameters()}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: param.shape for name, param in module.named_parameters()}
