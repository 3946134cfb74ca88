"""What one classification run is told, and what each optimizer does unless it is told otherwise."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sp_yolo.classify.models import MODELS
from sp_yolo.config import HYP_RULES
from sp_yolo.errors import UserError
from sp_yolo.optim import DEFAULTS

# name -> (name for the optimizer builder, its settings). sp has the defaults of its class, sp-paper the lr and sigma of
# its authors' example, AdamW its usual decoupled decay.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sp": ("sp", {"lr0": DEFAULTS["lr"], "weight_decay": DEFAULTS["weight_decay"]}),
    "sp-paper": ("sp", {"lr0": 1.0, "sp_mode": "paper", "sp_sigma_backbone": 0.1, "sp_sigma_head": 0.1}),
    "sgd": ("sgd", {"lr0": 0.03}),
    "adam": ("adam", {"lr0": 0.001}),
    "adamw": ("adamw", {"lr0": 0.001, "weight_decay": 0.01}),
}
_DEFAULTS = {"lrf": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "warmup_epochs": 0.0, "warmup_bias_lr": 0.0}
_GENERAL = ("lr0", *_DEFAULTS, "warmup_momentum", "label_smoothing", "clip_norm")
KEYS = (*_GENERAL, *(key for key in HYP_RULES if key.startswith("sp_")))


@dataclass(frozen=True)
class ClassifyConfig:
    """One run. ``samples``, ``val_samples``, ``label_noise``: see ``make_splits``. ``augment``: None is crop and flip
    for pictures in colour, nothing for others. ``overrides``: hyperparameters by the recipes' names."""

    dataset: str = "mnist"
    root: str = ""
    download: bool = False
    image_size: int = 32
    samples: int = 0
    val_samples: int = 0
    label_noise: float = 0.0
    model: str = "cnn"
    optimizer: str = "sp"
    epochs: int = 20
    batch_size: int = 50
    augment: bool | None = None
    seed: int = 0
    device: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def hyp(self) -> dict[str, Any]:
        """Every hyperparameter of the run: the general defaults, the optimizer's own, then ``overrides``."""
        values: dict[str, Any] = {key: HYP_RULES[key].default for key in KEYS}
        return {**values, **_DEFAULTS, **OPTIMIZERS[self.optimizer][1], **self.overrides}


def load_classify_config(**options: Any) -> ClassifyConfig:
    """A checked :class:`ClassifyConfig` from the names of its fields.

    Raises:
        UserError: an unknown option or hyperparameter, or a value outside its rule.
    """
    known = [entry.name for entry in dataclasses.fields(ClassifyConfig)]
    for key in options:
        if key not in known:
            raise UserError(f"unknown option {key!r}{_hint(key, known)}")
    config = ClassifyConfig(**options)
    optimizers = f"must be one of {', '.join(OPTIMIZERS)}"
    rules = [
        (config.optimizer in OPTIMIZERS, "--optimizer", config.optimizer, optimizers),
        (config.model in MODELS, "--model", config.model, f"must be one of {', '.join(MODELS)}"),
        (config.epochs >= 1, "--epochs", config.epochs, "must be at least 1"),
        (config.batch_size >= 2, "--batch-size", config.batch_size, "must be at least 2"),
        (config.samples >= 0, "--samples", config.samples, "must be 0 (all) or more"),
        (config.val_samples >= 0, "--val-samples", config.val_samples, "must be 0 (automatic) or more"),
        (0 <= config.label_noise <= 1, "--label-noise", config.label_noise, "must lie in [0, 1]"),
        (8 <= config.image_size <= 512, "--img-size", config.image_size, "must lie in 8..512"),
        (0 <= config.seed < 2**32, "--seed", config.seed, "must lie in 0..2^32-1"),
    ]
    for good, flag, value, rule in rules:
        if not good:
            raise UserError(f"{flag} {value}: {rule}")
    checked = {key: check_hyperparameter(key, value) for key, value in config.overrides.items()}
    return dataclasses.replace(config, overrides=checked)


def check_hyperparameter(key: str, value: Any, known: Iterable[str] = KEYS, what: str = "classification") -> Any:
    """``value`` as the type that ``key`` has; raises UserError unless it is one of ``known`` and within its rule."""
    if key not in known:
        raise UserError(f"{key!r} is no hyperparameter of {what}{_hint(key, known)}")
    try:
        return HYP_RULES[key].check(value)
    except ValueError as error:
        raise UserError(f"{key} = {value!r}: {error}") from None


def _hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
