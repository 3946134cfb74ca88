"""What a run computes, for one process and for several alike: run by test_distributed.py, under torchrun or without.

python world_run.py RESULT.pt FLAGS OF train_sp.py

BatchNorm uses (and keeps) its initial running statistics: in training each process would normalise by the images of its
own share, which is a different computation by design (docs/speed.md).
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sp_yolo.cli import options_of
from sp_yolo.engine import Trainer
from sp_yolo.engine.progress import RunningLoss
from sp_yolo.runtime.distributed import average


def frozen(module: torch.nn.BatchNorm2d, mode: bool = True) -> torch.nn.Module:
    return torch.nn.Module.train(module, False)


def main() -> None:
    torch.nn.BatchNorm2d.train = frozen  # type: ignore[method-assign]
    trainer = Trainer(*options_of("train", sys.argv[2:])[:1])
    losses: list[list[float]] = []
    add = RunningLoss.add
    exchanges = 0

    def note(running: RunningLoss, parts: Any) -> None:
        losses.append(average(torch.stack([part.detach().float() for part in parts]), trainer.world).tolist())
        add(running, parts)

    def reduce(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal exchanges
        exchanges += 1
        return allreduce_hook(torch.distributed.group.WORLD, bucket)

    RunningLoss.add = note  # type: ignore[method-assign]
    if trainer.world.size > 1:
        trainer.run.network.register_comm_hook(None, reduce)  # type: ignore[operator]
    trainer._validate(draw=False)  # of the initial weights, the same to the bit for any number of processes
    detections = trainer.run.val.evaluator.detections()
    trainer.fit()
    if trainer.world.main:
        content = {
            "losses": losses,
            "weights": trainer.run.model.state_dict(),
            "detections": detections,
            "records": trainer.run.state.progress.records,
            "exchanges": exchanges,
        }
        torch.save(content, sys.argv[1])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
