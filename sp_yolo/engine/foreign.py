"""Optimizers of other packages by name: torch.optim, timm, pytorch_optimizer, any class; tried before they are used."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sp_yolo.errors import EnvironmentFault, UserError

Groups = list[dict[str, Any]]
Make = Callable[..., torch.optim.Optimizer]
# A name of its own for what torch.optim has under that name in a form that a network with convolutions cannot use.
SYNONYMS = {"muon": "timm:muon"}
# Settings of the recipe, by the keyword that says the same to an optimizer.
_RECIPE = {"lr": "lr0", "weight_decay": "weight_decay", "params": "nothing"}
_NO_CLOSURE = "evaluates the loss several times within a step (a closure), a run does so once"
_NO_TWO_PASSES = "needs two backward passes for a step (as SAM does), a run makes one"
_NO_GRAPH = "needs second derivatives (create_graph=True), a run computes gradients alone"


@dataclass(frozen=True)
class ForeignOptimizer:
    """``make(groups, lr=..., **keywords)`` builds it. ``lr``: its own default, NaN where it has none.

    ``schedule_free``: it averages the weights itself, see :mod:`sp_yolo.engine.schedule_free`. ``by_kind``: it treats
    hidden layers in another way than the rest, and each group says so with ``use_muon``.
    """

    name: str
    make: Make
    lr: float
    schedule_free: bool
    by_kind: bool

    def build(self, groups: Groups, lr: float, keywords: Mapping[str, Any]) -> torch.optim.Optimizer:
        """Over groups of ``build_param_groups``.

        Raises:
            UserError: it does not take these keywords, or these parameters.
        """
        shown = _split_hidden(groups) if self.by_kind else [_plain(group) for group in groups]
        shown = [group for group in shown if group["params"]] or shown
        try:
            optimizer = self.make(shown, lr=lr, **{key: _plain_value(value) for key, value in keywords.items()})
        except Exception as error:  # whatever another package raises
            raise UserError(f"--optimizer {self.name}: {_first_line(error)}") from None
        if self.schedule_free:
            optimizer.train()  # type: ignore[attr-defined]
        return optimizer


def find_foreign(name: str) -> ForeignOptimizer | None:
    """The optimizer that ``name`` stands for, None where it is the name of nothing in torch.optim.

    ``NAME`` of torch.optim, ``timm:NAME``, ``pytorch_optimizer:NAME`` or ``module:Class``.

    Raises:
        UserError: a package or a module without that name. EnvironmentFault: the package is not installed.
    """
    source, colon, short = SYNONYMS.get(name.lower(), name).partition(":")
    if not colon:
        kind = torch_classes().get(name.lower())
        return None if kind is None else _describe(name, kind)
    try:
        make = {"timm": _of_timm, "pytorch_optimizer": _of_pytorch_optimizer}.get(source, _of_module)(source, short)
    except (ImportError, AssertionError) as error:
        extra = "; pip install 'sp-yolo[optimizers]'" if source in ("timm", "pytorch_optimizer") else ""
        raise EnvironmentFault(f"--optimizer {name}: {_first_line(error)}{extra}") from None
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise UserError(f"--optimizer {name}: {_first_line(error)}") from None
    return _describe(name, make)


def package_of(name: str) -> str:
    """The module that an optimizer of that name is imported from, "" for one of torch or our own."""
    source, colon, _ = SYNONYMS.get(name.lower(), name).partition(":")
    return "timm.optim" if colon and source == "timm" else source if colon else ""


def torch_classes() -> dict[str, type[torch.optim.Optimizer]]:
    found = {entry.lower(): getattr(torch.optim, entry) for entry in dir(torch.optim) if entry[0].isupper()}
    useless = (torch.optim.Optimizer, torch.optim.SparseAdam)  # the latter takes sparse gradients only
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind not in useless
    }


def _of_timm(source: str, name: str) -> Make:
    make: Make = importlib.import_module("timm.optim").get_optimizer_class(name.lower())
    return make


def _of_pytorch_optimizer(source: str, name: str) -> Make:
    make: Make = importlib.import_module("pytorch_optimizer").load_optimizer(name)
    return make


def _of_module(source: str, name: str) -> Make:
    found = getattr(importlib.import_module(source), name)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError("is no class of optimizers")
    return found


def _describe(name: str, make: Make) -> ForeignOptimizer:
    kind = make.func if isinstance(make, functools.partial) else make
    default = inspect.signature(make).parameters.get("lr")
    if default is None:
        raise UserError(f"--optimizer {name}: has no learning rate to set")
    return ForeignOptimizer(
        name=name,
        make=make,
        lr=float(default.default) if isinstance(default.default, int | float) else float("nan"),
        schedule_free=all(callable(getattr(kind, method, None)) for method in ("train", "eval")),
        by_kind="muon" in kind.__name__.lower() and not kind.__module__.startswith("torch."),
    )


def _plain_value(value: Any) -> Any:
    """YAML has no tuples, and betas have to be one."""
    return tuple(value) if isinstance(value, list) else value


# -------------------------------------------------------------------------------------------------------------- groups
def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group with what every optimizer understands, without SP's settings."""
    return {key: group[key] for key in ("params", "name", "weight_decay")}


