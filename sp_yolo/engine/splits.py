"""A data set's splits as a run uses them: training data with their loader, validation data with their evaluator."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sp_yolo.config import AugmentRecipe, DataOptions, DatasetConfig, load_dataset_config
from sp_yolo.data import (
    DetectionDataset,
    Loader,
    build_loader,
    describe_folder,
    ensure_toy_dataset,
    refuse_no_description,
)
from sp_yolo.data.hook import find_hook
from sp_yolo.data.images import read_image
from sp_yolo.errors import UserError
from sp_yolo.eval import CocoEvaluator
from sp_yolo.runtime.device import Compute, keep_freed_memory
from sp_yolo.runtime.distributed import World

CACHES: dict[str, bool | str] = {"": "auto", "ram": True, "disk": "disk"}  # of --cache-images


@dataclass(frozen=True)
class TrainingSplit:
    """``batch_size``: images per iteration over all processes, as many as the data allow."""

    data: DetectionDataset
    loader: Loader
    batch_size: int


@dataclass(frozen=True)
class MeasuredSplit:
    """A split that a model is measured on. ``truth``: its ground truth, as COCO json has it."""

    data: DetectionDataset
    loader: Loader
    evaluator: CocoEvaluator
    truth: dict[str, Any]

    def reader(self) -> Callable[[int], np.ndarray]:
        """Image id of the ground truth -> its pixels [H, W, 3] RGB in original size, as reports draw on them."""
        paths = {image["id"]: self.data.path(index) for index, image in enumerate(self.truth["images"])}
        return lambda image_id: read_image(paths[image_id])[..., ::-1]


def open_dataset(data: str, root: str = "") -> DatasetConfig:
    """The description of a dataset YAML or of a folder; its data generated first where the YAML asks for it."""
    if os.path.isdir(data) and not root:  # where a name is too long Path raises
        return describe_folder(data)
    refuse_no_description(data)
    dataset = load_dataset_config(data, root or None)
    if dataset.generate == "toy":
        ensure_toy_dataset(dataset.root)
    return dataset


def open_training_split(
    options: DataOptions,
    dataset: DatasetConfig,
    augment: AugmentRecipe,
    *,
    image_size: int,
    batch_size: int,
    stride: int,
    epochs: int,
    seed: int,
    workers: int,
    compat: bool,
    compute: Compute,
    world: World,
) -> TrainingSplit:
    """The training data. ``batch_size``: asked for, over all processes; ``workers``: see :func:`loader_processes`."""
    per_process = max(batch_size // world.size, 1)
    named = options.augment_with
    hook = named if not isinstance(named, str) else find_hook(named) if named else None
    on_device = {"auto": compute.device.type == "cuda" and not compat, "cpu": False, "device": True}[options.augment_on]
    data = DetectionDataset(
        dataset,
        "train",
        image_size,
        augment=augment,
        rect=options.rect and not options.image_weights,  # sorted batches cannot be drawn by weight
        batch_size=per_process,
        stride=stride,
        seed=seed,
        single_class=options.single_cls,
        cache_images=CACHES[options.cache_images],
        compat=compat,
        processes=world.local_size,
        sketches=on_device and not options.quad and hook is None,  # these two need the pixels
        mosaic_epochs=epochs - options.close_mosaic if options.close_mosaic else None,
        hook=hook,
    )
    total = total_batch(batch_size, len(data), world, options.data)
    loader = build_loader(
        data,
        batch_size=total // world.size,
        shuffle=not (options.rect or compat),
        seed=seed,
        workers=loader_processes(workers, per_process, compute.device, world, data.in_memory),
        rank=world.rank,
        world_size=world.size,
        pin_memory=compute.device.type == "cuda",
        quad=options.quad,
        device=compute.device,
        at_start=keep_freed_memory,
    )
    return TrainingSplit(data, loader, total)


def open_measured_split(
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
    margin: float = 0.5,
) -> MeasuredSplit:
    """One split as every validation uses it: rect batches, ``margin`` strides of padding.

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
        pad=margin,
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
        pin_memory=device.type == "cuda",
    )
    truth = data.ground_truth()
    return MeasuredSplit(data, loader, CocoEvaluator(truth, data.category_ids, list(data.names)), truth)


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


def total_batch(asked: int, images: int, world: World, data: str) -> int:
    """Images per iteration over all processes: as ``asked``, or what a smaller dataset has.

    Raises:
        UserError: not equally many for each process.
    """
    if asked % world.size:
        raise UserError(f"--batch-size {asked}: must be a multiple of the {world.size} processes")
    if images < world.size:
        raise UserError(f"{data}: {images} training images for {world.size} processes")
    return min(asked, images // world.size * world.size)
