"""A Dask cluster of two processes, one of which is killed: the same results as without it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sp_yolo.errors import EnvironmentFault
from sp_yolo.experiments.compare import pools
from sp_yolo.experiments.compare.cells import run_cells
from sp_yolo.experiments.compare.pools import cluster_pool
from sp_yolo.experiments.compare.study import Study, tuning_cells

TIMED = ("seconds",)


def timeless(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key not in TIMED} for result in results]


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tiny_study: Study, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    cells, lines = tuning_cells(tiny_study), []
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            workers = list(client.run(os.getpid).values())
        assert len(workers) == 2

        def say(line: str) -> None:
            if not lines:  # after the first result, while others are under way
                os.kill(workers[0], signal.SIGKILL)
            lines.append(line)

        with cluster_pool(cluster.scheduler_address) as pool:
            there = run_cells(cells, tmp_path / "there", say, pool)
            assert run_cells(cells, tmp_path / "there", say, pool) == there  # nothing is run again
    assert len(lines) == len(cells) and lines[-1].startswith(f"[{len(cells)}/{len(cells)}] ")
    assert timeless(there) == timeless(run_cells(cells, tmp_path / "here", lines.append))


def test_workers_that_would_run_several_cells_in_one_process_are_refused() -> None:
    one, two = {"nthreads": 1, "resources": {}}, {"nthreads": 2, "resources": {}}
    gpu, gpus = {"nthreads": 4, "resources": {"GPU": 1}}, {"nthreads": 4, "resources": {"GPU": 2}}
    assert pools._resources({"a": one, "b": one}, "tcp://x") == {}
    assert pools._resources({"a": gpu, "b": two}, "tcp://x") == {"resources": {"GPU": 1}}
    for workers, words in (
        ({"a": one, "b": two}, "worker b would run 2 cells at once"),
        ({"a": gpus}, "worker a would run 2 cells at once"),
        ({}, "no workers"),
    ):
        with pytest.raises(EnvironmentFault, match=words):
            pools._resources(workers, "tcp://x")


def test_no_scheduler() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(EnvironmentFault, match="--scheduler nonsense://x: "), cluster_pool("nonsense://x"):
        pass
