"""The frozen configuration of one training run."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sp_yolo.errors import UserError

OPTIMIZERS = ("sp", "sgd", "adam", "adamw")


@dataclass(frozen=True)
class Config:
    """One training run: the original's flags under their own names, then ours; `train_sp.py --help` explains each."""

    weights: str = ""
    cfg: str | Mapping[str, Any] = ""
    data: str = "data/toy.yaml"
    hyp: str = ""
    epochs: int = 0
    batch_size: int = 0
    img_size: tuple[int, int] = (0, 0)
    rect: bool = False
    resume: str | bool = False
    nosave: bool = False
    notest: bool = False
    noautoanchor: bool = False
    cache_images: str = ""
    image_weights: bool = False
    device: str = ""
    multi_scale: bool = False
    single_cls: bool = False
    sync_bn: bool = False
    workers: int = 8
    project: str = "runs/train"
    name: str = "exp"
    exist_ok: bool = False
    quad: bool = False
    linear_lr: bool = False
    label_smoothing: float = 0.0
    save_period: int = -1
    save_every: float = 10.0
    freeze: tuple[int, ...] = (0,)
    optimizer: str = "sp"
    patience: int = 0
    seed: int = 0
    amp: str = "auto"
    compile: bool = False
    quiet: bool = False
    compat: bool = False
    accept_losses: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, as written to opt.yaml; ``Config(**as_dict())`` gives the same run back."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def load_config(**options: Any) -> Config:
    """A checked :class:`Config` from the names of its fields; lists become tuples.

    Raises:
        UserError: an unknown option, or a value outside its rule.
    """
    known = {entry.name for entry in dataclasses.fields(Config)}
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"unknown option {key!r}{f' (did you mean {near[0]!r}?)' if near else ''}")
    for key in ("img_size", "freeze"):
        if isinstance(options.get(key), int):
            options[key] = (options[key],)
        if key in options:
            options[key] = tuple(options[key])
    if len(options.get("img_size", ())) == 1:
        options["img_size"] *= 2
    if options.get("compat") and "optimizer" not in options:
        options["optimizer"] = "sgd"
    if options.get("optimizer", "").lower() in OPTIMIZERS:
        options["optimizer"] = options["optimizer"].lower()  # SGD is ours with its momentum, not torch's bare one
    config = Config(**options)
    rules = [
        (config.epochs >= 0, "--epochs", config.epochs, "must be at least 1"),
        (config.batch_size >= 0, "--batch-size", config.batch_size, "must be at least 1"),
        (len(config.img_size) == 2, "--img-size", config.img_size, "takes one or two sizes (train, test)"),
        (all(0 <= size <= 8192 for size in config.img_size), "--img-size", config.img_size, "must lie in 32..8192"),
        (config.cache_images in ("", "ram", "disk"), "--cache-images", config.cache_images, "must be ram or disk"),
        (config.workers >= 0, "--workers", config.workers, "must be 0 or more"),
        (config.amp in ("auto", "off", "bf16", "fp16"), "--amp", config.amp, "must be auto, off, bf16 or fp16"),
        (0 <= config.save_every < 1e6, "--save-every", config.save_every, "must be minutes, or 0 for off"),
        (config.patience >= 0, "--patience", config.patience, "must be 0 (off) or more"),
        (0 <= config.label_smoothing < 1, "--label-smoothing", config.label_smoothing, "must lie in [0, 1)"),
        (all(layer >= 0 for layer in config.freeze), "--freeze", config.freeze, "must be 0 or more"),
        (0 <= config.seed < 2**32, "--seed", config.seed, "must lie in 0..2^32-1"),
    ]
    for good, flag, value, rule in rules:
        if not good:
            raise UserError(f"{flag} {value}: {rule}")
    return config
