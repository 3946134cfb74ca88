"""SP inside an untouched checkout of the original YOLOv7: `sp-yolo yolov7 DIR -- ...` and `patch_yolov7`.

The host builds its optimizer as ``torch.optim.SGD``, looked up when called. While its script runs,
that name is SP, and the constructor of the host's model class notes each model, so that its unnamed tensors get their
names back by identity.
"""

from __future__ import annotations

import ast
import importlib
import os
import runpy
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.plugins import compat as patches
from sp_yolo.plugins.generic import replaced, replaced_optimizer
from sp_yolo.plugins.host_sgd import HostSGD, check_settings, host_sgd

# Top-level modules of a checkout; train.py imports test.py by the name of a package of the standard library.
_CHECKOUT_MODULES = ("models", "utils", "test")
_ADAM = "--adam: SP takes the place of the host's SGD; drop the flag, or train with Adam without sp-yolo"


@dataclass(frozen=True)
class Host:
    """A checkout (``package`` is ""), or the same trainer as an installed package."""

    directory: Path
    script: Path
    package: str

    @property
    def trains(self) -> bool:
        """Whether the script is a trainer: only then the plug-in has to find an optimizer to replace."""
        return self.script.name.startswith("train")

    @property
    def import_root(self) -> str:
        return str(self.directory.parent if self.package else self.directory)

    def module(self, name: str) -> str:
        return f"{self.package}.{name}" if self.package else name

    def owns(self, module: ModuleType) -> bool:
        file = getattr(module, "__file__", None)
        return bool(file) and Path(str(file)).resolve().is_relative_to(self.directory)


def find_host(directory: str | Path, script: str = "train.py") -> Host:
    """The trainer in ``directory``.

    Raises:
        UserError: no such folder or script, no models/yolo.py, or a training script that never mentions SGD.
    """
    root = Path(directory).resolve()
    if not root.is_dir():
        raise UserError(f"{directory}: no such folder; expected a checkout of YOLOv7")
    path = root / script
    for needed in (path, root / "models" / "yolo.py"):
        if not needed.is_file():
            raise UserError(f"{directory}: no {needed.relative_to(root)}; expected a checkout of YOLOv7")
    host = Host(root, path, root.name if (root / "__init__.py").is_file() else "")
    if host.trains and not any(_mentions_sgd(file) for file in (path, *sorted((root / "utils").rglob("*.py")))):
        raise UserError(f"{path}: neither it nor utils/ builds torch.optim.SGD, so there is nothing to replace by SP")
    return host


def _mentions_sgd(path: Path) -> bool:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return False
    names = (getattr(node, "attr", None) or getattr(node, "id", None) for node in ast.walk(tree))
    return any(name == "SGD" for name in names)


@contextmanager
def patch_yolov7(
    directory: str | Path,
    *,
    script: str = "train.py",
    compat: bool = True,
    report: Callable[[str], None] = print,
    **settings: Any,
) -> Iterator[list[HostSGD]]:
    """Inside the block the YOLOv7 in ``directory`` trains with SP; afterwards everything global is as before.

    ``settings``: SP's, and ``sigma_backbone``, ``sigma_head``; momentum, weight decay and lr are the host's unless
    given. ``compat``: also make the host run on today's torch and numpy. ``report`` gets the summary of the groups, a
    line at a time. Yields the list of optimizers built so far. Restored: torch.optim, torch.load, torch.tensor, numpy,
    random, sys.path, sys.argv, sys.modules (the host's are dropped), os.environ.

    Raises:
        UserError: as ``find_host``; no class Model in models/yolo.py; a setting that SP refuses. Later, from within the
            host: Adam, an optimizer built past torch.optim.SGD, groups that differ from the model's parameters.
        EnvironmentFault: the host's model cannot be imported: a package it needs is missing.
    """
    host = find_host(directory, script)
    check_settings(settings)
    models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    optimizers: list[HostSGD] = []
    with ExitStack() as stack:
        stack.enter_context(_process_state(host))
        if compat:
            stack.enter_context(patches.modern_stack(lambda: _device(models)))
        stack.enter_context(_noted(_model_class(host), models))
        if compat:
            stack.enter_context(patches.local_weights(_modules(host, "utils.google_utils")))
        stack.enter_context(replaced_optimizer("SGD", host_sgd(models, optimizers, settings, report)))
        stack.enter_context(replaced_optimizer("Adam", _refused_adam()))
        stack.callback(register_optimizer_step_pre_hook(_only_ours(models)).remove)
        yield optimizers


