"""A run of the engine's own parts on any device, without files: one batch, trained on again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sp_yolo.boxes import non_max_suppression
from sp_yolo.config import Recipe
from sp_yolo.data import Batch
from sp_yolo.engine.ema import ModelEma
from sp_yolo.engine.optimizer import build_optimizer
from sp_yolo.engine.progress import Progress, RunningLoss
from sp_yolo.engine.schedule import fit_to_run, make_schedule
from sp_yolo.engine.state import RunState
from sp_yolo.engine.step import StepSettings, TrainStep
from sp_yolo.losses import DetectionLoss
from sp_yolo.models import DetectionModel, build_model
from sp_yolo.runtime.device import Compute
from sp_yolo.runtime.distributed import World
from sp_yolo.runtime.folder import RunDir

IMAGES, CLASSES = 2, 80
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"yolov7-tiny": 64, "yolov7": 64, "yolov7-w6": 128}  # px; of two cells of the coarsest map


def make_model(name: str) -> DetectionModel:
    torch.manual_seed(0)
    return build_model(name, num_classes=CLASSES)


def make_batch(size: int, images: int = IMAGES, boxes: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    rows = images * boxes
    image = torch.arange(images).repeat_interleave(boxes).float()
    label = torch.randint(CLASSES, (rows,), generator=generator).float()
    xy = torch.rand(rows, 2, generator=generator) * 0.6 + 0.2
    wh = torch.rand(rows, 2, generator=generator) * 0.3 + 0.1
    return Batch(
        pixels.contiguous(memory_format=torch.channels_last), torch.cat((image[:, None], label[:, None], xy, wh), 1), []
    )


def move(model: DetectionModel, device: torch.device) -> DetectionModel:
    """``model`` with new parameters and buffers on ``device``: Module.to cannot exchange the data of a plain parameter
    for a tensor that only claims to be there."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(device), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


class Rig:
    """``model`` (moved here) with loss, SP, EMA and the iteration that the trainer runs."""

    def __init__(
        self, model: DetectionModel, size: int, device: torch.device, precision: str, optimizer: str = "sp"
    ) -> None:
        recipe, course = Recipe(), {"epochs": 1, "batches_per_epoch": 100, "batch_size": 64}
        self.size = size
        self.model = move(model.to(memory_format=torch.channels_last), device).train()
        length = fit_to_run(recipe, **course, compat=False)
        schedule = make_schedule(recipe, length, **course, linear=False, compat=False)
        self.optimizer = build_optimizer(
            optimizer, self.model, recipe.optimizer, weight_decay=length.weight_decay, total_steps=100,
            check_finite=False,
        )  # fmt: skip
        self.ema = ModelEma(self.model, length.ema_decay, length.ema_ramp, average_buffers=length.average_buffers)
        progress = Progress()
        self.compute, scaler = _precision(device, precision)
        self.state = RunState(
            self.model, self.ema, self.optimizer, scaler, 100, progress, RunningLoss(device, progress)
        )
        self.loss = DetectionLoss(self.model, recipe.loss, size, "ota")
        settings = StepSettings(
            image_size=size, stride=64, seed=0, multi_scale=False, quad=False, lr0=recipe.optimizer.lr0, clip_norm=0.0,
            momentum=True, betas=True, schedule_free=False,
        )  # fmt: skip
        self.step = TrainStep(
            settings, self.compute, World(), self.model, self.loss, schedule, self.state, RunDir(Path("never-written"))
        )

    def set_precision(self, precision: str) -> None:
        """Go on in another one."""
        self.compute, self.state.scaler = _precision(self.compute.device, precision)
        self.step.compute = self.compute

    def count_in_phases(self, gpu: Any) -> None:
        """Let ``gpu``, a PretendCuda or alike, count the iteration's parts under their names."""
        self.step.network = gpu.within("forward", self.step.network)
        self.step.loss = gpu.within("loss", self.step.loss)
        self.optimizer.step = gpu.within("optimizer", self.optimizer.step)  # type: ignore[method-assign]
        self.ema.update = gpu.within("ema", self.ema.update)  # type: ignore[method-assign]

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[Tensor]:
        """The averaged model's detections, as a validation finds them."""
        images = batch.images.to(self.compute.device, non_blocking=True).float() / 255
        with self.compute.autocast():
            decoded, _ = self.ema.module(images.contiguous(memory_format=torch.channels_last))
        return non_max_suppression(decoded, 0.001, 0.65)


def _precision(device: torch.device, name: str) -> tuple[Compute, torch.amp.GradScaler]:
    amp = PRECISIONS[name]
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16, init_scale=1024.0)
    return Compute(device, amp, ""), scaler
