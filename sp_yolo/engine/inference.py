"""A model as it is only looked at, never trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sp_yolo.backends import ExportedModel, runtime_of
from sp_yolo.engine.inputs import size_grid, to_input
from sp_yolo.models import DetectionModel, deploy, model_from_weights
from sp_yolo.models.weights.published import find_weights
from sp_yolo.runtime.device import Compute, searched_convolutions


@dataclass(frozen=True)
class Network:
    """A network as a detector calls it, whatever runs it.

    ``names``: of its classes. ``stride``: sides of images are multiples of it, in px. ``forward``: uint8 [B, 3, H, W]
    RGB on the CPU -> float [B, N, 5 + classes]: cx, cy, w, h in px of these images, objectness, classes.
    ``fixed_hw``: the one size of images that it takes, None where it takes any.
    """

    names: tuple[str, ...]
    stride: int
    forward: Callable[[Tensor], Tensor]
    fixed_hw: tuple[int, int] | None = None


def open_network(weights: str, compute: Compute, *, augment: bool = False) -> Network:
    """The network of a file, ready to run: the one place where a detector's file is loaded and called.

    ``weights``: a checkpoint, a published name, or a file that `sp-yolo export` wrote. ``augment``: three scales, one
    mirrored.

    Raises:
        UserError: the file holds no model. EnvironmentFault, StorageError: see :class:`ExportedModel`.
    """
    weights = find_weights(weights)
    if runtime_of(weights):
        return _open_exported(weights, compute, augment)
    model = model_from_weights(weights)
    deployed = deploy(model).to(compute.device).to(memory_format=torch.channels_last).eval()
    runnable = for_inference(deployed, compute)

    @torch.no_grad()
    def forward(images: Tensor) -> Tensor:
        with compute.autocast(), searched_convolutions(shapes_repeat=False):
            decoded: Tensor = runnable(to_input(images, compute), augment=augment)[0]
        return decoded

    return Network(tuple(model.names), size_grid(model), forward)


def _open_exported(weights: str, compute: Compute, augment: bool) -> Network:
    model = ExportedModel(weights, str(compute.device))
    size = model.facts.image_size

    @torch.no_grad()
    def forward(images: Tensor) -> Tensor:
        return model(to_input(images, compute), augment)[0]

    return Network(tuple(model.names), size_grid(model), forward, (size[0], size[1]) if size else None)


def for_inference(model: DetectionModel, compute: Compute) -> DetectionModel:
    """``model``; on a GPU with autocast a copy whose convolutions hold their weights in the type they compute in.

    Autocast would round them in every forward pass, a hundred small kernels; the rounded numbers are the same. The head
    is left alone: it merges its weights in float32 first.
    """
    if compute.amp is None or compute.device.type != "cuda":
        return model
    model = copy.deepcopy(model)
    of_head = set(model.head.modules())
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module not in of_head:
            module.to(compute.amp)
    return model
