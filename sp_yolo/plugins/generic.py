"""SP in place of an optimizer class, for training code that is not to be edited."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from sp_yolo.optim import DEFAULTS
from sp_yolo.optim.settings import refuse_former
from sp_yolo.plugins.host_sp import HostSP, Terms
from sp_yolo.plugins.settings import SETTINGS

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
def swap_optimizer(*names: str, **settings: Any) -> Iterator[None]:
    """Inside the block every optimizer built as ``torch.optim.NAME(...)`` is an SP over the same parameter groups.

    ``names``: classes of torch.optim, default "SGD". ``settings``: SP's arguments, ``sigma_backbone``, ``sigma_head``
    and ``backbone`` as in ``build_param_groups``. What they do not set comes from the call: lr, weight_decay, maximize,
    and the momentum, or the first of betas, where it is not 0; each group keeps the lr and the weight decay it brings.
    The class's other arguments (dampening, fused, ...) have no counterpart and are dropped. Where the tensors are those
    of one network, each gets its name and role from it; its first and last weights are not pruned. Code that imported
    the class itself before the block keeps the old one.

    Raises:
        ValueError: no class of that name in torch.optim; when an optimizer is built, a setting that SP refuses.
        TypeError: a setting that SP does not know.
        UserError: when an optimizer is built: sigma_backbone and sigma_head differ, but no network holds the tensors.
    """
    refuse_former({name: value for name, value in settings.items() if name not in {**DEFAULTS, **SETTINGS}})
    with swapped(names or ("SGD",), Terms(settings)):
        yield


@contextmanager
def swapped(
    names: tuple[str, ...],
    terms: Terms,
    built: Callable[[HostSP], None] = lambda optimizer: None,
    base: type[HostSP] = HostSP,
) -> Iterator[None]:
    """torch.optim's classes ``names`` build a ``base`` on ``terms``; each is shown to ``built``."""
    with ExitStack() as stack:
        for name in names:
            original = getattr(torch.optim, name, None)
            if not inspect.isclass(original) or not issubclass(original, torch.optim.Optimizer):
                raise ValueError(f"torch.optim has no optimizer named {name}")
            like = _called_like(original, terms, built, base)
            # In the namespace torch.optim and in the module that defines it.
            for owner in (sys.modules[original.__module__], torch.optim):
                stack.enter_context(replaced(owner, name, like))
        yield


def _called_like(original: Any, terms: Terms, built: Callable[[HostSP], None], base: type[HostSP]) -> type[HostSP]:
    """A ``base`` with the call signature of ``original``."""
    signature = inspect.signature(original)

    class Swapped(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            call: dict[str, Any] = {name: given[name] for name in ("lr", "weight_decay", "maximize") if name in given}
            momentum = given.get("momentum") or given.get("betas", (0,))[0]
            if momentum:
                call["momentum"] = momentum
            super().__init__(given["params"], call, terms, original.__name__)
            built(self)

    Swapped.__name__ = Swapped.__qualname__ = "SP"
    return Swapped
