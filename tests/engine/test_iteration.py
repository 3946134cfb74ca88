"""What one iteration tells other processes, and how often it waits for the device."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.one_step import batch, mini, state_of, step_of
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from sp_yolo.engine.step import SMALLEST_SCALE
from sp_yolo.errors import NonFiniteError


@pytest.fixture
def world_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_exchanged_once_per_optimizer_step(world_of_one: None, tmp_path: Path, compiled: bool) -> None:
    state = state_of(mini())
    network: Any = DistributedDataParallel(state.model)
    exchanged = []

    def exchange(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanged.append(state.progress.iteration)
        return allreduce_hook(dist.group.WORLD, bucket)

    network.register_comm_hook(None, exchange)
    if compiled:
        network = torch.compile(network, backend="eager")
    step = step_of(state, tmp_path, network=network, accumulate=2)
    assert [step(batch()) for _ in range(4)] == [False, True, False, True]
    assert exchanged == [1, 3]  # one bucket each; the sums of iterations 0 and 2 stay here until then


class Waits(TorchDispatchMode):
    """Counts the questions that make the host wait for a GPU: one number of a tensor is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip_norm", [0.0, 10.0])
def test_float16_makes_the_host_wait_once_a_step(tmp_path: Path, clip_norm: float) -> None:
    """GradScaler's own question whether to step. Where its scale stands is read later."""
    counts = []
    for scale in (0.0, 1024.0):
        step = step_of(state_of(mini(), scale=scale), tmp_path, clip_norm=clip_norm)
        step(batch())
        with Waits() as waits:
            assert step(batch())
        counts.append(waits.count)
    assert counts[1] - counts[0] == 1


def test_a_step_that_float16_skips_is_one_of_the_schedule(tmp_path: Path) -> None:
    state = state_of(mini(), scale=1024.0)
    next(state.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    before = {name: value.clone() for name, value in state.model.named_parameters()}
    assert step_of(state, tmp_path)(batch())
    assert (state.progress.iteration, state.ema.updates) == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in state.model.named_parameters())
    assert state.scaler.get_scale() == 512.0


def test_a_loss_scale_halved_too_often_stops_the_run(tmp_path: Path) -> None:
    state = state_of(mini(), scale=2 * SMALLEST_SCALE)
    next(state.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    step = step_of(state, tmp_path)
    step(batch())
    assert state.scaler.get_scale() == SMALLEST_SCALE
    with pytest.raises(NonFiniteError, match=r"gradient at every float16 loss scale not finite at iteration 1,"):
        step(batch())
    assert (tmp_path / "nonfinite_000001.npz").exists()
