"""Learning rate, momentum and accumulation as pure functions of the iteration: resuming needs nothing but its number.

Source: the original's behaviour (docs/provenance.md); the two departures from it (docs/differences.md) are the bounded
warm-up and the schedule that neither lags an epoch nor stops short of its final value. ``compat`` brings both back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sp_yolo.config import Recipe

NOMINAL_BATCH = 64
# Below this many optimizer steps in the whole run, steps are worth more than large batches (docs/differences.md).
FEW_UPDATES = 3000
# Fewer than so many, and the wild first ones would still be seen in an average of BatchNorm's statistics.
VERY_FEW_UPDATES = 300
BIAS_GROUP = "bias"


@dataclass(frozen=True)
class StepPlan:
    """What one iteration does: ``lr`` per group name, ``update`` says whether the optimizer steps after it."""

    lr: Mapping[str, float]
    momentum: float
    accumulate: int
    update: bool


@dataclass(frozen=True)
class Schedule:
    """The course of one run.

    ``batch_size``: images per iteration over all processes. ``initial_lr``: lr of each group before any factor.
    ``warmup``: length of the warm-up in iterations.
    """

    epochs: int
    batches_per_epoch: int
    batch_size: int
    nominal_batch: int
    warmup: int
    lrf: float
    momentum: float
    warmup_momentum: float
    warmup_bias_lr: float
    linear: bool = False
    compat: bool = False

    @property
    def iterations(self) -> int:
        return self.epochs * self.batches_per_epoch

    def factor(self, epoch: float) -> float:
        """Factor on the initial lr at ``epoch`` (may be a fraction): 1 at 0, ``lrf`` at the end."""
        if self.linear:
            return (1 - epoch / max(self.epochs - 1, 1)) * (1 - self.lrf) + self.lrf
        return (1 - math.cos(math.pi * epoch / self.epochs)) / 2 * (self.lrf - 1) + 1

    def _factor_at(self, iteration: int) -> float:
        epoch = iteration // self.batches_per_epoch
        if not self.compat:
            run = iteration / max(self.iterations - 1, 1)
            return self.factor(run * (max(self.epochs - 1, 1) if self.linear else self.epochs))
        warmup_epoch = self.warmup // self.batches_per_epoch
        # The original's scheduler reaches the optimizer one epoch late; its warm-up reads the current epoch's value.
        return self.factor(epoch if iteration <= self.warmup or epoch == warmup_epoch else epoch - 1)

    def _ramp(self, iteration: int, start: float, end: float) -> float:
        if iteration >= self.warmup:
            return end
        return start + (end - start) * iteration / self.warmup

    def accumulate(self, iteration: int) -> int:
        """Batches whose gradients are summed before a step, at ``iteration``."""
        wanted = self._ramp(iteration, 1.0, self.nominal_batch / self.batch_size)
        return max(1, round(wanted))

    def at(self, iteration: int, initial_lr: Mapping[str, float]) -> StepPlan:
        """The plan of one iteration (0-based over the whole run) for groups with these initial learning rates."""
        factor = self._factor_at(iteration)
        lr = {
            name: self._ramp(iteration, self.warmup_bias_lr if name == BIAS_GROUP else 0.0, base * factor)
            for name, base in initial_lr.items()
        }
        accumulate = self.accumulate(iteration)
        momentum = self._ramp(iteration, self.warmup_momentum, self.momentum)
        return StepPlan(lr, momentum, accumulate, self._updates(iteration, accumulate))

    def _updates(self, iteration: int, accumulate: int) -> bool:
        if self.compat:
            return iteration % accumulate == 0
        batch = iteration % self.batches_per_epoch
        # The rest of an epoch is stepped on, not thrown away.
        return (batch + 1) % accumulate == 0 or batch + 1 == self.batches_per_epoch

    def updates(self, iterations: range | None = None) -> int:
        """Optimizer steps of some ``iterations``, or of the whole run."""
        return sum(self._updates(step, self.accumulate(step)) for step in iterations or range(self.iterations))


@dataclass(frozen=True)
class RunLength:
    """Settings that depend on how long the run is, and the words that say how they were chosen."""

    nominal_batch: int
    warmup: int
    weight_decay: float
    ema_decay: float
    ema_ramp: float
    average_buffers: bool
    words: str


def fit_to_run(recipe: Recipe, *, epochs: int, batches_per_epoch: int, batch_size: int, compat: bool) -> RunLength:
    """Resolve ``auto`` hyperparameters from the size of the run; ``compat`` gives the original's values.

    The nominal batch falls from 64 to the batch itself where the run would see fewer than 3000 steps; the warm-up floor
    of 1000 iterations holds only up to a tenth of the run and the warm-up never exceeds a fifth; the EMA's memory is at
    most a quarter of the run, and in one of fewer than 300 steps BatchNorm's statistics, averages already, are not
    averaged again. Measured in docs/results.md.
    """
    rates = recipe.schedule
    iterations = epochs * batches_per_epoch
    if isinstance(rates.nominal_batch, str):
        few = iterations * batch_size / NOMINAL_BATCH < FEW_UPDATES
        nominal = batch_size if few and not compat else NOMINAL_BATCH
    else:
        nominal = rates.nominal_batch
    accumulate = max(round(nominal / batch_size), 1)
    asked = 3.0 if isinstance(rates.warmup_epochs, str) else rates.warmup_epochs
    warmup = round(asked * batches_per_epoch)
    if compat:
        warmup = max(warmup, 1000)
    elif warmup:
        warmup = max(1, min(max(warmup, min(1000, iterations // 10)), iterations // 5))
    updates = max(iterations / accumulate, 1)
    decay, ramp = rates.ema_decay, rates.ema_ramp
    if isinstance(decay, str):
        decay = 0.9999 if compat else min(0.9999, max(0.0, 1 - 4 / updates))
    if isinstance(ramp, str):
        ramp = 2000.0 if compat else min(2000.0, max(1.0, updates / 6.5))
    batches = f"{accumulate} batches" if accumulate > 1 else "1 batch"
    return RunLength(
        nominal_batch=nominal,
        warmup=warmup,
        weight_decay=recipe.optimizer.weight_decay * batch_size * accumulate / nominal,
        ema_decay=decay,
        ema_ramp=ramp,
        average_buffers=compat or updates >= VERY_FEW_UPDATES,
        words=f"run of {iterations} iterations: warm-up {warmup}, optimizer step every {batches} "
        f"(nominal batch {nominal}), EMA decay {decay:.5g}, ramp {ramp:.0f} steps",
    )


def make_schedule(
    recipe: Recipe,
    length: RunLength,
    *,
    epochs: int,
    batches_per_epoch: int,
    batch_size: int,
    linear: bool,
    compat: bool,
) -> Schedule:
    """The schedule of a recipe on a run of this length."""
    return Schedule(
        epochs=epochs,
        batches_per_epoch=batches_per_epoch,
        batch_size=batch_size,
        nominal_batch=length.nominal_batch,
        warmup=length.warmup,
        lrf=recipe.schedule.lrf,
        momentum=recipe.optimizer.momentum,
        warmup_momentum=recipe.schedule.warmup_momentum,
        warmup_bias_lr=recipe.schedule.warmup_bias_lr,
        linear=linear,
        compat=compat,
    )
