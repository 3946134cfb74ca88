"""Everything that one training iteration needs, of a network of 9,000 parameters, without a run around it."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import nn

from sp_yolo.config import LossRecipe, OptimizerRecipe, Recipe
from sp_yolo.data import Batch
from sp_yolo.engine.ema import ModelEma
from sp_yolo.engine.optimizer import build_optimizer
from sp_yolo.engine.progress import Progress, RunningLoss
from sp_yolo.engine.schedule import Schedule, fit_to_run, make_schedule
from sp_yolo.engine.state import RunState
from sp_yolo.engine.step import StepSettings, TrainStep
from sp_yolo.losses import DetectionLoss
from sp_yolo.models import DetectionModel, build_model
from sp_yolo.runtime.device import Compute
from sp_yolo.runtime.distributed import World
from sp_yolo.runtime.folder import RunDir
from support.networks import MINI

CPU = torch.device("cpu")


def mini() -> DetectionModel:
    torch.manual_seed(0)
    return build_model(yaml.safe_load(MINI)).train()


def state_of(model: DetectionModel, *, scale: float = 0.0) -> RunState:
    """A run of ``model`` before its first iteration; ``scale``: of the loss, as a float16 run has one (0: none)."""
    progress = Progress()
    return RunState(
        model=model,
        ema=ModelEma(model),
        optimizer=build_optimizer("sgd", model, OptimizerRecipe(), weight_decay=0.0, total_steps=8),
        scaler=torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale > 0),
        batches_per_epoch=4,
        progress=progress,
        losses=RunningLoss(CPU, progress),
    )


def schedule_of(accumulate: int) -> Schedule:
    """Two epochs of four batches of two images; a step every ``accumulate`` batches."""
    course = {"epochs": 2, "batches_per_epoch": 4, "batch_size": 2}
    recipe = Recipe.of({"nominal_batch": 2 * accumulate, "warmup_epochs": 0.0})
    return make_schedule(recipe, fit_to_run(recipe, **course, compat=False), **course, linear=False, compat=False)


def step_of(
    state: RunState, folder: Path, *, network: nn.Module | None = None, accumulate: int = 1, clip_norm: float = 0.0
) -> TrainStep:
    """One iteration of ``state``, whose model is called as ``network``."""
    settings = StepSettings(
        image_size=64,
        stride=32,
        seed=0,
        multi_scale=False,
        quad=False,
        lr0=0.01,
        clip_norm=clip_norm,
        momentum=True,
        betas=True,
        schedule_free=False,
    )
    loss = DetectionLoss(state.model, LossRecipe(), 64)
    return TrainStep(
        settings,
        Compute(CPU, None, "cpu"),
        World(),
        state.model if network is None else network,
        loss,
        schedule_of(accumulate),
        state,
        RunDir(folder),
    )


def batch() -> Batch:
    """Two grey images of 64 px with an object each."""
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Batch(images, torch.tensor([[0, 1, 0.4, 0.4, 0.3, 0.3], [1, 2, 0.6, 0.6, 0.2, 0.4]]), [])
