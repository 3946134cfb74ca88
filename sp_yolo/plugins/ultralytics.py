"""SPTrainer: ultralytics' trainers with SP, by what they document for subclasses: build_optimizer, save_model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.optim import DEFAULTS
from sp_yolo.plugins.generic import swapped
from sp_yolo.plugins.host_sp import HostSP, Terms
from sp_yolo.plugins.record import write_record

try:
    from ultralytics.models import yolo
except ImportError as error:
    raise EnvironmentFault(f"SPTrainer needs ultralytics, which cannot be imported: {error}") from error

_TRAINERS = {
    "detect": yolo.detect.DetectionTrainer,
    "segment": yolo.segment.SegmentationTrainer,
    "pose": yolo.pose.PoseTrainer,
    "obb": yolo.obb.OBBTrainer,
    "classify": yolo.classify.ClassificationTrainer,
}
# In place of the host's own, which suit its SGD; its "auto" leaves them aside as well. SP warms biases as all else.
_DEFAULTS = {
    "lr0": DEFAULTS["lr"],
    "momentum": DEFAULTS["momentum"],
    "weight_decay": DEFAULTS["weight_decay"],
    "warmup_bias_lr": 0.0,
}


class ResumableSP(HostSP):
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


class SPTrainer:
    """``YOLO(...).train(trainer=SPTrainer)``, for every task; other settings of SP: a subclass with its own ``sp``.

    ``sp`` takes SP's arguments, ``sigma_backbone``, ``sigma_head`` and ``backbone``. lr0, momentum and weight_decay are
    SP's own where they are not given; the number of optimizer steps and all else are the host's.
    """

    sp: ClassVar[dict[str, Any]] = {}

    def __new__(cls, cfg: Any = None, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> SPTrainer:
        """A trainer of the class that the host has for the model's task.

        Raises:
            UserError: no trainer is known for the task.
        """
        task = (overrides or {}).get("task", "detect")
        if task not in _TRAINERS:
            raise UserError(f"task={task}: SPTrainer trains {', '.join(_TRAINERS)}; use swap_optimizer around train()")
        if issubclass(cls, _TRAINERS[task]):
            return super().__new__(cls)
        # Under the name of the class that the user chose: the host's processes on several GPUs import it by that.
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        return super().__new__(type(cls.__name__, (cls, _TRAINERS[task]), names))

    def __init__(self, cfg: Any = None, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        given = {"overrides": {**_DEFAULTS, **(overrides or {})}, "_callbacks": _callbacks}
        super().__init__(**given if cfg is None else {"cfg": cfg, **given})

    def build_optimizer(
        self,
        model: torch.nn.Module,
        name: str = "auto",
        lr: float = 0.001,
        momentum: float = 0.9,
        decay: float = 1e-5,
        iterations: float = 1e5,
    ) -> torch.optim.Optimizer:
        """SP over the groups that the host makes for SGD.

        Raises:
            UserError: another optimizer was asked for by name.
        """
        if name != "auto":
            raise UserError(f"optimizer={name}: SPTrainer trains with SP; drop one of the two")
        network = getattr(model, "module", model)
        length = {"total_steps": max(1, int(iterations))}
        terms = Terms(self.sp, print, strict=True, fallback=length, network=network)
        host: Any = super()
        with swapped(("SGD",), terms, base=ResumableSP):
            optimizer: torch.optim.Optimizer = host.build_optimizer(model, "SGD", lr, momentum, decay, iterations)
        return optimizer

    def save_model(self) -> Any:
        """As the host's; SP's settings, gamma and sparsity go into the run's folder beside it."""
        host: Any = super()
        saved = host.save_model()
        trainer: Any = self
        self.progress = write_record(trainer.save_dir, trainer.optimizer)
        return saved

    def final_eval(self) -> None:
        """As the host's, and a line on SP."""
        host: Any = super()
        host.final_eval()
        print(getattr(self, "progress", "SP: no checkpoint was saved"))
