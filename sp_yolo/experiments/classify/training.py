"""One classification run: batches by index from memory, any optimizer, the same numbers whenever it is repeated."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sp_yolo.config import OptimizerRecipe, Recipe
from sp_yolo.engine.optimizer import build_optimizer, find_optimizer, set_rates
from sp_yolo.engine.schedule import Schedule
from sp_yolo.engine.schedule_free import is_schedule_free, recompute_statistics, trained_weights
from sp_yolo.errors import NonFiniteError
from sp_yolo.experiments.classify.data import ImageSet
from sp_yolo.experiments.classify.models import build_classifier
from sp_yolo.experiments.classify.settings import ClassifyConfig
from sp_yolo.experiments.classify.splits import ORDER, Splits, generator
from sp_yolo.optim import SP
from sp_yolo.runtime.device import select_device

PADDING = 4  # px on each side, of the random crop
EVAL_BATCH = 250


@dataclass(frozen=True)
class Outcome:
    """``epochs``: one record each; ``summary``: final figures; ``model``: the trained network, in eval mode."""

    epochs: list[dict[str, Any]]
    summary: dict[str, Any]
    model: nn.Module


def fit(
    config: ClassifyConfig,
    splits: Splits,
    *,
    test: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    make_optimizer: Callable[[nn.Module, OptimizerRecipe, int], torch.optim.Optimizer] | None = None,
) -> Outcome:
    """Train a network on ``splits.train`` and measure it on the validation split after each epoch.

    Initial weights, order and augmentation follow from ``config.seed`` alone, so runs of different optimizers are
    pairs. ``test=False`` never looks at the test split: what tuning uses. ``make_optimizer(model, recipe,
    steps of the run)`` replaces the optimizer of ``config``; its groups need a "name" each.

    Raises:
        NonFiniteError: the loss became NaN or infinite; names the step.
    """
    device = select_device(config.device)
    recipe = config.recipe()
    batches = math.ceil(len(splits.train) / config.batch_size)
    schedule = _schedule(recipe, config, batches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        shape = tuple(splits.train.images.shape[1:])
        model = build_classifier(config.model, len(splits.names), shape)  # type: ignore[arg-type]
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    make = make_optimizer or functools.partial(_named, config)
    optimizer = make(model, recipe.optimizer, schedule.iterations)
    if is_schedule_free(optimizer):
        schedule = dataclasses.replace(schedule, lrf=1.0)
    momentum = make_optimizer is not None or find_optimizer(config.optimizer, config.opt).momentum
    run = _Run(config, splits, recipe, device, model, optimizer, schedule, momentum)
    started = time.perf_counter()
    records = []
    for epoch in range(config.epochs):
        records.append(run.epoch(epoch))
        if on_epoch:
            on_epoch(records[-1])
    seconds = time.perf_counter() - started
    with trained_weights(optimizer, leave=True):
        run.renew_statistics(config.epochs - 1)
    return Outcome(records, run.summary(records, seconds, test), model.eval())


def _named(
    config: ClassifyConfig, model: nn.Module, recipe: OptimizerRecipe, total_steps: int
) -> torch.optim.Optimizer:
    return build_optimizer(
        config.optimizer,
        model,
        recipe,
        weight_decay=recipe.weight_decay,
        total_steps=total_steps,
        keywords=config.opt,
    )


def _schedule(recipe: Recipe, config: ClassifyConfig, batches: int) -> Schedule:
    """Cosine from lr0 to lr0 * lrf, a step on every batch, after ``warmup_epochs`` (default none)."""
    rates = recipe.schedule
    warmup = 0 if isinstance(rates.warmup_epochs, str) else round(rates.warmup_epochs * batches)
    return Schedule(
        epochs=config.epochs,
        batches_per_epoch=batches,
        batch_size=config.batch_size,
        nominal_batch=config.batch_size,
        warmup=warmup,
        lrf=rates.lrf,
        momentum=recipe.optimizer.momentum,
        warmup_momentum=rates.warmup_momentum,
        warmup_bias_lr=rates.warmup_bias_lr,
    )


@dataclass
class _Run:
    config: ClassifyConfig
    splits: Splits
    recipe: Recipe
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    momentum: bool

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Train one pass; returns its record, the loss and accuracy on the validation split among it."""
        self.model.train()
        started = time.perf_counter()
        loss_sum, count = 0.0, 0
        for number, (images, labels) in enumerate(self._batches(epoch)):
            iteration = epoch * self.schedule.batches_per_epoch + number
            loss = self._step(iteration, self._normalised(images), labels.to(self.device))
            loss_sum += loss * len(labels)
            count += len(labels)
        rate = count / (time.perf_counter() - started)
        with trained_weights(self.optimizer):
            self.renew_statistics(epoch)
            val_loss, val_accuracy = self.measure(self.splits.val)
        return {
            "epoch": epoch,
            "train_loss": loss_sum / count,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "lr": {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups},
            "sparsity": self.optimizer.sparsity() if isinstance(self.optimizer, SP) else {},
            "images_per_second": rate,
        }

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        train, config = self.splits.train, self.config
        augmented = train.images.shape[1] == 3 if config.augment is None else config.augment
        return batches(train, config.batch_size, seed=config.seed, epoch=epoch, augmented=augmented)

    def _step(self, iteration: int, images: Tensor, labels: Tensor) -> float:
        lr0, clip_norm = self.recipe.optimizer.lr0, self.recipe.optimizer.clip_norm
        plan = self.schedule.at(iteration, {group["name"]: lr0 for group in self.optimizer.param_groups})
        set_rates(self.optimizer, plan, momentum=self.momentum, betas=self.momentum)
        logits = self.model(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.recipe.loss.label_smoothing)
        found = float(loss.detach())
        if not math.isfinite(found):
            raise NonFiniteError(f"the loss is not finite at step {iteration} (lr0 {lr0:g})")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        self.optimizer.step()
        return found

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = (value.to(self.device)[:, None, None] for value in (self.splits.mean, self.splits.std))
        pixels = images.to(self.device, torch.float32, memory_format=torch.channels_last)
        return (pixels / 255 - mean) / std

    def renew_statistics(self, epoch: int) -> None:
        """BatchNorm's, of the weights that an optimizer has averaged itself; nothing for other optimizers."""
        if is_schedule_free(self.optimizer):
            images = (self._normalised(images) for images, _ in self._batches(epoch))
            recompute_statistics(self.model, images)

    @torch.no_grad()
    def measure(self, part: ImageSet) -> tuple[float, float]:
        """Mean cross-entropy and accuracy of the network in eval mode."""
        self.model.eval()
        loss, right = 0.0, 0
        for images, labels in zip(part.images.split(EVAL_BATCH), part.labels.split(EVAL_BATCH), strict=True):
            labels = labels.to(self.device)
            logits = self.model(self._normalised(images))
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
        return loss / len(part), right / len(part)

    def summary(self, records: list[dict[str, Any]], seconds: float, test: bool) -> dict[str, Any]:
        """Final figures. Accuracies are those of the last epoch's weights: nothing is selected."""
        train_loss, train_accuracy = self.measure(self.splits.train)
        found = {"train_loss": train_loss, "train_accuracy": train_accuracy}
        found |= {key: records[-1][key] for key in ("val_loss", "val_accuracy")}
        if test:
            found["test_loss"], found["test_accuracy"] = self.measure(self.splits.test)
        return {
            **found,
            "zeros": zeros(self.model),
            "seconds": seconds,
            "optimizer_bytes": state_bytes(self.optimizer.state),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }


