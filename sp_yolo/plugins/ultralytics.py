"""SPTrainer: ultralytics' detection trainer with SP, through its documented ``build_optimizer`` only."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.optim import SP, build_param_groups

try:
    from ultralytics.models.yolo.detect import DetectionTrainer
except ImportError as error:
    raise EnvironmentFault(f"SPTrainer needs ultralytics, which cannot be imported: {error}") from error

# The host's word for what a group holds; its warm-up gives "bias" another learning rate.
_HOST_GROUP = {"backbone": "weight", "head": "weight", "bias": "bias", "norm": "bn"}


class ResumableSP(SP):
    """SP whose state survives a checkpoint that rounds it to half precision, as the host's does."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As SP's, widened to float32. The last displacement is forgotten: rounded to half it is mostly zeros."""
        state = {
            key: {name: _widened(name, value) for name, value in entry.items()}
            for key, entry in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})


def _widened(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype == torch.half:
        value = value.float()
    return value * 0 if name.startswith("displacement") else value


class SPTrainer(DetectionTrainer):
    """``YOLO(...).train(trainer=SPTrainer)``; other settings of SP: a subclass with its own ``sp``.

    lr0, momentum, weight_decay and the number of optimizer steps are the host's. ``sp`` takes SP's arguments,
    ``sigma_backbone`` and ``sigma_head``.
    """

    sp: ClassVar[dict[str, Any]] = {}

    def build_optimizer(
        self,
        model: torch.nn.Module,
        name: str = "auto",
        lr: float = 0.001,
        momentum: float = 0.9,
        decay: float = 1e-5,
        iterations: float = 1e5,
    ) -> SP:
        """SP over backbone, head, bias and norm; the backbone's length is taken from the model's own cfg.

        Raises:
            UserError: another optimizer was asked for by name.
        """
        if name != "auto":
            raise UserError(f"optimizer={name}: SPTrainer trains with SP; drop one of the two")
        settings = {"lr": lr, "momentum": momentum, "total_steps": max(1, int(iterations)), **self.sp}
        of_groups = {key: settings.pop(key) for key in ("sigma_backbone", "sigma_head") if key in settings}
        cfg: Any = model.yaml
        groups = build_param_groups(model, weight_decay=decay, backbone=len(cfg["backbone"]), **of_groups)
        for group in groups:
            group["param_group"] = _HOST_GROUP[group["name"]]
        counts = ", ".join(f"{len(group['params'])} {group['name']}" for group in groups)
        print(f"SP in place of the host's optimizer: {counts} tensors; {settings}")
        return ResumableSP(groups, **settings)
