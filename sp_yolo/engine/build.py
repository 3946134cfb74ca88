"""From a configuration to the parts of a run. Each builder gets its slice of the configuration, never all of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sp_yolo.config import Config, DatasetConfig, find_file, load_dataset_config, load_hyp
from sp_yolo.data import DetectionDataset, build_loader, describe_folder, ensure_toy_dataset, refuse_no_description
from sp_yolo.data.images import read_image
from sp_yolo.engine.distributed import World
from sp_yolo.engine.inputs import size_grid
from sp_yolo.errors import UserError
from sp_yolo.eval import CocoEvaluator
from sp_yolo.models import DetectionModel, build_model, follow_names, load_weights, model_from_weights
from sp_yolo.models.heads import IDetect

DEFAULT_CFG = "yolov7-tiny"
CACHES: dict[str, bool | str] = {"": "auto", "ram": True, "disk": "disk"}  # of --cache-images
# What `train_sp.py` does when it is told nothing; the toy data are small and easy (docs/results.md).
TOY_EPOCHS, TOY_BATCH, TOY_SIZE, TOY_HYP = 18, 8, 192, "sp.toy.yaml"
EPOCHS, BATCH, SIZE = 300, 16, 640
TINY_PARAMETERS = 12e6  # yolov7-tiny has 6 million, yolov7 37: which recipe a model gets


def open_dataset(data: str, root: str | None) -> DatasetConfig:
    """The description of a dataset YAML or of a folder; its data generated first where the YAML asks for it."""
    if os.path.isdir(data) and not root:
        return describe_folder(data)
    refuse_no_description(data)
    dataset = load_dataset_config(data, root)
    if dataset.generate == "toy":
        ensure_toy_dataset(dataset.root)
    return dataset


def complete(config: Config, dataset: DatasetConfig) -> Config:
    """``config`` with the values that depend on the dataset filled in, its paths good in any working directory."""
    toy = dataset.generate == "toy"
    size = config.img_size if config.img_size[0] else (TOY_SIZE if toy else SIZE,) * 2
    epochs = config.epochs or (TOY_EPOCHS if toy else EPOCHS)
    batch_size = config.batch_size or (TOY_BATCH if toy else BATCH)
    cfg = config.cfg or ("" if config.weights else DEFAULT_CFG)
    hyp = config.hyp or (TOY_HYP if toy and cfg == DEFAULT_CFG and config.optimizer == "sp" else "")
    data, overrides = str(dataset.path.resolve()), dict(config.overrides)
    if "root" in overrides:
        overrides["root"] = str(dataset.root)
    filled: dict[str, Any] = {"img_size": size, "epochs": epochs, "batch_size": batch_size, "cfg": cfg, "hyp": hyp}
    return dataclasses.replace(config, **filled, data=data, overrides=overrides)


def choose_hyp(config: Config, model: DetectionModel) -> tuple[str, dict[str, Any]]:
    """Path and content of the recipe: ``--hyp``, or the one of this optimizer and model size."""
    name = config.hyp
    if not name:
        small = sum(parameter.numel() for parameter in model.parameters()) < TINY_PARAMETERS
        size = "p6" if len(model.stride) > 3 else "tiny" if small else "p5"
        family = {"sp": "sp", "adam": "adamw", "adamw": "adamw"}.get(config.optimizer, "sgd")
        name = f"hyp.scratch.{size}.yaml" if config.compat else f"{family}.{size}.yaml"
    overrides = {key: value for key, value in config.overrides.items() if key != "root"}
    if config.label_smoothing:
        overrides["label_smoothing"] = config.label_smoothing
    return str(find_file(name, "hyp")), load_hyp(name, overrides)


def chosen_recipe(config: Config) -> dict[str, Any]:
    """The hyperparameters a run of ``config`` would have.

    Raises:
        UserError: data, recipe or weights are wrong.
    """
    config = complete(config, open_dataset(config.data, config.overrides.get("root")))
    model = build_model(config.cfg) if config.cfg else model_from_weights(config.weights)
    return choose_hyp(config, model)[1]


def build_detector(config: Config, dataset: DatasetConfig, say: Any) -> tuple[DetectionModel, str, dict[str, Any]]:
    """The model of ``--cfg`` or of the weights file, its weights transferred, its first layers frozen; its recipe.

    What is said begins with "warning: " where the weights may not be what the user takes them for.
    """
    if config.weights and not Path(config.weights).is_file():
        raise UserError(f"--weights {config.weights}: no such file (nothing is downloaded; '' trains from scratch)")
    classes = len(dataset.class_names(config.single_cls))
    cfg = config.cfg or model_from_weights(config.weights).yaml
    model = build_model(cfg, num_classes=classes)
    hyp_path, hyp = choose_hyp(config, model)
    if hyp["anchors"]:
        model = build_model(model.yaml, anchors=hyp["anchors"])
    given = None
    if config.weights:
        keep_anchors = bool(config.cfg or hyp["anchors"])
        report = load_weights(model, config.weights, keep_anchors=keep_anchors)
        given = report.names
        say(f"warning: {report}" if report.is_poor else str(report))
        if not config.cfg and not isinstance(model.head, IDetect):
            say("these are deploy weights: their plain head is trained on; --cfg MODEL trains the training form")
    if words := follow_names(model, given, dataset.class_names(config.single_cls)):
        say(f"warning: {words}")
    check_channels(model, config.cfg or config.weights)
    freeze(model, config.freeze, say)
    return model, hyp_path, hyp


def check_channels(model: DetectionModel, where: Any) -> None:
    """Raises UserError where ``model`` does not take the three channels that every image is read with."""
    if model.yaml["ch"] != 3:
        name = where if isinstance(where, str) else "the model"
        raise UserError(f"{name}: ch: {model.yaml['ch']}: images are read with 3 channels, set ch: 3 or leave it out")


def rebuild_detector(config: Config, dataset: DatasetConfig, content: Any, say: Any) -> DetectionModel:
    """The model of a checkpoint that a run goes on from, its weights still to be loaded.

    Raises:
        UserError: the data's classes are in another order than when the run was started.
    """
    model = build_model(content["yaml"], num_classes=content["nc"])
    model.names, before = list(dataset.class_names(config.single_cls)), content.get("names", [])
    if model.names != before and sorted(model.names) == sorted(before):
        raise UserError(f"{dataset.path}: names stand in another order than in the run to resume: {', '.join(before)}")
    freeze(model, config.freeze, say)
    return model


def freeze(model: DetectionModel, layers: tuple[int, ...], say: Any) -> None:
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


def loader_processes(asked: int, batch_size: int, device: torch.device, world: World, in_memory: bool) -> int:
    """Loader processes, of those ``asked`` for: on a GPU as many as its share of this machine's cores and of a batch.

    On a CPU they fight the training threads: one at most, and none where the threads fill both cores of two and the
    images are ``in_memory``: then making a batch costs less than being disturbed by it (docs/speed.md).
    """
    cores = os.cpu_count() or 1
    if device.type == "cpu":
        crowded = cores <= 2 and torch.get_num_threads() >= cores
        return 0 if in_memory and crowded else min(asked, 1)
    return min(max(cores // world.local_size, 1), batch_size, asked)


def total_batch(config: Config, images: int, world: World) -> int:
    """Images per iteration over all processes: ``--batch-size``, or what a smaller dataset has.

    Raises:
        UserError: not equally many for each process.
    """
    if config.batch_size % world.size:
        raise UserError(f"--batch-size {config.batch_size}: must be a multiple of the {world.size} processes")
    if images < world.size:
        raise UserError(f"{config.data}: {images} training images for {world.size} processes")
    return min(config.batch_size, images // world.size * world.size)


def check_normalisable(config: Config, images: int, batch_size: int, model: DetectionModel, world: World) -> None:
    """Batch normalisation needs two values of a channel: two images, or two cells of the coarsest map.

    ``images`` per epoch, ``batch_size`` per iteration, both over all processes.
    Raises:
        UserError: the last batch, at the smallest size of --multi-scale, has one.
    """
    grid, coarsest = size_grid(model), int(model.stride.max())
    size = max(config.img_size[0] // (2 if config.multi_scale else 1) // grid, 1) * grid
    each = batch_size // world.size
    if config.quad or size > coarsest or (-(-images // world.size) % each or each) > 1:
        return
    sizes = f" (--multi-scale goes down to {size})" if config.multi_scale else ""
    raise UserError(
        f"--img-size {config.img_size[0]}{sizes} and --batch-size {config.batch_size}: the last of {images} images is "
        f"alone in its batch, with one cell on the map of stride {coarsest}, and batch normalisation needs two values: "
        f"give --img-size {(4 if config.multi_scale else 2) * grid} or another --batch-size"
    )


def build_train_data(
    config: Config, dataset: DatasetConfig, hyp: Any, stride: int, device: torch.device, world: World
) -> Any:
    """Training dataset, its loader, and images per iteration over all processes."""
    per_process = max(config.batch_size // world.size, 1)
    data = DetectionDataset(
        dataset,
        "train",
        config.img_size[0],
        hyp=hyp,
        augment=True,
        rect=config.rect and not config.image_weights,  # sorted batches cannot be drawn by weight
        batch_size=per_process,
        stride=stride,
        seed=config.seed,
        single_class=config.single_cls,
        cache_images=CACHES[config.cache_images],
        compat=config.compat,
        processes=world.local_size,
    )
    batch_size = total_batch(config, len(data), world)
    loader = build_loader(
        data,
        batch_size=batch_size // world.size,
        shuffle=not (config.rect or config.compat),
        seed=config.seed,
        workers=loader_processes(config.workers, per_process, device, world, data.in_memory),
        rank=world.rank,
        world_size=world.size,
        pin_memory=device.type == "cuda",
        quad=config.quad,
    )
    return data, loader, batch_size


def build_val_data(
    dataset: DatasetConfig,
    split: str,
    *,
    image_size: int,
    batch_size: int,
    stride: int,
    single_class: bool,
    workers: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable, as World)
    world: World = World(),  # noqa: B008
    padding_group: int = 0,
) -> tuple[DetectionDataset, Any, CocoEvaluator]:
    """Dataset, loader, evaluator of one split as every validation uses them: rect batches, half a stride of padding.

    ``batch_size``: images over all processes of ``world``; the loader gives this one's share of each batch.
    ``padding_group``: images that are padded to one shape (0: ``batch_size``). Figures depend on the shapes: with the
    group of the training they are the training's, whatever batches the images come in.
    ``workers``: loader processes asked for, see :func:`loader_processes`.
    """
    data = DetectionDataset(
        dataset,
        split,
        image_size,
        rect=True,
        batch_size=padding_group or batch_size,
        stride=stride,
        pad=0.5,
        single_class=single_class,
        cache_images="auto",
        processes=world.local_size,
    )
    groups = data.batch_indices or []
    data.batch_indices = [part for group in groups for part in np.array_split(group, -(-len(group) // batch_size))]
    per_process = max(batch_size // world.size, 1)
    loader = build_loader(
        data,
        batch_size=per_process,
        shuffle=False,
        seed=0,
        workers=loader_processes(workers, per_process, device, world, data.in_memory),
        rank=world.rank,
        world_size=world.size,
    )
    return data, loader, CocoEvaluator(data.ground_truth(), data.category_ids, list(data.names))


def image_reader(data: DetectionDataset) -> Callable[[int], np.ndarray]:
    """Image id of ``data.ground_truth()`` -> its pixels [H, W, 3] RGB in original size, as reports draw on them."""
    paths = {image["id"]: data.path(index) for index, image in enumerate(data.ground_truth()["images"])}
    return lambda image_id: read_image(paths[image_id])[..., ::-1]
