"""How far a run has come: its position, its records per epoch, its best epoch, the running losses of this epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch

from sp_yolo.losses import LossParts
from sp_yolo.trackers import Record

PARTS = ("box", "obj", "cls", "total")


def fitness(record: Record) -> float:
    """What the best epoch is chosen by."""
    return float(0.1 * record["map50"] + 0.9 * record["map50_95"])


@dataclass
class Progress:
    """``iteration``: batches trained on so far, over the whole run. ``records``: one per finished epoch.

    ``best_epoch``: the last one with the best figures; ``gain_epoch``: the first, which patience counts from.
    """

    iteration: int = 0
    records: list[Record] = field(default_factory=list)
    best: float = -1.0
    best_epoch: int = -1
    gain_epoch: int = -1
    loss_sums: list[float] = field(default_factory=lambda: [0.0] * len(PARTS))
    loss_count: int = 0

    def __post_init__(self) -> None:
        if self.gain_epoch < 0:  # of a checkpoint that has not got it
            self.gain_epoch = self.best_epoch

    def state(self) -> Record:
        """Numbers and words only, for a checkpoint; ``Progress(**state)`` gives it back."""
        return asdict(self)

    def close_epoch(self, record: Record, validated: bool, *, another: bool = False) -> bool:
        """Append the record of a finished epoch; True when none was better. ``another``: those before were of another,
        larger model and do not count.

        With equal figures the later epoch counts: where all are 0, the first would be the least trained.
        """
        if another:
            self.best = -1.0
        self.records.append(record)
        self.loss_sums, self.loss_count = [0.0] * len(PARTS), 0
        improved = validated and fitness(record) >= self.best
        if improved:
            self.gain_epoch = record["epoch"] if fitness(record) > self.best else self.gain_epoch
            self.best, self.best_epoch = fitness(record), record["epoch"]
        return improved

    @property
    def epochs_without_gain(self) -> int:
        return len(self.records) - 1 - self.gain_epoch


class RunningLoss:
    """Sums of the loss parts of this epoch, kept on the device so that no iteration waits for them."""

    def __init__(self, device: torch.device, progress: Progress) -> None:
        self.sums = torch.tensor(progress.loss_sums, device=device)
        self.count = progress.loss_count

    def add(self, parts: LossParts) -> None:
        self.sums += torch.stack([getattr(parts, part).reshape(()) for part in PARTS])
        self.count += 1

    def mean(self) -> torch.Tensor:
        """[4] box, obj, cls, total."""
        return self.sums / max(self.count, 1)

    def store(self, progress: Progress) -> None:
        progress.loss_sums, progress.loss_count = self.sums.tolist(), self.count