def _split_hidden(groups: Groups) -> Groups:
    """The groups with ``use_muon``: true for weights of two or more dimensions but the network's first and its output
    layers', as Muon's author recommends; the others are AdamW's."""
    found = []
    for group in groups:
        hidden = group.get("prunable") or [parameter.ndim >= 2 for parameter in group["params"]]
        for wanted in (True, False):
            members = [p for p, each in zip(group["params"], hidden, strict=True) if each == wanted]
            if members:
                found.append({**_plain(group), "params": members, "use_muon": wanted})
    return found


# --------------------------------------------------------------------------------------------------------------- trial
def require_usable(found: ForeignOptimizer, keywords: Mapping[str, Any]) -> None:
    """Raises UserError, in one line, where training cannot be done with it: found out on a network of a few weights."""
    if wrong := sorted(set(keywords) & set(_RECIPE)):
        raise UserError(f"--opt {wrong[0]}: is {_RECIPE[wrong[0]]} of the recipe: --set {_RECIPE[wrong[0]]}=...")
    words = _why_not(found.name, found, json.dumps(keywords, sort_keys=True))
    if words:
        raise UserError(f"--optimizer {found.name}: {words}")


@functools.lru_cache(maxsize=256)
def _why_not(name: str, found: ForeignOptimizer, keywords: str) -> str:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
        groups: Groups = []
        for name, weights in (("backbone", model[0]), ("head", model[2]), ("output", model[3]), ("norm", model[1])):
            own = [p for key, p in weights.named_parameters() if key != "bias"]
            groups.append({"params": own, "name": name, "weight_decay": 1e-4 * (name != "norm")})
            groups[-1]["prunable"] = [name == "head"] * len(own)
        biases = [p for key, p in model.named_parameters() if key.endswith("bias")]
        groups.append({"params": biases, "name": "bias", "weight_decay": 0.0, "prunable": [False] * len(biases)})
        kind: Any = found.make.func if isinstance(found.make, functools.partial) else found.make
        if hasattr(kind, "first_step"):
            return _NO_TWO_PASSES
        if _needs(kind.step, "closure"):
            return _NO_CLOSURE
        try:
            optimizer = found.build(groups, 1e-3, json.loads(keywords))
        except UserError as error:
            return str(error).partition(": ")[2]
        return _steps(model, optimizer)


def _needs(function: Callable[..., Any], name: str) -> bool:
    parameter = inspect.signature(function).parameters.get(name)
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Why two steps with one backward pass each fail, "" where they do not."""
    try:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 6, 6)).square().mean().backward()
            optimizer.step()
    except Exception as error:  # whatever another package raises
        words = f"{type(error).__name__} {_first_line(error)}"
        return (
            _NO_CLOSURE if "losure" in words else _NO_GRAPH if "create_graph" in words or "grad_fn" in words else words
        )
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        return "the weights are not finite after two steps"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
