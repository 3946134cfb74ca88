"""Two thousand steps, validations and checkpoints included: what a process holds must not grow."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.launcher import Runs

EARLY, LATE = 200, 2000  # iterations
MOST_GROWTH = 12 * 2**20  # bytes of resident memory: the allocator's own wandering, as measured, is below a third of it


def held(pid: int) -> dict[str, int]:
    """What the kernel says a process holds."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    memory = int(status["VmRSS"].split()[0]) * 1024
    return {"memory": memory, "threads": int(status["Threads"]), "handles": len(os.listdir(f"/proc/{pid}/fd"))}


def take_stock() -> None:
    """Write what this process and its data workers hold at ``EARLY`` and ``LATE`` to stock_<iteration>.json."""
    from sp_yolo.engine.step import TrainStep

    call = TrainStep.__call__

    def watched(step: TrainStep, batch: Any) -> bool:
        updated = call(step, batch)
        if step.state.progress.iteration in (EARLY, LATE):
            gc.collect()
            pid = os.getpid()
            train_worker, val_worker = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            stock = {"main": held(pid) | {"objects": len(gc.get_objects())}}
            stock |= {"train worker": held(int(train_worker)), "val worker": held(int(val_worker))}
            Path(f"stock_{step.state.progress.iteration}.json").write_text(json.dumps(stock))
        return updated

    TrainStep.__call__ = watched  # type: ignore[method-assign]


@pytest.mark.slow
def test_two_thousand_steps_hold_no_more_than_two_hundred(runs: Runs) -> None:
    flags = ("--batch", "2", "--epochs", "201", "--workers", "1", "--save-every", "0.02", "--multi-scale")
    training = runs.start(*runs.flags(*flags), fault=(take_stock, ()))
    training.process.join(1500)
    assert training.wait() == 0, training.output
    early, late = (json.loads((runs.folder / f"stock_{number}.json").read_text()) for number in (EARLY, LATE))
    print(f"\nafter {EARLY}: {early}\nafter {LATE}: {late}")
    for process in early:
        for kind in ("threads", "handles"):
            assert late[process][kind] <= early[process][kind], (process, kind)
        assert late[process]["memory"] - early[process]["memory"] < MOST_GROWTH, process
    # each epoch leaves its record, and nothing else
    records = (LATE - EARLY) // 10
    assert late["main"]["objects"] - early["main"]["objects"] < 20 * records
