"""A study: variants of one training run, each with its grid of learning rates, and how often everything is repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sp_yolo.config import check_hyperparameter, find_file, load_config, read_yaml
from sp_yolo.engine.optimizer import find_optimizer
from sp_yolo.engine.plan import recipe_of
from sp_yolo.errors import UserError
from sp_yolo.experiments.classify import load_classify_config

TASKS = ("classify", "detect")
TUNING_SEED = 1000  # first seed of the tuning runs: none of them is measured on the test split
SPREAD = (0.25, 1.0, 4.0)  # of a detector's: times the rate of its recipe
_KEYS = ("task", "options", "seeds", "tuning_seeds", "baseline", "set", "variants")
# Where things lie does not change the numbers.
_PLACES = ("root", "download", "device", "workers")


@dataclass(frozen=True)
class Variant:
    """One row of the table: an optimizer with settings of its own, tuned over ``grid`` (of lr0).

    ``own_grid`` False: the grid is the default one, which :func:`make_study` fills in for the study's options.
    """

    name: str
    optimizer: str
    grid: tuple[float, ...]
    overrides: Mapping[str, Any]
    own_grid: bool = True


@dataclass(frozen=True)
class Study:
    """``options``: fields of ClassifyConfig, or of train_sp.py's Config (``samples`` too: a subset of the images).

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


@dataclass(frozen=True)
class Cell:
    """One run. ``measure``: "val" for tuning, "test" for the figures of the table."""

    variant: str
    optimizer: str
    lr0: float
    seed: int
    measure: str
    task: str
    options: Mapping[str, Any]
    overrides: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A file name: readable, and different for any difference in what is run."""
        content = dataclasses.asdict(self)
        content["options"] = {key: value for key, value in self.options.items() if key not in _PLACES}
        del content["variant"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
        word = re.sub(r"[^a-z0-9]+", "-", self.variant.lower()).strip("-")
        return f"{word}_lr{self.lr0:g}_seed{self.seed}_{self.measure}_{digest}"


def load_study(path: str) -> Study:
    """Read a study file: task, options, seeds, tuning_seeds, baseline, set and variants (docs/compare.md).

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
    task, variants = source.get("task", "classify"), []
    if task not in TASKS:
        raise UserError(f"{source.where('task')}: task = {task!r}: must be classify or detect")
    try:
        for name, settings in source.get("variants", {}).items():
            variants.append(_variant(str(name), dict(settings or {})))
        return make_study(
            Path(path).stem,
            task=task,
            options=source.get("options", {}),
            overrides=source.get("set", {}),
            variants=variants,
            baseline=str(source.get("baseline", "")),
            seeds=source.get("seeds", 5),
            tuning_seeds=source.get("tuning_seeds", 2),
        )
    except UserError as error:
        raise UserError(f"{source.path}: {error}") from None


def _variant(name: str, settings: dict[str, Any]) -> Variant:
    optimizer = str(settings.pop("optimizer", name))
    grid = settings.pop("lr0", None)
    if grid is None:
        return Variant(name, optimizer, (), settings, own_grid=False)
    grid = grid if isinstance(grid, list) else [grid]
    if not grid or not all(isinstance(lr, int | float) and not isinstance(lr, bool) and lr > 0 for lr in grid):
        raise UserError(f"variant {name!r}: lr0 must be a list of numbers above 0")
    return Variant(name, optimizer, tuple(sorted(map(float, grid))), settings)


def default_grid(task: str, optimizer: str, options: Mapping[str, Any]) -> tuple[float, ...]:
    """The learning rates an optimizer is tried with unless the study says which.

    For a detector a quarter, once and four times the lr0 of the recipe that it trains with under these ``options``.

    Raises:
        UserError: no such optimizer; a wrong option, dataset or recipe.
    """
    if task == "classify":
        return find_optimizer(optimizer).grid
    lr0 = recipe_of(load_config(**_of_config(options), optimizer=optimizer)).optimizer.lr0
    return tuple(float(f"{lr0 * factor:.6g}") for factor in SPREAD)


