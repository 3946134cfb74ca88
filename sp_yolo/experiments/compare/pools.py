"""Where cells run: processes of this machine, or workers of a Dask cluster; both are a concurrent.futures.Executor."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from sp_yolo.errors import EnvironmentFault
from sp_yolo.experiments.compare.execute import Result, run_cell
from sp_yolo.experiments.compare.study import Cell

# What the processes of a pool import once, before they are forked from one another.
_PRELOADED = ["sp_yolo.experiments.compare.execute", "matplotlib.figure"]
GPU = "GPU"  # resource of a worker that takes one cell at a time for it


@dataclass(frozen=True)
class Pool:
    """``run``: what a process is given to do with a cell. ``broken``: raised where processes ended without a result."""

    executor: Executor
    run: Callable[[Cell, Path], Result]
    broken: tuple[type[Exception], ...]


@contextlib.contextmanager
def local_pool(jobs: int, packages: Sequence[str] = ()) -> Iterator[Pool | None]:
    """``jobs`` processes of this machine, with one thread each; None for one job, which needs none.

    They are forked from a server that has imported everything, ``packages`` of optimizers too: imports take longer
    than a small run.
    """
    if jobs == 1:
        yield None
        return
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        multiprocessing.set_forkserver_preload([*_PRELOADED, *packages])
    with ProcessPoolExecutor(jobs, context, initializer=_start_process) as executor:
        yield Pool(executor, run_cell, (BrokenProcessPool,))


def _start_process() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of what it starts
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A command that is killed cannot end its processes, which would wait for cells for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def cluster_pool(address: str) -> Iterator[Pool]:
    """The workers of the Dask scheduler at ``address`` (tcp://HOST:8786), one cell at a time each.

    A lost worker's cells are run again by others. Where workers announce GPUs (``--resources GPU=1``), cells run on
    these alone.

    Raises:
        EnvironmentFault: distributed is not installed; no scheduler there, or no worker of one thread.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise EnvironmentFault("--scheduler needs distributed: pip install 'sp-yolo[cluster]'") from None
    try:
        client = Client(address, timeout=30)
    except (OSError, ValueError, TypeError) as error:
        raise EnvironmentFault(f"--scheduler {address}: {str(error).splitlines()[0]}") from None
    with client:
        resources = _resources(client.scheduler_info(n_workers=-1)["workers"], address)
        with client.get_executor(pure=False, **resources) as executor:
            yield Pool(executor, _run_elsewhere, (KilledWorker,))


def _resources(workers: dict[str, dict], address: str) -> dict[str, dict[str, int]]:
    """What a cell asks of its worker.

    Raises:
        EnvironmentFault: no worker, or one that would run several cells in the threads of one process.
    """
    if not workers:
        raise EnvironmentFault(f"--scheduler {address}: it has no workers yet")
    gpus = {name: worker.get("resources", {}).get(GPU, 0) for name, worker in workers.items()}
    if any(gpus.values()):
        workers = {name: workers[name] for name, count in gpus.items() if count}
    for name, worker in workers.items():
        at_once = gpus[name] or worker["nthreads"]
        if at_once > 1:
            raise EnvironmentFault(
                f"--scheduler {address}: worker {name} would run {at_once:g} cells at once: start one worker for each "
                "core or GPU, with --nthreads 1"
            )
    return {"resources": {GPU: 1}} if any(gpus.values()) else {}


def _run_elsewhere(cell: Cell, folder: Path) -> Result:
    """On a worker that may not see the folder of the results: what the run writes is dropped, its result travels."""
    del folder
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own:
        return run_cell(cell, Path(own))
