"""Hyperparameters: the typed recipe, recipe files, and the ``--set`` that overrides them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sp_yolo.config.files import find_file, read_scalar, read_yaml
from sp_yolo.config.options import Rule, did_you_mean
from sp_yolo.errors import UserError
from sp_yolo.optim import DEFAULTS
from sp_yolo.optim.settings import BOUNDS

T = TypeVar("T", bound="Part")
AUTO = "auto"


def hyper(
    default: Any, low: float = 0.0, high: float = 1.0, *, words: tuple[str, ...] = (), whole: bool = False
) -> Any:
    """A dataclass field that is a hyperparameter, with what it may be."""
    return field(default=default, metadata={"rule": Rule(low, high, words, whole)})


def of_sp(setting: str) -> Any:
    """A hyperparameter that is a setting of SP: default and bounds are the class's."""
    default, bound = DEFAULTS[setting], BOUNDS[setting]
    whole = isinstance(default, int) and not isinstance(default, bool)
    return field(default=default, metadata={"rule": Rule(bound.low, bound.high, bound.words, whole, bound.open)})


class Part:
    """A part of a recipe: its fields are the original's keys, then ours."""

    @classmethod
    def of(cls: type[T], values: Mapping[str, Any]) -> T:
        """The part's own keys of a flat recipe such as the original's hyp files; what is absent has its default."""
        names = {entry.name for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{key: value for key, value in values.items() if key in names})


@dataclass(frozen=True)
class ScheduleRecipe(Part):
    """How the rates run, and how the weights are averaged. "auto": from the length of the run (engine.schedule)."""

    lrf: float = hyper(0.1)
    warmup_epochs: float | str = hyper(3.0, 0, 1e4, words=(AUTO,))
    warmup_momentum: float = hyper(0.8, 0, 0.9999)
    warmup_bias_lr: float = hyper(0.1, 0, 100)
    nominal_batch: int | str = hyper(AUTO, 1, 65536, words=(AUTO,), whole=True)
    ema_decay: float | str = hyper(AUTO, words=(AUTO,))
    ema_ramp: float | str = hyper(AUTO, 1, 1e6, words=(AUTO,))


@dataclass(frozen=True)
class SPRecipe(Part):
    """Settings of SP: docs/the-method.md. ``sp_channels``: share of a detector's FLOPs that goes, as whole channels."""

    sp_mode: str = of_sp("mode")
    sp_metric: str = of_sp("metric")
    sp_saliency: str = of_sp("saliency")
    sp_sigma_backbone: float = of_sp("sigma")
    sp_sigma_head: float = of_sp("sigma")
    sp_channels: float = hyper(0.0, 0, 0.95)
    sp_every: int = of_sp("every")
    sp_start: float = of_sp("start")
    sp_end: float = of_sp("end")
    sp_rho: float = of_sp("rho")
    sp_rcap: float = of_sp("rcap")


@dataclass(frozen=True)
class OptimizerRecipe(SPRecipe):
    """Rates of every optimizer, and SP's own settings."""

    lr0: float = hyper(0.01, 0, 100)
    momentum: float = hyper(0.937, 0, 0.9999)
    weight_decay: float = hyper(0.0005)
    clip_norm: float = hyper(0.0, 0, 1e9)


@dataclass(frozen=True)
class LossRecipe(Part):
    """Gains and targets of the loss. ``anchors``: per level, 0 keeps the model's. ``iou_t`` has no effect."""

    box: float = hyper(0.05, 0, 1e3)
    cls: float = hyper(0.5, 0, 1e3)
    cls_pw: float = hyper(1.0, 0, 1e3)
    obj: float = hyper(1.0, 0, 1e3)
    obj_pw: float = hyper(1.0, 0, 1e3)
    iou_t: float = hyper(0.2)
    anchor_t: float = hyper(4.0, 1, 100)
    anchors: int = hyper(0, 0, 20, whole=True)
    fl_gamma: float = hyper(0.0, 0, 10)
    label_smoothing: float = hyper(0.0, 0, 0.9999)
    loss_ota: int = hyper(1, whole=True)


@dataclass(frozen=True)
class AugmentRecipe(Part):
    """Augmentation: shares and probabilities, degrees, and the odds of pasting."""

    hsv_h: float = hyper(0.015)
    hsv_s: float = hyper(0.7)
    hsv_v: float = hyper(0.4)
    degrees: float = hyper(0.0, 0, 180)
    translate: float = hyper(0.1)
    scale: float = hyper(0.5)
    shear: float = hyper(0.0, 0, 89)
    perspective: float = hyper(0.0, 0, 0.01)
    flipud: float = hyper(0.0)
    fliplr: float = hyper(0.5)
    mosaic: float = hyper(1.0)
    mixup: float = hyper(0.0)
    copy_paste: float = hyper(0.0)
    paste_in: float = hyper(0.0)


