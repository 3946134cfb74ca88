"""What is decided of a run before the first image is read: its sizes, model and recipe, and where it computes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from sp_yolo.config import Config, DatasetConfig, Recipe
from sp_yolo.engine.batch_size import fitting_batch
from sp_yolo.engine.inputs import round_up, size_grid
from sp_yolo.engine.model import ChosenRecipe, Say, build_detector, choose_recipe, rebuild_detector
from sp_yolo.engine.splits import open_dataset
from sp_yolo.engine.state import Content
from sp_yolo.models import DetectionModel, build_model, model_from_weights
from sp_yolo.models.weights.published import find_weights
from sp_yolo.runtime.device import Compute, select_compute
from sp_yolo.runtime.distributed import World, broadcast

DEFAULT_CFG = "yolov7-tiny"


@dataclass(frozen=True)
class RunSize:
    """``batch_size``: over all devices, as asked for. ``train``, ``val``: image sizes in px."""

    epochs: int
    batch_size: int
    train: int
    val: int


DEFAULT_SIZE = RunSize(epochs=300, batch_size=16, train=640, val=640)
# What `train_sp.py` does when it is told nothing; the toy data are small and easy (docs/results.md).
TOY_SIZE, TOY_HYP = RunSize(epochs=18, batch_size=8, train=192, val=192), "sp.toy.yaml"


def choose_size(config: Config, dataset: DatasetConfig) -> RunSize:
    """The sizes that are asked for, or those of the data."""
    default = TOY_SIZE if dataset.generate == "toy" else DEFAULT_SIZE
    train, val = config.img_size or (default.train, default.val)
    batch_size = config.batch_size if isinstance(config.batch_size, int) else default.batch_size
    return RunSize(config.epochs or default.epochs, batch_size, train, val)


def complete(config: Config, dataset: DatasetConfig) -> Config:
    """``config`` with the values that depend on the dataset filled in, its paths good in any working directory."""
    size = choose_size(config, dataset)
    cfg = config.cfg or ("" if config.weights else DEFAULT_CFG)
    toy = dataset.generate == "toy" and cfg == DEFAULT_CFG and config.optimizer == "sp"
    return dataclasses.replace(
        config,
        epochs=size.epochs,
        batch_size=size.batch_size if config.batch_size != "auto" else "auto",
        img_size=(size.train, size.val),
        cfg=cfg,
        weights=find_weights(config.weights, offline=config.offline),
        hyp=config.hyp or (TOY_HYP if toy else ""),
        data=str(dataset.path.resolve()),
        root=str(dataset.root) if config.root else "",
    )


def recipe_of(config: Config) -> Recipe:
    """The recipe that a run of ``config`` would have.

    Raises:
        UserError: data, recipe or weights are wrong.
    """
    config = complete(config, open_dataset(config.data, config.root))
    model = build_model(config.cfg) if config.cfg else model_from_weights(config.weights)
    return choose_recipe(config, model).recipe


@dataclass(frozen=True)
class Plan:
    """``config`` with every value filled in; ``stride``: image sizes are multiples of it."""

    config: Config
    size: RunSize
    dataset: DatasetConfig
    chosen: ChosenRecipe
    model: DetectionModel
    stride: int
    compute: Compute
    world: World
    say: Say

    @property
    def recipe(self) -> Recipe:
        return self.chosen.recipe


def make_plan(config: Config, world: World, say: Say, resumed: Content | None = None, hyp_path: str = "") -> Plan:
    """The plan of a new run, or of one to go on with: ``resumed`` is its checkpoint, ``hyp_path`` its recipe.

    Raises:
        UserError: data, recipe, weights or flags are wrong. EnvironmentFault: the device is not there.
    """
    dataset = open_dataset(config.data, config.root)
    config = complete(config, dataset)
    ranks = world.local_rank, world.size
    compute = select_compute(config.device, config.amp, *ranks, deterministic=config.deterministic)
    torch.manual_seed(config.seed)
    if resumed:
        model = rebuild_detector(resumed, config, dataset, single_class=config.single_cls, say=say)
        chosen = ChosenRecipe(hyp_path, Recipe.of(resumed["hyp"]))
    else:
        model, chosen = build_detector(config, config, dataset, single_class=config.single_cls, say=say)
    stride, size = size_grid(model), choose_size(config, dataset)
    rounded = dataclasses.replace(size, train=round_up(size.train, stride), val=round_up(size.val, stride))
    if rounded != size:
        given, sizes = [size.train, size.val], [rounded.train, rounded.val]
        say(f"--img-size {given} rounded up to {sizes}: multiples of {stride}")
        config = dataclasses.replace(config, img_size=(rounded.train, rounded.val))
    if config.batch_size == "auto":
        largest = round_up(rounded.train * 3 // 2, stride) if config.multi_scale else rounded.train
        total = broadcast(fitting_batch(model, largest, compute) if world.main else 0, world) * world.size
        say(f"--batch-size auto: {total}")
        config, rounded = (
            dataclasses.replace(config, batch_size=total),
            dataclasses.replace(rounded, batch_size=total),
        )
    return Plan(config, rounded, dataset, chosen, model, stride, compute, world, say)
