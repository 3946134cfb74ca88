"""--batch-size auto: how many images fit into memory, from what one of them takes in a training step."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor

from sp_yolo.errors import EnvironmentFault
from sp_yolo.models import DetectionModel
from sp_yolo.runtime.device import Compute

USED = 0.7  # of the free memory: images differ in their number of labels, and the loader's batches lie beside
MOST = 64  # per process: the nominal batch, of which one optimizer step is made in any case
# Of the bytes kept for the backward pass: gradients on their way, and what convolutions work in. On a CPU measured as
# 1.4 (yolov7-tiny, 256 px, batch 4 against 12); on a GPU the peak of a step is read.
BESIDE = 1.6
COPIES = 5  # of the weights: gradients, two of the optimizer, the average, the average as it is saved


def fitting_batch(model: DetectionModel, image_size: int, compute: Compute) -> int:
    """Images per process that a training step has memory for: a multiple of 8 from 8 on, at most ``MOST``.

    Raises:
        EnvironmentFault: not even one fits, or the system does not tell how much memory is free.
    """
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    free = USED * free_memory(compute) - COPIES * weights
    found = int(min(free // max(bytes_per_image(model, image_size, compute), 1), MOST))
    if found < 1:
        raise EnvironmentFault(f"--batch-size auto: not one image of {image_size} px fits; try a smaller --img-size")
    return found if found < 8 else found // 8 * 8


def bytes_per_image(model: DetectionModel, image_size: int, compute: Compute) -> float:
    """What one image more takes in a training step: two trial steps on a copy of ``model``, or on a CPU forwards."""
    trial = copy.deepcopy(model).to(compute.device).train()
    measure = _peak_of_step if compute.device.type == "cuda" else _kept_by_forward
    one, two = (measure(trial, torch.zeros(n, 3, image_size, image_size), compute) for n in (1, 2))
    return two - one


def _peak_of_step(model: DetectionModel, images: Tensor, compute: Compute) -> float:
    torch.cuda.reset_peak_memory_stats(compute.device)
    with compute.autocast():
        maps = model(images.to(compute.device).contiguous(memory_format=torch.channels_last))
    torch.stack([each.float().sum() for each in maps]).sum().backward()
    model.zero_grad(set_to_none=True)
    return float(torch.cuda.max_memory_allocated(compute.device))


def _kept_by_forward(model: DetectionModel, images: Tensor, compute: Compute) -> float:
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), compute.autocast():
        model(images.contiguous(memory_format=torch.channels_last))
    return BESIDE * sum(kept.values())


def free_memory(compute: Compute) -> float:
    """Bytes: of the GPU, or of this machine and, where it has one, of this container."""
    if compute.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(compute.device)
        return free + torch.cuda.memory_reserved(compute.device) - torch.cuda.memory_allocated(compute.device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            raise EnvironmentFault("--batch-size auto: this system does not say how much memory is free") from None
    return min(free, _container_memory())


def _container_memory() -> float:
    """What control groups (version 2) leave free; infinite where they set no bound."""
    try:
        bound = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")
        return float("inf") if bound == "max" else float(bound) - float(used)
    except (OSError, ValueError):
        return float("inf")