@dataclass(frozen=True)
class Recipe:
    """All hyperparameters of a run in its parts; in files and on the command line they are one flat table."""

    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    loss: LossRecipe = LossRecipe()
    augment: AugmentRecipe = AugmentRecipe()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from a flat table of checked values; other keys are left aside, absent ones have their default."""
        return cls(**{name: type(default).of(values) for name, default in vars(cls()).items()})

    def flat(self) -> dict[str, Any]:
        """Plain values by key, as hyp.yaml has them; ``Recipe.of(flat)`` gives the recipe back."""
        return {key: value for part in vars(self).values() for key, value in vars(part).items()}


# key -> what it may be
HYP_RULES: dict[str, Rule] = {
    entry.name: entry.metadata["rule"] for part in vars(Recipe()).values() for entry in dataclasses.fields(part)
}
# Keys of recipes before version 0.2, and what to do about them.
FORMER = {
    "sp_damping": "write sp_metric: fisher (the default) or none",
    "sp_gamma_start": "drop it: SP finds its first step by itself",
}


def check_hyperparameter(key: str, value: Any, where: str, known: Iterable[str] = HYP_RULES) -> Any:
    """``value`` as the type that ``key`` has.

    Raises:
        UserError: ``key`` is none of ``known``, or the value breaks its rule; begins with ``where``.
    """
    if key in FORMER:
        raise UserError(f"{where}: {key} is of an earlier version: {FORMER[key]}")
    if key not in known:
        hint = " (did you mean 'lr0'?)" if key in ("lr", "learning_rate") else did_you_mean(key, known)
        raise UserError(f"{where}: unknown hyperparameter {repr(key)[:80]}{hint}")
    try:
        return HYP_RULES[key].check(value)
    except ValueError as error:
        raise UserError(f"{where}: {key} = {repr(value)[:80]}: {error}") from None


def parse_assignments(assignments: Iterable[str], flag: str = "--set") -> dict[str, Any]:
    """``["lr0=0.1", ...]`` of the command line's ``flag`` as a dict; values are read like YAML scalars.

    Raises:
        UserError: an item is not of the form KEY=VALUE.
    """
    result: dict[str, Any] = {}
    for item in assignments:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"{flag} {' '.join(item.split())[:80]}: expected KEY=VALUE")
        result[key] = text
        if key != "root":  # a path, whatever it looks like
            with contextlib.suppress(ValueError):  # what looks like a list or a date and is none
                result[key] = read_scalar(text)
    return result


def load_recipe(
    path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None, *, size: str = "tiny"
) -> Recipe:
    """The recipe of a file, completed by defaults, with ``overrides`` (of ``--set``) on top.

    ``extends`` in the file names another one that it differs from; with "auto" that is hyp.scratch.SIZE.yaml.

    Raises:
        UserError: unknown or duplicate key, a value of the wrong type or out of its bounds, files that extend each
            other in a circle; names file and line.
    """
    values = read_recipe(path, size)
    for key, value in (overrides or {}).items():
        values[key] = check_hyperparameter(key, value, "--set")
    recipe = Recipe.of(values)
    if recipe.optimizer.sp_start >= recipe.optimizer.sp_end:
        start, end = recipe.optimizer.sp_start, recipe.optimizer.sp_end
        raise UserError(f"{find_file(path, 'hyp')}: sp_start = {start} must be below sp_end = {end}")
    _check_channels(recipe.optimizer, str(find_file(path, "hyp")))
    return recipe


def _check_channels(recipe: OptimizerRecipe, where: str) -> None:
    """Raises UserError where channels are to go, and with them what excludes that."""
    if not recipe.sp_channels:
        return
    if recipe.sp_sigma_backbone or recipe.sp_sigma_head:
        raise UserError(f"{where}: sp_channels removes channels, sp_sigma_* single weights: set one of them")
    if recipe.sp_mode != "robust":
        raise UserError(f"{where}: sp_channels needs sp_mode: robust, not {recipe.sp_mode}")


def read_recipe(path: str | os.PathLike[str], size: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The checked values of a file and of all that it extends, not completed. ``above``: the files that extend it.

    Raises: as :func:`load_recipe`.
    """
    source = read_yaml(find_file(path, "hyp"))
    here = str(source.path.resolve())
    if here in above:
        raise UserError(f"{source.path}: extends itself")
    values: dict[str, Any] = {}
    if "extends" in source:
        base = source.pop("extends")
        if not isinstance(base, str):
            raise UserError(f"{source.where('extends')}: extends = {base!r}: must be a recipe file, or 'auto'")
        base = f"hyp.scratch.{size}.yaml" if base == AUTO else base
        beside = source.path.parent / base
        values = read_recipe(beside if beside.is_file() else base, size, (*above, here))
    for key, value in source.items():
        values[key] = check_hyperparameter(key, value, source.where(key))
    return values
