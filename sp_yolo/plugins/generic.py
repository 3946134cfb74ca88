"""SP in place of an optimizer class, for training code that is not to be edited."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from sp_yolo.optim import DEFAULTS, SP
from sp_yolo.optim.settings import refuse_former

_ABSENT = object()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside the block; afterwards what it was before, or absent again."""
    # vars(), not getattr(): numpy answers for some removed names with a warning, and a class for its bases.
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def replaced_optimizer(name: str, value: type[torch.optim.Optimizer]) -> Iterator[None]:
    """torch.optim's class ``name`` is ``value``, in the namespace torch.optim and in the module that defines it."""
    with ExitStack() as stack:
        for owner in (sys.modules[getattr(torch.optim, name).__module__], torch.optim):
            stack.enter_context(replaced(owner, name, value))
        yield


@contextmanager
def swap_optimizer(*names: str, **settings: Any) -> Iterator[None]:
    """Inside the block every optimizer built as ``torch.optim.NAME(...)`` is an SP over the same parameter groups.

    ``names``: classes of torch.optim, default "SGD". ``settings``: SP's arguments. What they do not set comes from the
    call: lr, weight_decay, maximize, and momentum where the class has one and it is not 0; each group keeps the lr and
    the weight decay it brings. The class's other arguments (betas, dampening, fused, ...) have no counterpart and are
    dropped. Code that imported the class itself before the block keeps the old one.

    Raises:
        ValueError: no class of that name in torch.optim; when an optimizer is built, a setting that SP refuses.
        TypeError: a setting that SP does not know.
    """
    refuse_former({name: value for name, value in settings.items() if name not in DEFAULTS})
    with ExitStack() as stack:
        for name in names or ("SGD",):
            original = getattr(torch.optim, name, None)
            if not inspect.isclass(original) or not issubclass(original, torch.optim.Optimizer):
                raise ValueError(f"torch.optim has no optimizer named {name}")
            stack.enter_context(replaced_optimizer(name, _called_like(original, settings)))
        yield


def _called_like(original: type[torch.optim.Optimizer], settings: dict[str, Any]) -> type[SP]:
    """SP with the call signature of ``original``."""
    signature = inspect.signature(original)

    class Swapped(SP):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            given: dict[str, Any] = {
                name: call.arguments[name] for name in ("lr", "weight_decay", "maximize") if name in call.arguments
            }
            if call.arguments.get("momentum"):
                given["momentum"] = call.arguments["momentum"]
            super().__init__(call.arguments["params"], **{**given, **settings})

    Swapped.__name__ = Swapped.__qualname__ = SP.__name__
    return Swapped
