"""The one place that sets a run up: options -> data, model, loss, optimizer, schedule, state and folder."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sp_yolo.config import Config, OptimizerRecipe
from sp_yolo.engine.autoanchor import check_anchors
from sp_yolo.engine.compact import remove_channels
from sp_yolo.engine.ema import ModelEma
from sp_yolo.engine.inputs import class_weights
from sp_yolo.engine.model import Say
from sp_yolo.engine.optimizer import build_optimizer, find_optimizer
from sp_yolo.engine.plan import Plan, RunSize, make_plan
from sp_yolo.engine.progress import Progress, RunningLoss
from sp_yolo.engine.resume import reopen
from sp_yolo.engine.review import describe, require_little_loss, review
from sp_yolo.engine.schedule import RunLength, Schedule, fit_to_run, make_schedule
from sp_yolo.engine.splits import MeasuredSplit, TrainingSplit, open_measured_split, open_training_split
from sp_yolo.engine.state import Content, RunState
from sp_yolo.engine.step import StepSettings, TrainStep
from sp_yolo.errors import UserError
from sp_yolo.losses import DetectionLoss
from sp_yolo.models import DetectionModel
from sp_yolo.report.training import RunPictures
from sp_yolo.runtime.checkpoint import remove_leftovers
from sp_yolo.runtime.device import Compute
from sp_yolo.runtime.distributed import World, average, broadcast, share
from sp_yolo.runtime.faults import explained
from sp_yolo.runtime.folder import RunDir


@dataclass
class Run:
    """All that one run is made of. ``options``: with every value filled in; ``told``: they and the recipe as plain
    values, for files and checkpoints.

    ``network``: ``state.model`` as it is called in training, wrapped for several processes and --compile.
    ``val_loss``: of the validation, which matches by anchors alone.
    """

    world: World
    compute: Compute
    options: Config
    size: RunSize
    told: Content
    recipe_path: str
    recipe: OptimizerRecipe
    train: TrainingSplit
    val: MeasuredSplit
    network: nn.Module
    val_loss: DetectionLoss
    schedule: Schedule
    state: RunState
    folder: RunDir
    step: TrainStep
    pictures: RunPictures

    @property
    def model(self) -> DetectionModel:
        return self.state.model


def set_up(config: Config, world: World, say: Say) -> Run:
    """Build everything, of a new run or of one to go on with, and say how each part was chosen.

    Raises:
        UserError: data, recipe, weights or flags are wrong. EnvironmentFault: the device is not there, or too small.
    """
    if not config.resume:
        return _build(make_plan(config, world, say), None, {})
    config, content, folder, words = reopen(config)
    say(words)
    return _build(make_plan(config, world, say, content, str(folder.path / "hyp.yaml")), folder, content)


def _build(plan: Plan, folder: RunDir | None, resumed: Content) -> Run:
    """``folder`` and content of the checkpoint of a run to go on with; None, {}: a new one."""
    config, size, world = plan.config, plan.size, plan.world
    with explained(size.batch_size, size.train, world.size):
        train = _open_training(plan)
        val = _open_validation(plan, train)
        if not resumed and not config.noautoanchor:
            boxes = train.data.labels, train.data.shapes_wh
            plan.say(check_anchors(*boxes, plan.model, size.train, plan.recipe.loss.anchor_t))
        if config.compat:
            plan.model.half().float()  # as the original
        plan.model.to(plan.compute.device).to(memory_format=torch.channels_last)
        course = _course(plan, train)
        length = fit_to_run(plan.recipe, **course, compat=config.compat)
        schedule = make_schedule(plan.recipe, length, **course, linear=config.linear_lr, compat=config.compat)
        if find_optimizer(config.optimizer, config.opt).schedule_free:
            schedule = dataclasses.replace(schedule, lrf=1.0)
            plan.say(f"{config.optimizer}: constant rate after the warm-up, its own average of the weights")
        state = _start_state(plan, train, length, schedule)
        if share := plan.recipe.optimizer.sp_channels:
            plan.say(remove_channels(state.optimizer, plan.model, share))
        loss, val_loss = _build_losses(plan, train)
        network = _wrap(plan)
        groups = state.optimizer.param_groups
        sizes = ", ".join(f"{len(group['params'])} {group['name']}" for group in groups)
        lr0 = plan.recipe.optimizer.lr0
        plan.say(f"Optimizer groups: {sizes} ({type(state.optimizer).__name__}, lr0 {lr0:g})\n{length.words}")
        plan.say(f"recipe {plan.chosen.path}; {plan.compute.words}; seed {config.seed}")
        told: Content = {"config": config.as_dict(), "hyp": plan.recipe.flat()}
        if folder is None:
            made = str(_new_folder(config, told).path) if world.main else ""
            folder = RunDir(Path(broadcast(made, world)))
        else:
            _go_on(state, resumed, folder, schedule, plan)
        return Run(
            world=world,
            compute=plan.compute,
            options=config,
            size=size,
            told=told,
            recipe_path=plan.chosen.path,
            recipe=plan.recipe.optimizer,
            train=train,
            val=val,
            network=network,
            val_loss=val_loss,
            schedule=schedule,
            state=state,
            folder=folder,
            step=TrainStep(_step_settings(plan), plan.compute, world, network, loss, schedule, state, folder),
            pictures=RunPictures(folder.path, plan.model.names),
        )


def _course(plan: Plan, train: TrainingSplit) -> dict[str, int]:
    """Length and batch size of the run."""
    batches = train.loader.batches_per_epoch
    return {"epochs": plan.size.epochs, "batches_per_epoch": batches, "batch_size": train.batch_size}


# ---------------------------------------------------------------------------------------------------------------- data
def _open_training(plan: Plan) -> TrainingSplit:
    """Training data and their loader; says what was found, and what of it the flags do not follow."""
    config, size, say = plan.config, plan.size, plan.say
    train = open_training_split(
        config,
        plan.dataset,
        plan.recipe.augment,
        image_size=size.train,
        batch_size=size.batch_size,
        stride=plan.stride,
        epochs=size.epochs,
        seed=config.seed,
        workers=config.workers,
        compat=config.compat,
        compute=plan.compute,
        world=plan.world,
    )
    say("\n".join([*plan.dataset.notes, *describe("train", train.data)]))
    say(train.data.cache_note)
    if train.batch_size < size.batch_size:
        say(f"--batch-size {size.batch_size} lowered to the {train.batch_size} training images there are")
    if config.rect and config.image_weights:
        say("--image-weights draws images singly: --rect is not followed")
    _check_normalisable(plan, train)
    return train


def _check_normalisable(plan: Plan, train: TrainingSplit) -> None:
    """Batch normalisation needs two values of a channel: two images, or two cells of the coarsest map.

    Raises:
        UserError: the last batch, at the smallest size of --multi-scale, has one.
    """
    config, images, coarsest = plan.config, len(train.data), int(plan.model.stride.max())
    size = max(plan.size.train // (2 if config.multi_scale else 1) // plan.stride, 1) * plan.stride
    each = train.batch_size // plan.world.size
    if config.quad or size > coarsest or (-(-images // plan.world.size) % each or each) > 1:
        return
    sizes = f" (--multi-scale goes down to {size})" if config.multi_scale else ""
    raise UserError(
        f"--img-size {plan.size.train}{sizes} and --batch-size {plan.size.batch_size}: the last of {images} images is "
        f"alone in its batch, with one cell on the map of stride {coarsest}, and batch normalisation needs two values: "
        f"give --img-size {(4 if config.multi_scale else 2) * plan.stride} or another --batch-size"
    )


def _open_validation(plan: Plan, train: TrainingSplit) -> MeasuredSplit:
    """Validation data, or the training data where there are none. Says what `check` would warn of.

    Raises:
        UserError: much of what is labelled would be lost, and --accept-losses was not given.
    """
    dataset, say = plan.dataset, plan.say
    if not dataset.val:
        say(f"{dataset.path}: no 'val' split is given, validating on the training images")
    val = open_measured_split(
        dataset,
        "val" if dataset.val else "train",
        image_size=plan.size.val,
        batch_size=2 * plan.size.batch_size,
        stride=plan.stride,
        single_class=plan.config.single_cls,
        workers=plan.config.workers,
        device=plan.compute.device,
        world=plan.world,
    )
    splits = {"train": train.data}
    if dataset.val:
        say("\n".join(describe("val", val.data)))
        splits["val"] = val.data
    require_little_loss(splits, accepted=plan.config.accept_losses)
    say("\n".join(f"warning: {line}" for line in review(splits, plan.size.train)))
    return val


# ------------------------------------------------------------------------------------------------------------ training
def _start_state(plan: Plan, train: TrainingSplit, length: RunLength, schedule: Schedule) -> RunState:
    device, progress = plan.compute.device, Progress()
    return RunState(
        model=plan.model,
        optimizer=build_optimizer(
            plan.config.optimizer,
            plan.model,
            plan.recipe.optimizer,
            weight_decay=length.weight_decay,
            total_steps=schedule.updates(),
            keywords=plan.config.opt,
            check_finite=False,  # TrainStep looks, and stops the run
        ),
        ema=ModelEma(plan.model, length.ema_decay, length.ema_ramp, average_buffers=length.average_buffers),
        scaler=torch.amp.GradScaler(device.type, enabled=plan.compute.amp is torch.float16),
        batches_per_epoch=train.loader.batches_per_epoch,
        progress=progress,
        losses=RunningLoss(device, progress),
    )


def _build_losses(plan: Plan, train: TrainingSplit) -> tuple[DetectionLoss, DetectionLoss]:
    """Of training and of validation."""
    compat, recipe = plan.config.compat, plan.recipe.loss
    together = plan.world.size > 1 and not compat  # the original divides by each process's own matches
    mean = functools.partial(average, world=plan.world) if together else None
    assigner = "ota" if recipe.loss_ota else "anchor"
    weights = class_weights(train.data.labels, plan.model.num_classes) if plan.config.class_weights else None
    if weights is not None:
        shown = ", ".join(f"{name} {each:.2f}" for name, each in zip(plan.model.names, weights, strict=True))
        plan.say(f"class weights: {shown}")
    loss = DetectionLoss(
        plan.model, recipe, plan.size.train, assigner, compat=compat, average=mean, class_weights=weights
    )
    return loss, DetectionLoss(plan.model, recipe, plan.size.train, "anchor", compat=compat)


def _wrap(plan: Plan) -> nn.Module:
    """The model as it is called in training."""
    config, device = plan.config, plan.compute.device
    if config.sync_bn and (plan.world.size == 1 or device.type != "cuda"):
        plan.say("--sync-bn: needs several GPUs, not followed")
    network = share(plan.model, plan.world, device, sync_bn=config.sync_bn)
    return torch.compile(network) if config.compile else network  # type: ignore[return-value]


def _step_settings(plan: Plan) -> StepSettings:
    config, recipe = plan.config, plan.recipe.optimizer
    entry = find_optimizer(config.optimizer, config.opt)
    return StepSettings(
        image_size=plan.size.train,
        stride=plan.stride,
        seed=config.seed,
        multi_scale=config.multi_scale,
        quad=config.quad,
        lr0=recipe.lr0,
        clip_norm=recipe.clip_norm,
        momentum=entry.momentum,
        betas=entry.momentum and not config.compat,
        schedule_free=entry.schedule_free,
    )


# -------------------------------------------------------------------------------------------------------------- folder
def _new_folder(config: Config, told: Content) -> RunDir:
    folder = RunDir.create(config.project, config.name, config.exist_ok)
    folder.weights.mkdir(exist_ok=True)
    folder.write_yaml("opt.yaml", told["config"])
    folder.write_yaml("hyp.yaml", told["hyp"])
    return folder


def _go_on(state: RunState, content: Content, folder: RunDir, schedule: Schedule, plan: Plan) -> None:
    """Take over what the checkpoint holds.

    Raises:
        UserError: it belongs to other data.
    """
    if plan.world.main:
        for place in (folder.path, folder.weights):
            remove_leftovers(place)
    plan.say(state.restore(content, str(folder.path), schedule.updates()))
    iteration = state.progress.iteration
    plan.say(f"resumed {folder.path} at iteration {iteration} of {schedule.iterations}")
