"""The model of a run: built for the data's classes, weights transferred, layers frozen; and the recipe of its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sp_yolo.config import DatasetConfig, ModelOptions, Recipe, RecipeOptions, find_file, load_recipe
from sp_yolo.engine.optimizer import find_optimizer
from sp_yolo.engine.state import Content
from sp_yolo.errors import UserError
from sp_yolo.models import DetectionModel, build_model, follow_names, load_weights, model_from_weights
from sp_yolo.models.heads import IDetect

Say = Callable[[str], None]

TINY_PARAMETERS = 12e6  # yolov7-tiny has 6 million, yolov7 37: which recipe a model gets


@dataclass(frozen=True)
class ChosenRecipe:
    path: str
    recipe: Recipe


def model_size(model: DetectionModel) -> str:
    """Which of the original's recipes belongs to a model: tiny, p5 or p6."""
    small = sum(parameter.numel() for parameter in model.parameters()) < TINY_PARAMETERS
    return "p6" if len(model.stride) > 3 else "tiny" if small else "p5"


def choose_recipe(options: RecipeOptions, model: DetectionModel) -> ChosenRecipe:
    """``--hyp``, or the recipe of this optimizer and model size, with what ``--set`` overrides."""
    size = model_size(model)
    entry = find_optimizer(options.optimizer, options.opt)
    name = options.hyp or (f"hyp.scratch.{size}.yaml" if options.compat else entry.hyp)
    overrides = {**({} if options.hyp or options.compat else entry.detector), **options.overrides}
    if options.label_smoothing:
        overrides["label_smoothing"] = options.label_smoothing
    return ChosenRecipe(str(find_file(name, "hyp")), load_recipe(name, overrides, size=size))


def build_detector(
    options: ModelOptions, recipes: RecipeOptions, dataset: DatasetConfig, *, single_class: bool, say: Say
) -> tuple[DetectionModel, ChosenRecipe]:
    """The model of ``--cfg`` or of the weights file, its weights transferred, its first layers frozen; its recipe.

    What is said begins with "warning: " where the weights may not be what the user takes them for.
    """
    if options.weights and not Path(options.weights).is_file():
        raise UserError(f"--weights {options.weights}: no such file (nothing is downloaded; '' trains from scratch)")
    names = dataset.class_names(single_class)
    cfg = options.cfg or model_from_weights(options.weights).yaml
    model = build_model(cfg, num_classes=len(names))
    chosen = choose_recipe(recipes, model)
    anchors = chosen.recipe.loss.anchors
    if anchors:
        model = build_model(model.yaml, anchors=anchors)
    given = None
    if options.weights:
        report = load_weights(model, options.weights, keep_anchors=bool(options.cfg or anchors))
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
