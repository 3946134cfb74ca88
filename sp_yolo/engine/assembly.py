"""Put the parts of a run together and say how each was chosen: its data, then everything that trains on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sp_yolo.config import Config, DatasetConfig
from sp_yolo.data import DetectionDataset, Loader
from sp_yolo.engine import build
from sp_yolo.engine.device import Compute
from sp_yolo.engine.distributed import World, average, share
from sp_yolo.engine.ema import ModelEma
from sp_yolo.engine.optimizer import build_optimizer
from sp_yolo.engine.progress import Progress, RunningLoss
from sp_yolo.engine.review import describe, require_little_loss, review
from sp_yolo.engine.schedule import Schedule, fit_to_run, make_schedule
from sp_yolo.engine.state import RunState
from sp_yolo.eval import CocoEvaluator
from sp_yolo.losses import DetectionLoss
from sp_yolo.models import DetectionModel

Say = Callable[[str], None]


def open_training_data(
    config: Config,
    dataset: DatasetConfig,
    hyp: Mapping[str, Any],
    stride: int,
    device: torch.device,
    world: World,
    say: Say,
) -> tuple[DetectionDataset, Loader, int]:
    """Training data, their loader, and images per iteration over all processes."""
    data, loader, batch_size = build.build_train_data(config, dataset, hyp, stride, device, world)
    say("\n".join([*dataset.notes, *describe("train", data)]))
    say(data.cache_note)
    if batch_size < config.batch_size:
        say(f"--batch-size {config.batch_size} lowered to the {batch_size} training images there are")
    if config.rect and config.image_weights:
        say("--image-weights draws images singly: --rect is not followed")
    return data, loader, batch_size


def open_validation_data(
    config: Config,
    dataset: DatasetConfig,
    train: DetectionDataset,
    stride: int,
    device: torch.device,
    world: World,
    say: Say,
) -> tuple[DetectionDataset, Loader, CocoEvaluator]:
    """Validation data, or the training data where there are none; their loader and evaluator. Says what `check` would
    warn of."""
    if not dataset.val:
        say(f"{dataset.path}: no 'val' split is given, validating on the training images")
    data, loader, evaluator = build.build_val_data(
        dataset,
        "val" if dataset.val else "train",
        image_size=config.img_size[1],
        batch_size=2 * config.batch_size,
        stride=stride,
        single_class=config.single_cls,
        workers=config.workers,
        device=device,
        world=world,
    )
    splits = {"train": train}
    if dataset.val:
        say("\n".join(describe("val", data)))
        splits["val"] = data
    require_little_loss(splits, accepted=config.accept_losses)
    say("\n".join(f"warning: {line}" for line in review(splits, config.img_size[0])))
    return data, loader, evaluator


def start_training(
    config: Config,
    hyp: Mapping[str, Any],
    model: DetectionModel,
    loader: Loader,
    batch_size: int,
    compute: Compute,
    world: World,
    say: Say,
) -> tuple[Schedule, RunState, DetectionLoss, DetectionLoss, nn.Module]:
    """Schedule, state, training and validation loss, and ``model`` as it is called in training.

    The model is moved to the device, and wrapped for several processes and --compile.
    """
    device = compute.device
    if config.compat:
        model.half().float()  # as the original (specification, training §4.1)
    model.to(device).to(memory_format=torch.channels_last)
    run = {"epochs": config.epochs, "batches_per_epoch": loader.batches_per_epoch, "batch_size": batch_size}
    length = fit_to_run(hyp, **run, compat=config.compat)
    schedule = make_schedule(hyp, length, **run, linear=config.linear_lr, compat=config.compat)
    optimizer = build_optimizer(
        *(config.optimizer, model, hyp),
        weight_decay=length.weight_decay,
        total_steps=schedule.updates(),
        check_finite=False,  # TrainStep looks, and stops the run
    )
    together = world.size > 1 and not config.compat  # the original divides by each process's own matches
    loss = DetectionLoss(
        *(model, hyp, config.img_size[0], "ota" if hyp["loss_ota"] else "anchor"),
        compat=config.compat,
        average=functools.partial(average, world=world) if together else None,
    )
    val_loss = DetectionLoss(model, hyp, config.img_size[0], "anchor", compat=config.compat)
    progress = Progress()
    state = RunState(
        model,
        ModelEma(model, length.ema_decay, length.ema_ramp, average_buffers=length.average_buffers),
        optimizer,
        torch.amp.GradScaler(device.type, enabled=compute.amp is torch.float16),
        loader.batches_per_epoch,
        progress,
        RunningLoss(device, progress),
    )
    if config.sync_bn and (world.size == 1 or device.type != "cuda"):
        say("--sync-bn: needs several GPUs, not followed")
    network = share(model, world, device, sync_bn=config.sync_bn)
    if config.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    sizes = ", ".join(f"{len(group['params'])} {group['name']}" for group in optimizer.param_groups)
    say(f"Optimizer groups: {sizes} ({type(optimizer).__name__}, lr0 {hyp['lr0']:g})")
    say(length.words)
    return schedule, state, loss, val_loss, network
