"""SP's settings as a host's user gives them: ``KEY=VALUE`` words, and which keys there are."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch

from sp_yolo.errors import UserError
from sp_yolo.optim import DEFAULTS, SP

OF_ROLES = {"sigma_backbone": 0.0, "sigma_head": 0.0}
# Set by the host (its hyp file, its schedule), or of no use in its loop.
_OF_HOST = ("momentum", "nesterov", "weight_decay")
_UNUSED = ("sigma", "maximize", "capturable", "differentiable", "foreach", "native", "check_finite")
OF_SP = {name: value for name, value in DEFAULTS.items() if name not in (*_OF_HOST, *_UNUSED)}
SETTINGS: dict[str, Any] = {**OF_SP, **OF_ROLES, "backbone": None}


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """``["lr=0.1", "held=false"]`` -> ``{"lr": 0.1, "held": False}``.

    Raises:
        UserError: no ``=``, an unknown key, one that is the host's, or a value of another type than the setting's.
    """
    settings = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(
                f"--sp {assignment}: expected KEY=VALUE (DIR comes before --sp, the host's arguments after --)"
            )
        _check_name(name)
        settings[name] = _value(assignment, text, SETTINGS[name])
    return settings


def _check_name(name: str) -> None:
    if name in _OF_HOST:
        raise UserError(f"--sp {name}: set by the host's own hyp file")
    if name not in SETTINGS:
        raise UserError(f"--sp {name}: no such setting; known: {', '.join(sorted(SETTINGS))}")


def _value(assignment: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() in words:
            return words[text.lower()]
        raise UserError(f"--sp {assignment}: expected true or false")
    try:
        value = ast.literal_eval(text)
        if isinstance(default, float):
            return float(value)
        if isinstance(value, int):
            return value
    except (ValueError, SyntaxError, TypeError):
        pass
    kind = "a number" if isinstance(default, float) else "a whole number"
    raise UserError(f"--sp {assignment}: expected {kind}")


def check_settings(settings: dict[str, Any]) -> None:
    """UserError for a setting that SP would refuse."""
    for name in settings:
        _check_name(name)
    own = {name: value for name, value in settings.items() if name in OF_SP}
    try:
        for sigma in (settings.get(name, 0.0) for name in OF_ROLES):
            SP([torch.zeros(1)], **{"total_steps": 1, **own, "sigma": sigma})
    except (ValueError, TypeError) as error:
        raise UserError(f"--sp: {error}") from None
