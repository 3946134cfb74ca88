"""Checkpoints laid out as the original writes them: pickled objects of classes that do not exist when they are read."""

from __future__ import annotations

import contextlib
import copy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sp_yolo.models import DetectionModel


@contextlib.contextmanager
def original_modules() -> Iterator[dict[str, types.ModuleType]]:
    """models.yolo and models.common with empty classes of the original's names, for as long as the block runs."""
    modules = {name: types.ModuleType(name) for name in ("models", "models.yolo", "models.common")}
    for path, names in {
        "models.yolo": ("Model", "Detect", "IDetect", "IAuxDetect"),
        "models.common": (
            *("Conv", "RepConv", "MP", "SP", "SPPCSPC", "DownC"),
            *("Concat", "Shortcut", "ReOrg", "ImplicitA", "ImplicitM"),
        ),
    }.items():
        for name in names:
            setattr(modules[path], name, type(name, (nn.Module,), {"__module__": path}))
    sys.modules.update(modules)
    try:
        yield modules
    finally:
        for name in modules:
            del sys.modules[name]


def as_original(model: DetectionModel, modules: dict[str, types.ModuleType]) -> nn.Module:
    """The same weights in objects of the original's classes, with the attributes that it hangs on its model."""

    def convert(module: nn.Module) -> nn.Module:
        name = {"SameMaxPool": "SP"}.get(type(module).__name__, type(module).__name__)
        owner = next((m for m in modules.values() if hasattr(m, name)), None)
        if isinstance(module, DetectionModel):
            owner, name = modules["models.yolo"], "Model"
        if owner is None:  # a layer of torch: pickled under torch's own path
            clone = module.__class__.__new__(module.__class__)
            clone.__dict__.update(module.__dict__)
        else:
            clone = getattr(owner, name)()
            clone._parameters.update(module._parameters)
            clone._buffers.update(module._buffers)
        clone._modules = {key: convert(child) for key, child in module._modules.items() if child is not None}
        return clone

    result = convert(copy.deepcopy(model))  # .half() changes parameters in place
    result.yaml = {**model.yaml}
    result.save = [4, 5]
    result.names = list(model.names)
    result.stride = model.stride
    result.traced = False
    result.hyp = {"lr0": 0.01}
    result.class_weights = np.ones(model.num_classes)
    return result


def save_original(model: DetectionModel, path: Path, *, ema: DetectionModel | None = None, **others: Any) -> None:
    """A checkpoint dict of half-precision module objects, as the original's trainer writes it."""
    with original_modules() as modules:
        content = {
            "epoch": 3,
            "best_fitness": np.array([0.25]),
            "training_results": "0/2 1.2G 0.1",
            "model": as_original(model, modules).half(),
            "ema": None if ema is None else as_original(ema, modules).half(),
            "updates": 7,
            "optimizer": None,
            "wandb_id": None,
            **others,
        }
        torch.save(content, path)
