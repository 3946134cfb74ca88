"""The model of a run: built for the data's classes, weights transferred, layers frozen; and the recipe of its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sp_yolo.config import (
    DatasetConfig,
    ModelOptions,
    OptimizerRecipe,
    Recipe,
    RecipeOptions,
    find_file,
    load_recipe,
    read_recipe,
)
from sp_yolo.engine.optimizer import find_optimizer
from sp_yolo.engine.state import Content
from sp_yolo.errors import UserError
from sp_yolo.models import DetectionModel, build_model, follow_names, model_from_weights, read_checkpoint
from sp_yolo.models.heads import IDetect
from sp_yolo.models.weights.origins import missing_words
from sp_yolo.models.weights.transfer import read_model_file, transfer

Say = Callable[[str], None]

TINY_PARAMETERS = 12e6  # yolov7-tiny has 6 million, yolov7 37: which recipe a model gets


@dataclass(frozen=True)
class ChosenRecipe:
    """``path``: the file; ``notes``: what somebody may not expect of it, a line each."""

    path: str
    recipe: Recipe
    notes: tuple[str, ...] = ()


def model_size(model: DetectionModel) -> str:
    """Which of the original's recipes belongs to a model: tiny, p5 or p6."""
    small = sum(parameter.numel() for parameter in model.parameters()) < TINY_PARAMETERS
    return "p6" if len(model.stride) > 3 else "tiny" if small else "p5"


def choose_recipe(options: RecipeOptions, model: DetectionModel) -> ChosenRecipe:
    """``--hyp``, or the recipe of this optimizer and model size, with what ``--set`` overrides.

    Raises:
        UserError: a file or value is wrong; an optimizer without a recipe for detectors.
    """
    size, entry = model_size(model), find_optimizer(options.optimizer, options.opt)
    name = options.hyp or (f"hyp.scratch.{size}.yaml" if options.compat else entry.hyp)
    if not name:
        raise UserError(f"--optimizer {options.optimizer}: has no recipe for detectors, give one by --hyp")
    values, originals = read_recipe(name, size), read_recipe(f"hyp.scratch.{size}.yaml", size)
    overrides = dict(options.overrides)
    missing = [key for key in originals if key not in values and key not in overrides]
    notes = _left_out(name, missing, "auto" if options.compat else entry.hyp or "auto")
    if "lr0" not in overrides:
        given = values.get("lr0") if options.hyp or options.compat else None
        if entry.own_lr is not None:
            overrides["lr0"], words = _own_rate(options.optimizer, entry.own_lr, given, name)
            notes.append(words)
        elif options.optimizer == "sp" and (options.hyp or options.compat):
            notes += _rate_of_sgd(name, given, originals["lr0"], entry.hyp, read_recipe(entry.hyp, size)["lr0"])
    if options.label_smoothing:
        overrides["label_smoothing"] = options.label_smoothing
    return ChosenRecipe(str(find_file(name, "hyp")), load_recipe(name, overrides, size=size), tuple(notes))


def _left_out(name: str, keys: Sequence[str], base: str) -> list[str]:
    """What the file ``name`` does not set of the original's hyperparameters, in a line; ``base`` would set it."""
    words = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
    count = "1 hyperparameter" if len(keys) == 1 else f"{len(keys)} hyperparameters"
    return [f"{name}: defaults for {count} not in it: {words} (`extends: {base}` takes that recipe's)"] if keys else []


def _own_rate(optimizer: str, own: float, given: float | None, name: str) -> tuple[float, str]:
    """lr0 of an optimizer without a recipe, whose default is ``own``: ``given`` in the file ``name`` or that
    default; and in words which."""
    if given is not None:
        return given, f"lr0 {given:g} is from {name}; the default of {optimizer} is {own:g}"
    return own, f"lr0 {own:g} is the default of {optimizer}, all else is from {name}; --set lr0=X changes it"