@contextmanager
def _process_state(host: Host) -> Iterator[None]:
    """sys.path begins with the host's folder; at the end path, argv, environment and modules are as before."""
    path, argv, environ = list(sys.path), list(sys.argv), dict(os.environ)
    shadowed = {
        name: module
        for name, module in list(sys.modules.items())
        if not host.package and name.split(".")[0] in _CHECKOUT_MODULES
    }
    for name in shadowed:
        del sys.modules[name]
    before = set(sys.modules)
    sys.path.insert(0, host.import_root)
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            if name not in before and host.owns(module):
                del sys.modules[name]
        sys.modules.update(shadowed)
        sys.path[:], sys.argv[:] = path, argv
        os.environ.clear()
        os.environ.update(environ)


def _model_class(host: Host) -> type[nn.Module]:
    try:
        module = importlib.import_module(host.module("models.yolo"))
    except ImportError as error:
        raise EnvironmentFault(f"{host.directory}: models/yolo.py cannot be imported: {error}") from error
    found = getattr(module, "Model", None)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise UserError(f"{host.directory}: models/yolo.py has no class Model, the network that train.py builds")
    return found


def _modules(host: Host, name: str) -> list[ModuleType]:
    """The host's modules loaded so far, the one called ``name`` among them if there is such a file."""
    if (host.directory / f"{name.replace('.', '/')}.py").is_file():
        importlib.import_module(host.module(name))
    return [module for module in list(sys.modules.values()) if host.owns(module)]


@contextmanager
def _noted(model_class: type[nn.Module], models: weakref.WeakSet[nn.Module]) -> Iterator[None]:
    """Every ``model_class`` built inside the block is in ``models``. Nothing is hung on it: it gets pickled."""
    construct = model_class.__init__

    @wraps(construct)
    def construct_and_note(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        models.add(self)

    with replaced(model_class, "__init__", construct_and_note):
        yield


def _device(models: weakref.WeakSet[nn.Module]) -> torch.device | None:
    return next((param.device for model in models for param in model.parameters()), None)


def _refused_adam() -> type[torch.optim.Optimizer]:
    class RefusedAdam(torch.optim.Adam):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise UserError(_ADAM)

    return RefusedAdam


def _only_ours(models: weakref.WeakSet[nn.Module]) -> Callable[..., None]:
    """A hook of every optimizer's step: a host that built its own some other way must not train unnoticed."""

    def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, HostSGD):
            return
        theirs = {id(param) for model in models for param in model.parameters()}
        if any(id(param) in theirs for group in optimizer.param_groups for param in group["params"]):
            raise UserError(
                f"the host trains with {type(optimizer).__name__}, not built as torch.optim.SGD: SP is not in use"
            )

    return check


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
    if host.trains and "--adam" in arguments:
        raise UserError(_ADAM)
    with patch_yolov7(directory, script=script, compat=compat, report=report, **settings) as optimizers:
        given = patches.host_arguments(arguments, os.environ) if compat and host.trains else list(arguments)
        sys.argv[:] = [str(host.script), *given]
        try:
            if host.package:
                runpy.run_module(host.module(host.script.stem), run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(host.script), run_name="__main__")
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if host.trains and not optimizers:
            raise UserError(f"{host.script}: it ended without building torch.optim.SGD, so SP was not in use")
    return 0
