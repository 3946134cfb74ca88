"""Which hyperparameters a variant is tried with: a grid, or points drawn from a space; equally many for all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sp_yolo.config import check_hyperparameter
from sp_yolo.errors import UserError

TUNINGS = ("grid", "sobol", "random", "none")
STREAM = 0  # seed of the points: every study and every variant has the same ones in the unit cube
# Hyperparameters with their values, lr0 first.
Trial = tuple[tuple[str, float], ...]
# Hyperparameter -> (low, high, whether its logarithm is uniform).
Space = Mapping[str, tuple[float, float, bool]]


def read_space(values: Any, where: str) -> dict[str, tuple[float, float, bool]]:
    """``{lr0: [low, high, log], momentum: [low, high]}`` of a study file.

    Raises:
        UserError: another form, or bounds that the hyperparameter cannot have.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: space must be 'key: [low, high, log]' lines")
    found = {}
    for key, bounds in values.items():
        scale = bounds[2:] if isinstance(bounds, list) else None
        numbers = bounds[:2] if isinstance(bounds, list) else []
        good = len(numbers) == 2 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
        if not good or scale not in ([], ["log"]) or not numbers[0] < numbers[1] or (scale and numbers[0] <= 0):
            raise UserError(f"{where}: space: {key}: expected [low, high] or [low, high, log], not {bounds!r}")
        for number in numbers:
            check_hyperparameter(key, number, f"{where}: space")
        found[str(key)] = (float(numbers[0]), float(numbers[1]), bool(scale))
    return found


def space_text(space: Space) -> str:
    """Such as "lr0 0.0005 to 0.05 (log), momentum 0.8 to 0.95"."""
    return ", ".join(f"{key} {low:g} to {high:g}{' (log)' * log}" for key, (low, high, log) in space.items())


def grid(axes: Mapping[str, Sequence[float]]) -> tuple[Trial, ...]:
    """Every combination of the values of ``axes``."""
    keys = _ordered(axes)
    return tuple(tuple(zip(keys, values, strict=True)) for values in itertools.product(*(axes[key] for key in keys)))


def drawn(space: Space, count: int, how: str) -> tuple[Trial, ...]:
    """``count`` points of ``space`` to three digits: a scrambled Sobol sequence, or uniform at random ("random").

    The points in the unit cube are the same whatever the bounds: no variant has the luckier draw.
    """
    keys = _ordered(space)
    if how == "sobol":
        unit = torch.quasirandom.SobolEngine(len(keys), scramble=True, seed=STREAM).draw(count, dtype=torch.float64)
        points = unit.tolist()
    else:
        points = np.random.default_rng(STREAM).random((count, len(keys))).tolist()
    trials = [tuple((key, _at(space[key], place)) for key, place in zip(keys, point, strict=True)) for point in points]
    return tuple(sorted(trials))


def _at(bounds: tuple[float, float, bool], place: float) -> float:
    low, high, log = bounds
    value = math.exp(math.log(low) + place * math.log(high / low)) if log else low + place * (high - low)
    return float(f"{value:.3g}")


def _ordered(keys: Mapping[str, Any]) -> list[str]:
    return sorted(keys, key=lambda key: (key != "lr0", list(keys).index(key)))


def trial_text(trial: Trial) -> str:
    """Such as "lr0 0.002, weight_decay 0.05"."""
    return ", ".join(f"{key} {value:g}" for key, value in trial)


def thinned(trials: tuple[Trial, ...], most: int) -> tuple[Trial, ...]:
    """``most`` of a longer list, evenly spaced, its inner part rather than its ends."""
    if len(trials) <= most or most < 2:
        return trials[len(trials) // 2 :][:most] if len(trials) > most else trials
    step = (len(trials) - 1) // (most - 1)
    first = (len(trials) - 1 - (most - 1) * step) // 2
    return trials[first : first + (most - 1) * step + 1 : step]