def _of_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """A detection study's options without the one that is not train_sp.py's."""
    return {key: value for key, value in options.items() if key != "samples"}


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
    reserved = [key for key in ("optimizer", "seed", "overrides", "project", "name", "resume") if key in options]
    if reserved:
        raise UserError(f"options: {reserved[0]!r} is not for a study to say")
    variants = [
        variant
        if variant.own_grid
        else dataclasses.replace(variant, grid=default_grid(task, variant.optimizer, options))
        for variant in variants
    ]
    if len({len(variant.grid) for variant in variants}) > 1:
        sizes = ", ".join(f"{variant.name} {len(variant.grid)}" for variant in variants)
        raise UserError(f"every variant needs as many lr0 to try: {sizes}")
    baseline = baseline or ("sgd" if "sgd" in names else names[0])
    if baseline not in names:
        raise UserError(f"baseline = {baseline!r}: must be one of the variants {', '.join(names)}")
    study = Study(name, task, dict(options), dict(overrides or {}), tuple(variants), baseline, seeds, tuning_seeds)
    for variant in variants:
        _check_runnable(cell_of(study, variant, variant.grid[0], 0, "test"))
    return study


def _check_runnable(cell: Cell) -> None:
    if cell.task == "classify":
        load_classify_config(**cell.options, optimizer=cell.optimizer, overrides=cell.overrides)
    else:
        if not find_optimizer(cell.optimizer).hyp:
            raise UserError(f"optimizer {cell.optimizer}: is for classifiers")
        load_config(**_of_config(cell.options))
        for key, value in cell.overrides.items():
            if key != "root":
                check_hyperparameter(key, value, "set")


def cell_of(study: Study, variant: Variant, lr0: float, seed: int, measure: str) -> Cell:
    overrides = {**study.overrides, **variant.overrides, "lr0": lr0}
    return Cell(variant.name, variant.optimizer, lr0, seed, measure, study.task, study.options, overrides)


def tuning_cells(study: Study) -> list[Cell]:
    """Every learning rate of every variant, on the validation split, with seeds that the table does not use; none
    where there is but one to choose."""
    seeds = range(TUNING_SEED, TUNING_SEED + study.tuning_seeds)
    return [
        cell_of(study, variant, lr0, seed, "val")
        for seed in seeds
        for variant in study.variants
        for lr0 in variant.grid
        if len(variant.grid) > 1
    ]


def final_cells(study: Study, chosen: Mapping[str, float]) -> list[Cell]:
    """Every seed of every variant at the learning rate ``chosen`` for it, measured on the test split."""
    return [
        cell_of(study, variant, chosen[variant.name], seed, "test")
        for seed in range(study.seeds)
        for variant in study.variants
    ]


def quick(study: Study) -> Study:
    """The same study in miniature: 3 seeds, up to 3 learning rates, one tuning seed, few images and epochs."""
    least = {"classify": {"epochs": 3, "samples": 300}, "detect": {"epochs": 2, "samples": 24}}
    options = dict(study.options)
    for key, value in least[study.task].items():
        options[key] = min(options.get(key) or value, value)
    if study.task == "detect":
        options["img_size"] = 96
    variants = [dataclasses.replace(variant, grid=_thinned(variant.grid)) for variant in study.variants]
    return dataclasses.replace(
        study,
        name=f"{study.name}-quick",
        options=options,
        variants=tuple(variants),
        seeds=min(study.seeds, 3),
        tuning_seeds=1,
    )


def _thinned(grid: tuple[float, ...]) -> tuple[float, ...]:
    """Three of a longer grid, evenly spaced, its inner part rather than its ends."""
    if len(grid) <= 3:
        return grid
    step = (len(grid) - 1) // 2
    first = (len(grid) - 1 - 2 * step) // 2
    return grid[first : first + 2 * step + 1 : step]