def _rate_of_sgd(name: str, given: float | None, original: float, own_name: str, own: float) -> list[str]:
    """A warning where SP would train at the original's rate for SGD, of the file ``name`` or as the default."""
    lr0 = OptimizerRecipe().lr0 if given is None else given
    words = f"is the original's rate for SGD; SP's recipe {own_name} has {own:g}: --set lr0={own:g} takes that"
    return [f"warning: {name}: lr0 {lr0:g} {words}"] if lr0 == original else []


def build_detector(
    options: ModelOptions, recipes: RecipeOptions, dataset: DatasetConfig, *, single_class: bool, say: Say
) -> tuple[DetectionModel, ChosenRecipe]:
    """The model of ``--cfg`` or of the weights file, its weights transferred, its first layers frozen; its recipe.

    What is said begins with "warning: " where the weights may not be what the user takes them for.
    """
    if options.weights and not (path := Path(options.weights)).is_file():
        hint = "" if path.is_dir() else " ('' trains from scratch)"
        raise UserError(f"--weights {options.weights}: {missing_words(path)}{hint}")
    content = read_checkpoint(options.weights) if options.weights else None
    names = dataset.class_names(single_class)
    cfg = options.cfg or model_from_weights(options.weights, content).yaml
    model = build_model(cfg, num_classes=len(names))
    chosen = choose_recipe(recipes, model)
    say("\n".join(chosen.notes))
    anchors = chosen.recipe.loss.anchors
    if anchors:
        model = build_model(model.yaml, anchors=anchors)
    given = None
    if options.weights:
        stored = read_model_file(options.weights, content)
        report = transfer(model, stored, keep_anchors=bool(options.cfg or anchors))
        given = report.names
        say(f"warning: {report}" if report.is_poor else str(report))
        if not options.cfg and not isinstance(model.head, IDetect):
            say("these are deploy weights: their plain head is trained on; --cfg MODEL trains the training form")
    if words := follow_names(model, given, names):
        say(f"warning: {words}")
    check_channels(model, options.cfg if isinstance(options.cfg, str) else "the model", options.weights)
    freeze(model, options.freeze, say)
    return model, chosen


def check_channels(model: DetectionModel, cfg: str, weights: str = "") -> None:
    """Raises UserError where ``model`` does not take the three channels that every image is read with."""
    if model.yaml["ch"] != 3:
        name = cfg or weights
        raise UserError(f"{name}: ch: {model.yaml['ch']}: images are read with 3 channels, set ch: 3 or leave it out")


def rebuild_detector(
    content: Content, options: ModelOptions, dataset: DatasetConfig, *, single_class: bool, say: Say
) -> DetectionModel:
    """The model of a checkpoint that a run goes on from, its weights still to be loaded.

    Raises:
        UserError: the data's classes are others, or in another order, than when the run was started.
    """
    names = list(dataset.class_names(single_class))
    if len(names) != content["nc"]:
        raise UserError(f"{dataset.path}: {len(names)} classes, the run to resume has {content['nc']}")
    model = build_model(content["yaml"], num_classes=content["nc"])
    model.names, before = names, content.get("names", [])
    if model.names != before and sorted(model.names) == sorted(before):
        raise UserError(f"{dataset.path}: names stand in another order than in the run to resume: {', '.join(before)}")
    freeze(model, options.freeze, say)
    return model


def freeze(model: DetectionModel, layers: tuple[int, ...], say: Say) -> None:
    """``--freeze n``: layers 0..n-1; ``--freeze a b c``: those layers. BatchNorm statistics go on adapting.

    Raises:
        UserError: a layer the model does not have.
    """
    chosen = set(range(layers[0])) if len(layers) == 1 else set(layers)
    count = len(model.model)
    if chosen and max(chosen) >= count:
        raise UserError(f"--freeze {' '.join(map(str, layers))}: the model has layers 0..{count - 1}")
    frozen = 0
    for name, parameter in model.named_parameters():
        if int(name.split(".")[1]) in chosen:
            parameter.requires_grad_(False)
            frozen += 1
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {' '.join(map(str, layers))}: nothing is left to train")
    if frozen:
        say(f"frozen: {frozen} tensors of {len(chosen)} layers (backbone is layers 0..{model.backbone_rows - 1})")
