"""The protocol of what watches a run: what is told to whom, and when."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

Record = dict[str, Any]  # of one epoch, as metrics.jsonl has it


@dataclass(frozen=True)
class RunStart:
    """A run that begins, or goes on (``resumed``) from ``epoch`` of ``epochs``.

    ``identity``: a short word that stays the same over resumes and that no other run has. ``settings``: options and
    recipe, plain values. ``project``: what runs of one kind share; ``name``: of the run's ``folder``.
    """

    folder: Path
    project: str
    name: str
    identity: str
    settings: Mapping[str, Any]
    epoch: int
    epochs: int
    resumed: bool
    model: nn.Module
    optimizer: Optimizer


@dataclass(frozen=True)
class Step:
    """One iteration that is over. ``updated``: the weights changed, no gradients are being summed.

    ``losses`` [4]: box, obj, cls, total, means of this epoch so far, on the device: reading them waits for a GPU.
    """

    epoch: int
    iteration: int
    updated: bool
    losses: Tensor


class Callback:
    """Watches a run: a class of your own overrides what it wants to see. What it raises ends the run.

    Called in the main process, in the order of the list given to the trainer; a method that is not overridden costs
    nothing.
    """

    def on_start(self, run: RunStart) -> None:
        """Before the first iteration of this process."""

    def on_step(self, step: Step) -> None:
        """After each iteration."""

    def on_epoch(self, record: Record) -> None:
        """After each epoch, when it was validated and saved."""

    def on_files(self, paths: Sequence[Path]) -> None:
        """After pictures, the report or tables were written into the run's folder."""

    def on_end(self, summary: Record | None) -> None:
        """At the end, with what is in summary.json; None: the run was stopped or failed."""


class Callbacks(Callback):
    """Several as one. ``steps``: whether any looks at single iterations."""

    def __init__(self, members: Sequence[Callback]) -> None:
        self._members = list(members)
        self._steps = [each for each in members if type(each).on_step is not Callback.on_step]
        self.steps = bool(self._steps)

    def on_start(self, run: RunStart) -> None:
        for each in self._members:
            each.on_start(run)

    def on_step(self, step: Step) -> None:
        for each in self._steps:
            each.on_step(step)

    def on_epoch(self, record: Record) -> None:
        for each in self._members:
            each.on_epoch(record)

    def on_files(self, paths: Sequence[Path]) -> None:
        for each in self._members:
            each.on_files(paths)

    def on_end(self, summary: Record | None) -> None:
        """Tell all of them, whatever one raises."""
        with contextlib.ExitStack() as ends:
            for each in reversed(self._members):
                ends.callback(each.on_end, summary)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch under the original's tags, then ours; what was not measured is left out."""
    tags = {f"train/{part}_loss": record[part] for part in ("box", "obj", "cls")}
    tags |= {f"val/{part}_loss": record[f"val_{part}"] for part in ("box", "obj", "cls")}
    tags |= {"metrics/precision": record["precision"], "metrics/recall": record["recall"]}
    tags |= {"metrics/mAP_0.5": record["map50"], "metrics/mAP_0.5:0.95": record["map50_95"]}
    tags |= {f"x/lr_{name}": value for name, value in record["lr"].items()}
    tags |= {f"x/sparsity_{name}": value for name, value in record["sparsity"].items()}
    tags["x/images_per_second"] = record["images_per_second"]
    return {tag: float(value) for tag, value in tags.items() if not math.isnan(value)}


def is_picture(path: Path) -> bool:
    return path.suffix in (".jpg", ".png")


def new_identity() -> str:
    return secrets.token_hex(4)
