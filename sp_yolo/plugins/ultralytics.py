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
    """SP whose state survives a checkpoint that rounds it to half precision, as the host's does.

    E[g^2] does not fit into half precision, its root does once it is divided by its largest element.
    """

    def state_dict(self) -> dict[str, Any]:
        """As SP's, but "square_avg" is a root between 0 and 1 and "square_scale" what it was divided by."""
        content = super().state_dict()
        return {**content, "state": {key: _rooted(entry) for key, entry in content["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As SP's, widened to float32. The last displacement is forgotten: rounded to half it is mostly zeros."""
        super().load_state_dict(
            {**state_dict, "state": {key: _widened(entry) for key, entry in state_dict["state"].items()}}
        )


def _rooted(entry: dict[str, Any]) -> dict[str, Any]:
    if "square_avg" not in entry:
        return entry
    root = entry["square_avg"].sqrt()
    scale = max(float(root.max()), torch.finfo(root.dtype).tiny) if root.numel() else 1.0
    return {**entry, "square_avg": root / scale, "square_scale": scale}


def _widened(entry: dict[str, Any]) -> dict[str, Any]:
    wide = {n: v.float() if isinstance(v, torch.Tensor) and v.dtype == torch.half else v for n, v in entry.items()}
    scale = wide.pop("square_scale", None)
    if scale is not None:
        wide["square_avg"] = (wide["square_avg"] * scale).square()
    return {n: v * 0 if n in ("displacement", "secant") else v for n, v in wide.items()}


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