def batches(
    part: ImageSet, batch_size: int, *, seed: int, epoch: int, augmented: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once (uint8 [B, C, H, W]) with its label, in an order and augmented as (seed, epoch) decide."""
    stream = generator(seed, ORDER, epoch)
    for indices in torch.randperm(len(part), generator=stream).split(batch_size):
        images = part.images[indices]
        yield crop_and_flip(images, stream) if augmented else images, part.labels[indices]


def crop_and_flip(images: Tensor, stream: torch.Generator) -> Tensor:
    """uint8 [B, C, H, W], each shifted by up to PADDING px (edges repeated outwards) and mirrored half of the time."""
    count, _, height, width = images.shape
    top, left = torch.randint(-PADDING, PADDING + 1, (2, count, 1), generator=stream)
    mirrored = torch.rand(count, 1, generator=stream) < 0.5
    rows = (torch.arange(height) + top).clamp(0, height - 1)
    columns = torch.arange(width).expand(count, -1)
    columns = (torch.where(mirrored, width - 1 - columns, columns) + left).clamp(0, width - 1)
    picked = images.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def zeros(model: nn.Module) -> float:
    """Share of exact zeros among all weights of two or more dimensions."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    return sum(w.numel() - int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)


def state_bytes(state: Mapping[Any, Mapping[str, Any]]) -> int:
    """Memory of the tensors that an optimizer keeps in its ``state``."""
    tensors = [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
