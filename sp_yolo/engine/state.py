"""The state of a run: everything that changes while it trains, and how a checkpoint holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from sp_yolo import __version__
from sp_yolo.engine.ema import ModelEma
from sp_yolo.engine.progress import Progress, RunningLoss
from sp_yolo.errors import UserError
from sp_yolo.models import DetectionModel, description

# What a checkpoint holds: tensors, numbers and words by name.
Content = dict[str, Any]

# Needed to go on, with the type of each; finished weights lack the optimizer.
_RESUMABLE = {
    **dict.fromkeys(("config", "hyp", "yaml", "model", "ema", "optimizer", "scaler", "progress"), dict),
    **dict.fromkeys(("nc", "ema_updates", "batches_per_epoch"), int),
}


@dataclass
class RunState:
    """No randomness is kept: it is folded from (seed, epoch, index), and ``progress`` says where the run stands."""

    model: DetectionModel
    ema: ModelEma[DetectionModel]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches_per_epoch: int
    progress: Progress
    losses: RunningLoss

    def finished_weights(self, told: Content) -> Content:
        """The averaged weights with what belongs to them: plain tensors, numbers and words.

        ``told``: "config" and "hyp" of the run, as opt.yaml and hyp.yaml have them.
        """
        return {
            **json.loads(json.dumps(description(self.model))),
            "version": __version__,
            **json.loads(json.dumps(told)),
            "ema": self.ema.module.state_dict(),
            "ema_updates": self.ema.updates,
            "progress": self.progress.state(),
        }

    def everything(self, told: Content) -> Content:
        """All that the run needs to go on from the next iteration."""
        self.losses.store(self.progress)
        return {
            **self.finished_weights(told),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batches_per_epoch": self.batches_per_epoch,
        }

    def restore(self, content: Content, where: str, updates: int) -> str:
        """Take over ``content`` of :meth:`everything`, read from ``where``. ``updates``: steps of the whole run.

        Returns a line to say, or "": a run may go on in another precision, where another device chooses it.

        Raises:
            UserError: it belongs to other data, or to another version of this program.
        """
        if content["batches_per_epoch"] != self.batches_per_epoch:
            raise UserError(
                f"--resume {where}: the training data have changed: {self.batches_per_epoch} batches per epoch, "
                f"{content['batches_per_epoch']} when the run was saved; --weights starts a new run from it"
            )
        try:
            self.model.load_state_dict(content["model"])
            self.ema.module.load_state_dict(content["ema"])
            self.ema.updates = content["ema_updates"]
            self.optimizer.load_state_dict(content["optimizer"])
            words = self._restore_scaler(content["scaler"])
            self.progress = Progress(**content["progress"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--resume {where}: does not fit this version of the program: {reason}") from None
        for group in self.optimizer.param_groups:
            if "total_steps" in group:
                group["total_steps"] = updates  # a larger --epochs stretches the sparsity ramp too
        self.losses = RunningLoss(self.losses.sums.device, self.progress)
        return words

    def _restore_scaler(self, saved: Content) -> str:
        """Take over a loss scale; a line where only one of the run saved and this one has any. A new one starts high
        and is halved until it fits, at the price of a few steps."""
        if saved and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved)
        elif saved:
            return "the run was saved in float16 and goes on without: its loss scale is dropped"
        elif self.scaler.is_enabled():
            return "the run was saved without float16 and goes on with it: its loss scale starts anew"
        return ""


def check_resumable(content: Content, where: str) -> None:
    """Raises UserError unless a run can go on from ``content``."""
    if "optimizer" not in content:
        raise UserError(
            f"--resume {where}: holds finished weights only; use weights/last.pt, or --weights to fine-tune"
        )
    for key, kind in _RESUMABLE.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"--resume {where}: written by another version of this program: no {key} in it")
