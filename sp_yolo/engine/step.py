"""One training iteration: forward, loss, backward, the look for NaN and, where the schedule says so, a step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from sp_yolo.data import Batch
from sp_yolo.engine.finite import FiniteWatch, norms
from sp_yolo.engine.inputs import rescale, to_input
from sp_yolo.engine.optimizer import set_rates
from sp_yolo.engine.progress import PARTS
from sp_yolo.engine.schedule import Schedule, StepPlan
from sp_yolo.engine.state import RunState
from sp_yolo.errors import NonFiniteError, StorageError
from sp_yolo.losses import DetectionLoss, LossParts
from sp_yolo.optim import SP
from sp_yolo.runtime.checkpoint import LAST
from sp_yolo.runtime.device import Compute
from sp_yolo.runtime.distributed import World, unexchanged
from sp_yolo.runtime.folder import RunDir

SMALLEST_SCALE = 2.0**-14  # of a float16 loss: when halving got here, it was not the scale that made gradients infinite


@dataclass(frozen=True)
class StepSettings:
    """``image_size`` px and ``stride``, of which the sizes of ``multi_scale`` are multiples; ``seed`` draws them.

    ``clip_norm``: 0 does not clip. ``momentum``, ``betas``: whether the schedule sets the optimizer's.
    ``schedule_free``: the optimizer averages the weights itself.
    """

    image_size: int
    stride: int
    seed: int
    multi_scale: bool
    quad: bool
    lr0: float
    clip_norm: float
    momentum: bool
    betas: bool
    schedule_free: bool


class TrainStep:
    """Called with a batch; moves ``state`` one iteration on. What is not finite is kept in the folder ``run``."""

    def __init__(
        self,
        settings: StepSettings,
        compute: Compute,
        world: World,
        network: torch.nn.Module,
        loss: DetectionLoss,
        schedule: Schedule,
        state: RunState,
        run: RunDir,
    ) -> None:
        self.settings, self.compute, self.world, self.network = settings, compute, world, network
        self.loss, self.schedule, self.state, self.run = loss, schedule, state, run
        self.watch = FiniteWatch(self._refuse)
        self._trained = [(name, each) for name, each in state.model.named_parameters() if each.requires_grad]

    def __call__(self, batch: Batch) -> bool:
        """Train on ``batch``. True after an optimizer step, False while gradients are being summed.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite; on a GPU possibly in one of the next iterations.
        """
        settings, iteration = self.settings, self.state.progress.iteration
        groups = self.state.optimizer.param_groups
        plan = self.schedule.at(iteration, {group["name"]: settings.lr0 for group in groups})
        images = to_input(batch.images, self.compute)
        if settings.multi_scale:
            images = rescale(images, settings.image_size, settings.stride, settings.seed, iteration)
        # Gradients are exchanged once per optimizer step, not once per accumulated batch.
        with contextlib.nullcontext() if plan.update else unexchanged(self.network):
            with self.compute.autocast():
                raw_maps = self.network(images)
                loss, parts = self.loss(raw_maps, batch.targets, (images.shape[2], images.shape[3]))
            self.state.scaler.scale(loss * self.world.size * (4 if settings.quad else 1)).backward()
        self._look(parts, batch)
        self.state.losses.add(parts)
        if plan.update:
            self._update(plan)
            self._look_at_scale(batch)
        self.state.progress.iteration += 1
        return plan.update

    def _look(self, parts: LossParts, batch: Batch) -> None:
        """Are the losses and gradients of this batch finite? With float16 the scaler judges the gradients."""
        names = [f"{part} loss" for part in PARTS]
        values = torch.stack([getattr(parts, part).detach().float().reshape(()) for part in PARTS])
        found = [(name, each.grad) for name, each in self._trained if each.grad is not None]
        if found and not self.state.scaler.is_enabled():
            names += [f"gradient of {name}" for name, _ in found]
            values = torch.cat((values, norms([gradient for _, gradient in found if gradient is not None])))
        self.watch.look(names, values, self.state.progress.iteration, batch)

    def _look_at_scale(self, batch: Batch) -> None:
        """With float16: has the loss scale been halved so often that it cannot be to blame?"""
        scaler = self.state.scaler
        if scaler.is_enabled():
            # get_scale() would wait for the GPU.
            scale = scaler.scale(torch.ones(1, device=self.compute.device))
            lost = scale.masked_fill(scale < SMALLEST_SCALE, torch.nan)
            self.watch.look(["gradient at every float16 loss scale"], lost, self.state.progress.iteration, batch)

    def _update(self, plan: StepPlan) -> None:
        """Step, and move the average on. A step that float16 skips counts as one: the schedule follows the iteration,
        and the average moves towards weights that have stayed as they were."""
        state = self.state
        set_rates(state.optimizer, plan, momentum=self.settings.momentum, betas=self.settings.betas)
        if self.settings.clip_norm:
            state.scaler.unscale_(state.optimizer)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), self.settings.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if not self.settings.schedule_free:
            state.ema.update(state.model, state.optimizer.masks() if isinstance(state.optimizer, SP) else None)

    def _refuse(self, bad: list[str], iteration: int, batch: Batch) -> NoReturn:
        """Keep the batch, name what was wrong. A NaN loss makes every gradient NaN: then only the losses are named."""
        bad = [name for name in bad if name.endswith("loss")] or bad
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        paths = [meta.path for meta in batch.metas]
        rank = f"_rank{self.world.rank}" if self.world.size > 1 else ""
        name = f"nonfinite_{iteration:06d}{rank}.npz"
        kept = f"kept in {self.run.path / name}"
        try:
            self.run.write_arrays(name, images=batch.images.cpu().numpy(), targets=batch.targets.numpy(), paths=paths)
        except StorageError as error:
            kept = f"not kept ({error})"
        when = "before the step" if self.compute.device.type == "cpu" else "before anything was saved"
        shown = ", ".join(Path(path).name for path in paths[:4]) + (", ..." if len(paths) > 4 else "")
        raise NonFiniteError(
            f"{', '.join(bad[:3])}{more} not finite at iteration {iteration}, stopped {when}; batch of {shown} {kept}; "
            f"a new run from --weights {self.run.weights / LAST} with a smaller lr0 (now {self.settings.lr0:g}) may "
            "help"
        )
