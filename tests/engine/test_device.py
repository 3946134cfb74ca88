"""How a run uses its machine: memory that stays with the process, loader processes beside the training threads."""

import sys

import pytest
import torch
from support.launcher import python

from sp_yolo.engine import splits
from sp_yolo.errors import UserError
from sp_yolo.runtime.distributed import World, join_world

# Page faults of taking and freeing 40 MB twenty times; the first five do not count.
FAULTS = """
import resource, sys, torch
from sp_yolo.runtime.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(25):
    if turn == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, given_back = int(python(FAULTS, "keep")), int(python(FAULTS, "give back"))
    assert given_back > 20 * 40_000_000 // 2**21  # at least one for each huge page of each turn
    assert 4 * kept < given_back  # a block may have to be taken once more, where a small one came to lie in it


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("cores", "threads", "in_memory", "processes"),
    [(2, 2, True, 0), (2, 2, False, 1), (2, 1, True, 1), (4, 4, True, 1)],
)
def test_loader_processes_beside_training_threads(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, in_memory: bool, processes: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert splits.loader_processes(8, 16, CPU, World(), in_memory) == processes
    assert splits.loader_processes(0, 16, CPU, World(), in_memory) == 0


def test_loader_processes_of_gpus_share_the_cores_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    world = World(rank=9, local_rank=1, size=64, local_size=8)
    assert splits.loader_processes(8, 16, GPU, world, True) == 4
    assert splits.loader_processes(8, 2, GPU, world, True) == 2
    assert splits.loader_processes(8, 16, GPU, World(), False) == 8
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert splits.loader_processes(8, 16, GPU, world, False) == 1


def test_a_launcher_that_counts_in_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(UserError, match=r"LOCAL_WORLD_SIZE.*'two'"):
        join_world()
