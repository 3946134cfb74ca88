"""SP inside an untouched checkout of YOLOv7 or a relative: `sp-yolo yolov7 DIR -- ...` and `patch_yolov7`.

The host builds its optimizer as ``torch.optim.SGD`` (or Adam, AdamW), looked up when called. While its script runs,
that name is SP. What its tensors are is read from the network that holds them.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.plugins import compat as patches
from sp_yolo.plugins.checkout import Host, find_host, process_state
from sp_yolo.plugins.epochs import counted_epochs
from sp_yolo.plugins.generic import swapped
from sp_yolo.plugins.host_sp import HostSP, Terms
from sp_yolo.plugins.record import recorded
from sp_yolo.plugins.settings import check_settings

_REPLACED = ("SGD", "Adam", "AdamW")
_NAMES = "torch.optim." + ", ".join(_REPLACED[:-1]) + f" or {_REPLACED[-1]}"
_ELSE = "SP is not in use; for a loop of your own see swap_optimizer in docs/plugins.md"


class Built:
    """The optimizers that a host has built: how many, and the last one while it lives. None is kept alive."""

    def __init__(self, terms: Terms) -> None:
        self.count = 0
        self.terms = terms
        self._last: weakref.ref[HostSP] | None = None

    def note(self, optimizer: HostSP) -> None:
        self.count += 1
        self._last = weakref.ref(optimizer)

    @property
    def optimizer(self) -> HostSP | None:
        return self._last() if self._last else None

    def device(self) -> torch.device | None:
        """Where the network being trained is."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return next((param.device for group in groups for param in group["params"]), None)


@contextmanager
def patch_yolov7(
    directory: str | Path,
    *,
    script: str = "train.py",
    compat: bool = True,
    resume: bool = False,
    report: Callable[[str], None] = print,
    **settings: Any,
) -> Iterator[Built]:
    """Inside the block the trainer in ``directory`` trains with SP; afterwards everything global is as before.

    ``settings``: SP's, ``sigma_backbone``, ``sigma_head`` and ``backbone``, the number of its rows; momentum, weight
    decay and lr are the host's unless given. ``compat``: also make the host run on today's torch and numpy. ``resume``:
    settings that are not given are those of the run whose checkpoint is loaded. ``report`` gets the summary of the
    groups, a line at a time. Yields the optimizers built so far (``.count``, ``.optimizer``). Restored: torch.optim and
    its schedulers, torch.load, torch.save, torch.tensor and indexing, numpy, random, argparse, sys.path, sys.argv,
    sys.modules (the host's are dropped), os.environ.

    Raises:
        UserError: as ``find_host``; a setting that SP refuses. Later, from within the host: an optimizer built another
            way, groups that do not hold each of the network's parameters once, a warm-up of weights as of biases.
    """
    host = find_host(directory, script)
    check_settings(settings)
    terms = Terms(settings, report, strict=True)
    built = Built(terms)
    with ExitStack() as stack:
        stack.enter_context(process_state(host))
        if compat:
            stack.enter_context(patches.modern_stack(built.device))
        stack.enter_context(counted_epochs(terms))
        stack.enter_context(recorded(terms, resume, lambda: built.optimizer))
        stack.enter_context(swapped(_REPLACED, terms, built.note))
        if compat:  # the host's own code is imported last: what it imports by name from torch.optim is SP by now
            stack.enter_context(patches.local_weights(_downloaders(host)))
        stack.callback(register_optimizer_step_pre_hook(_only_ours).remove)
        yield built


def _downloaders(host: Host) -> list[ModuleType]:
    """The host's modules that fetch missing weights.

    Raises:
        EnvironmentFault: one of them needs a package that is missing.
    """
    found = []
    for name in ("google_utils", "downloads"):
        if (host.directory / "utils" / f"{name}.py").is_file():
            with _missing_packages(host):
                found.append(importlib.import_module(f"{host.package}.utils.{name}".removeprefix(".")))
    return found


@contextmanager
def _missing_packages(host: Host) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise EnvironmentFault(f"{host.directory}: it needs a package that is missing: {error}") from error


def _only_ours(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A hook of every optimizer's step: a host that built its own some other way must not train unnoticed."""
    if not isinstance(optimizer, HostSP):
        kind = type(optimizer)
        raise UserError(f"the host trains with {kind.__module__}.{kind.__name__}, not built as {_NAMES}: {_ELSE}")


def run_script(
    directory: str | Path,
    arguments: Sequence[str],
    *,
    script: str = "train.py",
    compat: bool = True,
    report: Callable[[str], None] = print,
    **settings: Any,
) -> int:
    """Run the host's ``script`` as ``__main__`` inside ``patch_yolov7``; returns its exit code.

    Raises: as ``patch_yolov7``, and whatever the host raises.
    """
    host = find_host(directory, script)
    resume = any(word.split("=")[0] == "--resume" for word in arguments)
    with ExitStack() as stack:
        built = stack.enter_context(
            patch_yolov7(directory, script=script, compat=compat, resume=resume, report=report, **settings)
        )
        if compat and any(word.startswith("--evolve") for word in arguments):
            stack.enter_context(patches.evolvable_hyp())
        given = patches.host_arguments(arguments, os.environ) if compat and host.trains else list(arguments)
        sys.argv[:] = [str(host.script), *given]
        code = _run(host)
        if host.trains and not code:
            _check_used(host, built)
            if built.terms.progress:
                report(built.terms.progress)
    return code


def _run(host: Host) -> int:
    """The script's exit code."""
    try:
        with _missing_packages(host):
            if host.package:
                runpy.run_module(host.module, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(host.script), run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _check_used(host: Host, built: Built) -> None:
    """UserError where the script ended without SP."""
    if not built.count:
        raise UserError(f"{host.script}: it ended without building {_NAMES}: {_ELSE}")
    if not built.terms.stepped:
        raise UserError(f"{host.script}: it ended without one step of its optimizer: nothing was trained")
