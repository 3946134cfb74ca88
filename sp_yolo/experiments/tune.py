"""Hyperparameter search by optuna (extra `tune`), or by any library whose trials have ``suggest_float``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sp_yolo.config import HYP_RULES, Config, check_hyperparameter, load_config, read_yaml
from sp_yolo.engine.plan import recipe_of
from sp_yolo.engine.progress import fitness
from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.experiments.evolve import train_once
from sp_yolo.runtime.folder import RunDir
from sp_yolo.trackers import Record

Space = Mapping[str, tuple[float, float] | tuple[float, float, str]]
STUDY = "sp-yolo"  # name of the study in a storage
# The first trials are never pruned, nor is the first third of any: there is nothing to judge by.
STARTUP, WARMUP = 5, 1 / 3


def make_objective(space: Space, *, prune: bool = False, **options: Any) -> Callable[[Any], float]:
    """What ``study.optimize`` takes, for a study with ``direction="maximize"``: a trial -> the fitness of its run.

    ``space``: hyperparameter -> (low, high), or (low, high, "log") to search its logarithm. ``options``: fields of
    :class:`sp_yolo.config.Config`; ``overrides`` are the hyperparameters that stay. Each trial trains once, into
    ``project``/trial<number> (default runs/tune), and carries map50 and map50_95 as user attributes; a run that
    diverges has fitness 0. ``prune``: every epoch is validated, and a trial ends where the study's pruner says so::

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
        place = {"project": str(Path(project)), "name": trial_name(trial.number)}
        config = load_config(**options, **place, overrides={**fixed, **drawn})
        found = train_once(config, _report(trial)) if prune else train_once(config)
        for key in ("map50", "map50_95"):
            trial.set_user_attr(key, found[key])
        return found["fitness"]

    return objective


def trial_name(number: int) -> str:
    return f"trial{number:03d}"


def _report(trial: Any) -> Callable[[Record], None]:
    def look(record: Record) -> None:
        trial.report(fitness(record), record["epoch"])
        if trial.should_prune():
            from optuna import TrialPruned

            raise TrialPruned

    return look


def _check(key: str, bounds: Any) -> None:
    if len(bounds) not in (2, 3) or bounds[2:] not in ((), ("log",)) or not bounds[0] < bounds[1]:
        raise UserError(f"space: {key}: expected (low, high) or (low, high, 'log'), not {bounds!r}")
    for value in bounds[:2]:
        check_hyperparameter(key, value, "space")
    if HYP_RULES[key].whole:
        raise UserError(f"space: {key}: only numbers that need not be whole are searched")


# ------------------------------------------------------------------------------------------------------------- command
def parse_space(items: Sequence[str]) -> dict[str, Any]:
    """``["lr0=0.001,0.1,log", ...]`` of the command line as a space.

    Raises:
        UserError: an item is not of the form KEY=LOW,HIGH or KEY=LOW,HIGH,log.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, _, text = item.partition("=")
        parts = text.split(",")
        try:
            low, high = map(float, parts[:2])
        except ValueError:
            raise UserError(f"--space {item}: expected KEY=LOW,HIGH or KEY=LOW,HIGH,log") from None
        found[key] = (low, high, *parts[2:])
        _check(key, found[key])
    return found


def default_space(config: Config) -> dict[str, Any]:
    """lr0 and weight_decay, a decade to each side of the recipe's."""
    recipe = recipe_of(config).optimizer
    near = {key: getattr(recipe, key) for key in ("lr0", "weight_decay")}
    return {key: (value / 10, min(10 * value, HYP_RULES[key].high), "log") for key, value in near.items() if value > 0}


def search(config: Config, space: Space, *, trials: int, minutes: float, storage: str, prune: bool) -> Path:
    """Run trials until the study has ``trials`` of them or ``minutes`` (0: no limit) are over; hyp_tuned.yaml.

    Several processes with one ``storage`` share the trials, on one machine or on several that see the file: the journal
    in the folder of the runs, or a database such as sqlite:///tune.db.

    Raises:
        UserError: a wrong space, an unusable storage, no trial that reached its end. EnvironmentFault: no optuna.
    """
    try:
        import optuna
    except ImportError:
        raise EnvironmentFault("tune needs optuna: pip install 'sp-yolo[tune]'") from None
    if config.resume:
        raise UserError("tune goes on by itself when called again; drop --resume")
    project = "runs/tune" if config.project == Config().project else config.project
    folder = Path(project) / config.name
    options = {key: value for key, value in config.as_dict().items() if key not in ("project", "name", "exist_ok")}
    objective = make_objective(space, prune=prune, project=str(folder), **{**options, "noplots": True})
    folder.mkdir(parents=True, exist_ok=True)
    study = _open_study(optuna, storage, folder, max(1, round(WARMUP * (config.epochs or 1))))
    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    if sum(trial.state in done for trial in study.trials) < trials:
        enough = optuna.study.MaxTrialsCallback(trials, states=done)
        study.optimize(
            objective, timeout=60 * minutes or None, callbacks=[enough, lambda _, trial: _tidy(folder, trial.number)]
        )
    return _write_best(optuna, study, folder)


def _open_study(optuna: Any, storage: str, folder: Path, warmup: int) -> Any:
    try:
        if storage:
            place: Any = storage
        else:
            backend = optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
            place = optuna.storages.JournalStorage(backend)
        return optuna.create_study(
            direction="maximize",
            storage=place,
            study_name=STUDY,
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(constant_liar=True),  # others are under way
            pruner=optuna.pruners.MedianPruner(STARTUP, warmup),
        )
    except Exception as error:  # whatever a storage raises
        raise UserError(f"--storage {storage or folder}: {str(error).strip().splitlines()[0]}") from None


def _tidy(folder: Path, number: int) -> None:
    """Weights are tens of MB for each run; its recipe and figures stay."""
    shutil.rmtree(folder / trial_name(number) / "weights", ignore_errors=True)


def _write_best(optuna: Any, study: Any, folder: Path) -> Path:
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if not complete:
        raise UserError(f"{folder}: no trial has reached its end yet; give more --minutes or --trials")
    best = max(complete, key=lambda trial: (trial.value, -trial.number))
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    hyp = dict(read_yaml(folder / trial_name(best.number) / "hyp.yaml"))
    head = (
        f"# Trial {best.number} of {len(complete)} and {pruned} that were given up: fitness {best.value:.4f}, "
        f"mAP@.5 {best.user_attrs['map50']:.4f}, mAP@.5:.95 {best.user_attrs['map50_95']:.4f}, "
        "measured on the split that it was chosen by.\n"
    )
    RunDir(folder).write("hyp_tuned.yaml", head + yaml.safe_dump(hyp, sort_keys=False))
    path = folder / "hyp_tuned.yaml"
    drawn = ", ".join(f"{key} {value:.4g}" for key, value in best.params.items())
    print(f"best of {len(complete)} trials, {pruned} given up: {best.number}, fitness {best.value:.4f}, {drawn}")
    print(f"use --hyp {path}")
    return path
