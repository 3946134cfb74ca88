"""Hyperparameter search by optuna (extra `tune`), or by any library whose trials have ``suggest_float``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sp_yolo.config import HYP_RULES, check_hyperparameter, load_config
from sp_yolo.errors import UserError
from sp_yolo.experiments.evolve import train_once

Space = Mapping[str, tuple[float, float] | tuple[float, float, str]]


def make_objective(space: Space, **options: Any) -> Callable[[Any], float]:
    """What ``study.optimize`` takes, for a study with ``direction="maximize"``: a trial -> the fitness of its run.

    ``space``: hyperparameter -> (low, high), or (low, high, "log") to search its logarithm. ``options``: fields of
    :class:`sp_yolo.config.Config`; ``overrides`` are the hyperparameters that stay. Each trial trains once, into
    ``project``/trial<number> (default runs/tune), and carries map50 and map50_95 as user attributes; a run that
    diverges has fitness 0::

        study = optuna.create_study(direction="maximize", storage="sqlite:///tune.db", study_name="mine",
                                    load_if_exists=True)
        study.optimize(make_objective({"lr0": (0.005, 0.2, "log")}, data="mine.yaml", epochs=30), n_trials=20)

    Raises:
        UserError: an unknown hyperparameter, bounds outside its rule, or options that a run cannot have.
    """
    for key, bounds in space.items():
        _check(key, bounds)
    fixed = dict(options.pop("overrides", {}))
    project = options.pop("project", "runs/tune")
    load_config(**options)

    def objective(trial: Any) -> float:
        drawn = {
            key: trial.suggest_float(key, low, high, log=bool(scale)) for key, (low, high, *scale) in space.items()
        }
        place = {"project": str(Path(project)), "name": f"trial{trial.number:03d}"}
        found = train_once(load_config(**options, **place, overrides={**fixed, **drawn}))
        for key in ("map50", "map50_95"):
            trial.set_user_attr(key, found[key])
        return found["fitness"]

    return objective


def _check(key: str, bounds: Any) -> None:
    if len(bounds) not in (2, 3) or bounds[2:] not in ((), ("log",)) or not bounds[0] < bounds[1]:
        raise UserError(f"space: {key}: expected (low, high) or (low, high, 'log'), not {bounds!r}")
    for value in bounds[:2]:
        check_hyperparameter(key, value, "space")
    if HYP_RULES[key].whole:
        raise UserError(f"space: {key}: only numbers that need not be whole are searched")
