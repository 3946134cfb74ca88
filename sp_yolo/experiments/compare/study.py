"""A study: variants of one training run, each with what it is tried with, and how often everything is repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sp_yolo.config import YamlDict, check_hyperparameter, find_file, load_config, read_yaml
from sp_yolo.engine.optimizer import find_optimizer
from sp_yolo.engine.plan import recipe_of
from sp_yolo.errors import UserError
from sp_yolo.experiments.classify import load_classify_config
from sp_yolo.experiments.compare.trials import TUNINGS, Space, Trial, drawn, grid, read_space

TASKS = ("classify", "detect")
TUNING_SEED = 1000  # first seed of the tuning runs: none of them is measured on the test split
SPREAD = (0.25, 1.0, 4.0)  # of a detector's: times the rate of its recipe
_KEYS = ("task", "options", "seeds", "tuning_seeds", "tuning", "trials", "space", "baseline", "set", "variants")
# Where things lie and how they are computed does not change the numbers.
_PLACES = ("root", "download", "device", "workers", "noplots", "nosave", "quiet")


@dataclass(frozen=True)
class Variant:
    """One row of the table: an optimizer with settings of its own.

    ``axes``: hyperparameter -> values of a grid; ``space``: what it is drawn from where it is not the study's.
    ``keywords``: arguments of the optimizer's class. ``trials``: what it is tried with, which :func:`make_study` fills
    in.
    """

    name: str
    optimizer: str
    axes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict)
    space: Space = field(default_factory=dict)
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """``how``: one of TUNINGS; "none": every optimizer as it comes. ``trials``: how many are drawn of ``space``."""

    how: str = "grid"
    trials: int = 0
    space: Space = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """``options``: fields of ClassifyConfig, or of train_sp.py's Config (``samples`` and
    ``val_samples`` too: a part of the images of train, of val and test).

    ``overrides``: hyperparameters of all variants. ``baseline``: name of the variant the others are compared with.
    """

    name: str
    task: str
    options: Mapping[str, Any]
    overrides: Mapping[str, Any]
    variants: tuple[Variant, ...]
    baseline: str
    seeds: int
    tuning_seeds: int
    tuning: Tuning = field(default_factory=Tuning)


@dataclass(frozen=True)
class Cell:
    """One run. ``trial``: the hyperparameters that were chosen or are tried; ``overrides`` hold them too.

    ``measure``: "val" for tuning, "test" for the figures of the table.
    """

    variant: str
    optimizer: str
    trial: Trial
    seed: int
    measure: str
    task: str
    options: Mapping[str, Any]
    overrides: Mapping[str, Any]
    keywords: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A file name: readable, and different for any difference in what is run."""
        content = dataclasses.asdict(self)
        content["options"] = {key: value for key, value in self.options.items() if key not in _PLACES}
        del content["variant"], content["trial"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
        word = re.sub(r"[^a-z0-9]+", "-", self.variant.lower()).strip("-")
        values = "".join(
            f"{key.replace('lr0', 'lr').replace('weight_decay', 'wd')}{value:g}_" for key, value in self.trial
        )
        return f"{word}_{values}seed{self.seed}_{self.measure}_{digest}"


def load_study(path: str) -> Study:
    """Read a study file: task, options, set, tuning, trials, space, seeds, tuning_seeds, baseline, variants.

    docs/compare.md says what each is.

    Raises:
        UserError: unknown keys or wrong values; names file and line.
    """
    source = read_yaml(find_file(path, "studies"))
    for key in source:
        if key not in _KEYS:
            raise UserError(f"{source.where(key)}: unknown key {key!r} (known: {', '.join(_KEYS)})")
    for key in ("options", "set", "variants"):
        if not isinstance(source.get(key, {}), dict):
            raise UserError(f"{source.where(key)}: {key} must be 'key: value' lines")
    task = source.get("task", "classify")
    if task not in TASKS:
        raise UserError(f"{source.where('task')}: task = {task!r}: must be classify or detect")
    try:
        return make_study(
            Path(path).stem,
            task=task,
            options=source.get("options", {}),
            overrides=source.get("set", {}),
            variants=[_variant(str(key), dict(own or {})) for key, own in source.get("variants", {}).items()],
            baseline=str(source.get("baseline", "")),
            seeds=source.get("seeds", 5),
            tuning_seeds=source.get("tuning_seeds", 2),
            tuning=_tuning(source),
        )
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None


def _tuning(source: YamlDict) -> Tuning:
    how, trials = source.get("tuning", "grid"), source.get("trials", 0)
    if how not in TUNINGS:
        raise UserError(f"tuning = {how!r}: must be {', '.join(TUNINGS)}")
    if not isinstance(trials, int) or isinstance(trials, bool) or not 0 <= trials <= 1000:
        raise UserError(f"trials = {trials!r}: must be a whole number from 0 to 1000")
    return Tuning(how, trials, read_space(source.get("space", {}), "study"))


def _variant(name: str, settings: dict[str, Any]) -> Variant:
    optimizer, where = str(settings.pop("optimizer", name)), f"variant {name!r}"
    keywords, space = settings.pop("opt", {}), read_space(settings.pop("space", {}), where)
    if not isinstance(keywords, dict):
        raise UserError(f"{where}: opt must be 'key: value' lines")
    axes, overrides = {}, {}
    for key, value in settings.items():
        if key != "lr0" and not isinstance(value, list):
            overrides[key] = value
            continue
        values = value if isinstance(value, list) else [value]
        if not values or not all(_is_number(each) and (each > 0 or key != "lr0") for each in values):
            raise UserError(f"{where}: {key} must be a list of numbers{' above 0' if key == 'lr0' else ''}")
        axes[key] = tuple(sorted(float(check_hyperparameter(key, each, where)) for each in values))
    return Variant(name, optimizer, axes, overrides, keywords, space)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def default_grid(
    task: str, optimizer: str, options: Mapping[str, Any], keywords: Mapping[str, Any]
) -> tuple[float, ...]:
    """The learning rates an optimizer is tried with unless the study says which.

    For a detector a quarter, once and four times the lr0 of the recipe that it trains with under these ``options``.

    Raises:
        UserError: no such optimizer; a wrong option, dataset or recipe.
    """
    if task == "classify":
        return find_optimizer(optimizer, keywords).grid
    recipe = recipe_of(load_config(**_of_config(options), optimizer=optimizer, opt=keywords))
    return tuple(float(f"{recipe.optimizer.lr0 * factor:.6g}") for factor in SPREAD)


def _of_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """A detection study's options without those that are not train_sp.py's."""
    return {key: value for key, value in options.items() if key not in ("samples", "val_samples")}


def make_study(
    name: str,
    *,
    task: str,
    options: Mapping[str, Any],
    variants: list[Variant],
    overrides: Mapping[str, Any] | None = None,
    baseline: str = "",
    seeds: int = 5,
    tuning_seeds: int = 2,
    tuning: Tuning | None = None,
) -> Study:
    """A checked :class:`Study`; ``baseline`` defaults to the variant called sgd, else the first.

    Raises:
        UserError: unequal tuning budgets, unknown names, a setting outside its rule.
    """
    for key, value in (("seeds", seeds), ("tuning_seeds", tuning_seeds)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < TUNING_SEED:
            raise UserError(f"{key} = {value!r}: must be a whole number from 1 to {TUNING_SEED - 1}")
    names = [variant.name for variant in variants]
    if not variants or len(set(names)) != len(names):
        raise UserError(f"variants must be one or more with different names, not {names}")
    reserved = ("optimizer", "opt", "seed", "overrides", "project", "name", "resume")
    if wrong := [key for key in reserved if key in options]:
        raise UserError(f"options: {wrong[0]!r} is not for a study to say")
    tuning = tuning or Tuning()
    tried = tuple(_with_trials(variant, tuning, task, options) for variant in variants)
    if len({len(variant.trials) for variant in tried}) > 1:
        sizes = ", ".join(f"{variant.name} {len(variant.trials)}" for variant in tried)
        what = "lr0" if all(set(variant.axes) <= {"lr0"} for variant in variants) else "trials"
        raise UserError(f"every variant needs as many {what} to try: {sizes}")
    baseline = baseline or ("sgd" if "sgd" in names else names[0])
    if baseline not in names:
        raise UserError(f"baseline = {baseline!r}: must be one of the variants {', '.join(names)}")
    study = Study(name, task, dict(options), dict(overrides or {}), tried, baseline, seeds, tuning_seeds, tuning)
    for variant in tried:
        _check_runnable(cell_of(study, variant, variant.trials[0], 0, "test"))
    return study


def _with_trials(variant: Variant, tuning: Tuning, task: str, options: Mapping[str, Any]) -> Variant:
    """``variant`` with what it is tried with.

    Raises:
        UserError: nothing to draw from; a list where points are drawn.
    """
    if tuning.how == "none":
        return dataclasses.replace(variant, trials=((),))
    if tuning.how == "grid":
        axes = dict(variant.axes)
        if "lr0" not in axes:
            axes["lr0"] = default_grid(task, variant.optimizer, options, variant.keywords)
        return dataclasses.replace(variant, trials=grid(axes))
    space = {**tuning.space, **variant.space}
    if not space or not tuning.trials:
        raise UserError(f"tuning: {tuning.how}: needs trials: N and space: {{lr0: [low, high, log]}}")
    for key, values in variant.axes.items():
        if key in space or len(values) > 1:
            raise UserError(f"variant {variant.name!r}: {key}: a list is for tuning: grid, this study draws")
    fixed = grid(variant.axes)[0]
    trials = tuple(fixed + trial for trial in drawn(space, tuning.trials, tuning.how))
    return dataclasses.replace(variant, space=space, trials=trials)


def _check_runnable(cell: Cell) -> None:
    if cell.task == "classify":
        own = {"optimizer": cell.optimizer, "opt": cell.keywords, "overrides": cell.overrides}
        load_classify_config(**cell.options, **own)
    else:
        if not find_optimizer(cell.optimizer, cell.keywords).hyp:
            raise UserError(f"optimizer {cell.optimizer}: is for classifiers")
        load_config(**_of_config(cell.options))
        for key, value in cell.overrides.items():
            if key != "root":
                check_hyperparameter(key, value, "set")


def cell_of(study: Study, variant: Variant, trial: Trial, seed: int, measure: str) -> Cell:
    overrides = {**study.overrides, **variant.overrides, **dict(trial)}
    own = (variant.name, variant.optimizer, trial, seed, measure, study.task, study.options, overrides)
    return Cell(*own, variant.keywords)


def tuning_cells(study: Study) -> list[Cell]:
    """Every trial of every variant, on the validation split, with seeds that the table does not use; none where there
    is but one to choose."""
    seeds = range(TUNING_SEED, TUNING_SEED + study.tuning_seeds)
    return [
        cell_of(study, variant, trial, seed, "val")
        for seed in seeds
        for variant in study.variants
        for trial in variant.trials
        if len(variant.trials) > 1
    ]


def final_cells(study: Study, chosen: Mapping[str, Trial]) -> list[Cell]:
    """Every seed of every variant with what was ``chosen`` for it, measured on the test split."""
    return [
        cell_of(study, variant, chosen[variant.name], seed, "test")
        for seed in range(study.seeds)
        for variant in study.variants
    ]
