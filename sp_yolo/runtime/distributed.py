"""Several processes under torchrun: who am I, and the few exchanges a run needs."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sp_yolo.errors import UserError

# The others wait while the main process draws and saves; a process that dies is noticed by torchrun, not by this limit.
LONGEST_WAIT = timedelta(hours=4)


@dataclass(frozen=True)
class World:
    """This process among all: ``rank`` of ``size`` over all nodes, ``local_rank`` of ``local_size`` on this node."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0


def join_world() -> World:
    """Read torchrun's environment and connect the processes if there are several: nccl between GPUs, else gloo.

    Raises:
        UserError: RANK, LOCAL_RANK, WORLD_SIZE or LOCAL_WORLD_SIZE is not a number.
    """
    try:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
        world = World(rank, local_rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    except ValueError as error:
        raise UserError(f"environment RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE: {error}") from None
    if size == 1:
        return World()
    if not dist.is_initialized():
        gpu = "nccl" if dist.is_nccl_available() else "gloo"  # Windows has no nccl
        backends = f"cpu:gloo,cuda:{gpu}" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=LONGEST_WAIT)
    return world


def leave_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def share(model: nn.Module, world: World, device: torch.device, *, sync_bn: bool) -> nn.Module:
    """``model`` with its gradients averaged over all processes; ``sync_bn``: its BatchNorm statistics too, on GPUs.

    Buffers are not sent with every forward pass: training reads none of the others', and what is measured and saved are
    the main process's (:func:`copy_from_main`).
    """
    if world.size == 1:
        return model
    if sync_bn and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)


def unexchanged(network: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within it backward sums the gradients of ``network`` up where they are, and tells no other process.

    ``network``: of :func:`share`, compiled or not; one that exchanges nothing has nothing to hold back.
    """
    wrapped: Any = getattr(network, "_orig_mod", network)  # torch.compile's wrapper is no DistributedDataParallel
    return wrapped.no_sync() if hasattr(wrapped, "no_sync") else contextlib.nullcontext()


def copy_from_main(model: nn.Module, world: World) -> None:
    """The main process's parameters and buffers for all: each has BatchNorm statistics of its own images."""
    if world.size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def average(values: torch.Tensor, world: World) -> torch.Tensor:
    """Mean over processes of a small tensor, in place."""
    if world.size > 1:
        dist.all_reduce(values)
        values /= world.size
    return values


def largest(number: int, world: World) -> int:
    """The largest ``number`` of any process, on every process."""
    if world.size == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def gather(item: Any, world: World) -> list[Any]:
    """Every process's ``item`` on the main process, by rank; nothing on the others."""
    if world.size == 1:
        return [item]
    items: list[Any] | None = [None] * world.size if world.main else None
    dist.gather_object(item, items, dst=0)
    return items or []


def broadcast(item: Any, world: World) -> Any:
    """Rank 0's ``item`` on every process."""
    if world.size == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]
