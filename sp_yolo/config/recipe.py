"""Hyperparameters: what each may be, recipe files, and the ``--set`` that overrides them."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sp_yolo.config.files import find_file, read_scalar, read_yaml
from sp_yolo.errors import UserError


@dataclass(frozen=True)
class Rule:
    """What one hyperparameter may be: its default, bounds (inclusive), and the words allowed instead of a number."""

    default: float | str
    low: float = -math.inf
    high: float = math.inf
    words: tuple[str, ...] = ()
    whole: bool = False

    def check(self, value: Any) -> float | int | str:
        """``value`` as the type the key has; raises ValueError with the rule that it breaks."""
        if isinstance(value, str) and value in self.words:
            return value
        number_allowed = not self.words or self.low != -math.inf or self.high != math.inf
        text = " or ".join(repr(word) for word in self.words)
        if not number_allowed:
            raise ValueError(f"must be {text}")
        kind = "a whole number" if self.whole else "a number"
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not abs(value) < math.inf or (self.whole and value != int(value)):
            raise ValueError(f"must be {kind}{' or ' + text if text else ''}")
        if not self.low <= value <= self.high:
            raise ValueError(f"must lie in [{self.low:g}, {self.high:g}]")
        try:
            return int(value) if self.whole else float(value)
        except OverflowError:
            raise ValueError("is too large for a number") from None


_AUTO = ("auto",)

# The original's keys with the meaning of the functional specification §4.11, then ours.
HYP_RULES: dict[str, Rule] = {
    "lr0": Rule(0.01, 0.0, 100.0),
    "lrf": Rule(0.1, 0.0, 1.0),
    "momentum": Rule(0.937, 0.0, 0.9999),
    "weight_decay": Rule(0.0005, 0.0, 1.0),
    "warmup_epochs": Rule(3.0, 0.0, 1e4, _AUTO),
    "warmup_momentum": Rule(0.8, 0.0, 0.9999),
    "warmup_bias_lr": Rule(0.1, 0.0, 100.0),
    "box": Rule(0.05, 0.0, 1e3),
    "cls": Rule(0.5, 0.0, 1e3),
    "cls_pw": Rule(1.0, 0.0, 1e3),
    "obj": Rule(1.0, 0.0, 1e3),
    "obj_pw": Rule(1.0, 0.0, 1e3),
    "iou_t": Rule(0.2, 0.0, 1.0),
    "anchor_t": Rule(4.0, 1.0, 100.0),
    "anchors": Rule(0, 0, 20, whole=True),
    "fl_gamma": Rule(0.0, 0.0, 10.0),
    "label_smoothing": Rule(0.0, 0.0, 0.9999),
    "hsv_h": Rule(0.015, 0.0, 1.0),
    "hsv_s": Rule(0.7, 0.0, 1.0),
    "hsv_v": Rule(0.4, 0.0, 1.0),
    "degrees": Rule(0.0, 0.0, 180.0),
    "translate": Rule(0.1, 0.0, 1.0),
    "scale": Rule(0.5, 0.0, 1.0),
    "shear": Rule(0.0, 0.0, 89.0),
    "perspective": Rule(0.0, 0.0, 0.01),
    "flipud": Rule(0.0, 0.0, 1.0),
    "fliplr": Rule(0.5, 0.0, 1.0),
    "mosaic": Rule(1.0, 0.0, 1.0),
    "mixup": Rule(0.0, 0.0, 1.0),
    "copy_paste": Rule(0.0, 0.0, 1.0),
    "paste_in": Rule(0.0, 0.0, 1.0),
    "loss_ota": Rule(1, 0, 1, whole=True),
    "nominal_batch": Rule("auto", 1, 65536, _AUTO, whole=True),
    "ema_decay": Rule("auto", 0.0, 1.0, _AUTO),
    "ema_ramp": Rule("auto", 1.0, 1e6, _AUTO),
    "clip_norm": Rule(0.0, 0.0, 1e9),
    "sp_mode": Rule("robust", words=("robust", "paper")),
    "sp_metric": Rule("fisher", words=("fisher", "none")),
    "sp_saliency": Rule("fisher", words=("fisher", "metric")),
    "sp_sigma_backbone": Rule(0.0, 0.0, 0.99),
    "sp_sigma_head": Rule(0.0, 0.0, 0.99),
    "sp_every": Rule(10, 1, 1e6, whole=True),
    "sp_start": Rule(0.1, 0.0, 1.0),
    "sp_end": Rule(0.65, 0.0, 1.0),
    "sp_rho": Rule(0.9, 0.0, 0.9999),
    "sp_rcap": Rule(0.0, 0.0, 2.0),
}
# Keys of recipes before version 0.2, and what to do about them.
FORMER = {
    "sp_damping": "write sp_metric: fisher (the default) or none",
    "sp_gamma_start": "drop it: SP finds its first step by itself",
}

Hyp = Mapping[str, Any]


def _check_hyp(key: str, value: Any, where: str) -> Any:
    if key in FORMER:
        raise UserError(f"{where}: {key} is of an earlier version: {FORMER[key]}")
    if key not in HYP_RULES:
        near = difflib.get_close_matches(str(key), HYP_RULES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{where}: unknown hyperparameter {repr(key)[:80]}{hint}")
    try:
        return HYP_RULES[key].check(value)
    except ValueError as error:
        raise UserError(f"{where}: {key} = {repr(value)[:80]}: {error}") from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["lr0=0.1", ...]`` of the command line's ``--set`` as a dict; values are read like YAML scalars.

    Raises:
        UserError: an item is not of the form KEY=VALUE.
    """
    result: dict[str, Any] = {}
    for item in assignments:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"--set {' '.join(item.split())[:80]}: expected KEY=VALUE")
        result[key] = text
        if key != "root":  # a path, whatever it looks like
            with contextlib.suppress(ValueError):  # what looks like a list or a date and is none
                result[key] = read_scalar(text)
    return result


def load_hyp(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The hyperparameters of a recipe file, completed by defaults, with ``overrides`` (of ``--set``) on top.

    Raises:
        UserError: unknown or duplicate key, a value of the wrong type or out of its bounds; names file and line.
    """
    source = read_yaml(find_file(path, "hyp"))
    hyp: dict[str, Any] = {key: rule.default for key, rule in HYP_RULES.items()}
    for key, value in source.items():
        hyp[key] = _check_hyp(key, value, source.where(key))
    for key, value in (overrides or {}).items():
        hyp[key] = _check_hyp(key, value, "--set")
    if hyp["sp_start"] >= hyp["sp_end"]:
        raise UserError(f"{source.path}: sp_start = {hyp['sp_start']} must be below sp_end = {hyp['sp_end']}")
    return hyp
