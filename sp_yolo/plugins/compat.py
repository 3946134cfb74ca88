"""What the original YOLOv7 needs to run on today's torch, numpy and Python; docs/plugins.md gives each reason.

Every patch is a context manager that leaves nothing behind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml

from sp_yolo.errors import UserError
from sp_yolo.plugins.generic import replaced

# Aliases of Python's own types, removed in numpy 1.24, and a function renamed in numpy 2.0 and removed in 2.4.
_NUMPY_NAMES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "object": object}


@contextmanager
def modern_stack(model_device: Callable[[], torch.device | None]) -> Iterator[None]:
    """All patches together. ``model_device``: where the model being trained is, None while there is none."""
    with ExitStack() as stack:
        patches = (numpy_names(), whole_pickles(), empty_matches(model_device), integer_range(), choice_among_none())
        for patch in (*patches, indices_follow()):
            stack.enter_context(patch)
        yield


@contextmanager
def numpy_names() -> Iterator[None]:
    """numpy's removed names: int, float, bool, object and trapz, each only where it is missing."""
    names = dict(_NUMPY_NAMES)
    if hasattr(np, "trapezoid"):
        names["trapz"] = np.trapezoid
    with ExitStack() as stack:
        for name, value in names.items():
            if name not in vars(np):
                stack.enter_context(replaced(np, name, value))
        yield


@contextmanager
def whole_pickles() -> Iterator[None]:
    """torch.load as before 2.6: the host's checkpoints and label caches hold objects, not only tensors."""
    original = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{"weights_only": False, **kwargs})

    with replaced(torch, "load", load):
        yield


@contextmanager
def empty_matches(model_device: Callable[[], torch.device | None]) -> Iterator[None]:
    """An empty tensor asked for on the first GPU lies where the model is: a batch without targets ended the run."""
    original = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and isinstance(data, list) and not data:
            wanted = torch.device(kwargs["device"])
            here = model_device() if wanted.type == "cuda" else None
            kwargs["device"] = here or wanted
        return original(data, *args, **kwargs)

    with replaced(torch, "tensor", tensor):
        yield


@contextmanager
def integer_range() -> Iterator[None]:
    """random.randrange takes whole floats, as before Python 3.12: --multi-scale draws its sizes so."""
    original = random.randrange

    def randrange(*args: Any) -> int:
        return original(*(int(value) if isinstance(value, float) else value for value in args))

    with replaced(random, "randrange", randrange):
        yield


@contextmanager
def choice_among_none() -> Iterator[None]:
    """random.choices takes the last where all weights are zero, as before Python 3.9: --evolve weighs one row so."""
    original = random.choices

    def choices(population: Sequence[Any], weights: Any = None, **kwargs: Any) -> list[Any]:
        if weights is not None and len(weights) and not any(weights):
            weights = [0] * (len(weights) - 1) + [1]
        return original(population, weights, **kwargs)

    with replaced(random, "choices", choices):
        yield


@contextmanager
def indices_follow() -> Iterator[None]:
    """An index on a GPU follows a tensor to the CPU, else torch refuses it: the auxiliary OTA loss picks layers so."""
    original = torch.Tensor.__getitem__

    def getitem(self: torch.Tensor, index: Any) -> torch.Tensor:
        if isinstance(index, torch.Tensor) and index.device.type != "cpu" and self.device.type == "cpu":
            index = index.cpu()
        return original(self, index)

    with replaced(torch.Tensor, "__getitem__", getitem):
        yield


@contextmanager
def evolvable_hyp() -> Iterator[None]:
    """A hyp file is read without ``loss_ota: 1``, which is what its absence means: --evolve knows no bounds of it.

    Raises:
        UserError: it says another value.
    """
    original = yaml.load

    def load(*args: Any, **kwargs: Any) -> Any:
        content = original(*args, **kwargs)
        if isinstance(content, dict) and "lr0" in content and content.pop("loss_ota", 1) != 1:
            raise UserError("--evolve with loss_ota: 0 in the hyp file: the host cannot; evolve with loss_ota: 1")
        return content

    with replaced(yaml, "load", load):
        yield


@contextmanager
def local_weights(modules: Iterable[ModuleType]) -> Iterator[None]:
    """A missing weights file is one line: the host's download wants the network and the tags of its git repository."""

    def local(original: Callable[..., Any], file: Any, *args: Any, **kwargs: Any) -> Any:
        name = str(file).strip().replace("'", "")
        if not Path(name).exists():
            raise UserError(
                f"--weights {name}: no such file; fetch it first, or give '' and a --cfg to start from scratch"
            )
        return original(file, *args, **kwargs)

    with ExitStack() as stack:
        for module in modules:
            original = vars(module).get("attempt_download")
            if original is not None:
                stack.enter_context(replaced(module, "attempt_download", partial(local, original)))
        yield


def host_arguments(arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The host's arguments with --local_rank in the spelling it knows, and taken from torchrun's environment."""
    spelled = [
        argument.replace("--local-rank", "--local_rank", 1) if argument.startswith("--local-rank") else argument
        for argument in arguments
    ]
    if "LOCAL_RANK" in environ and not any(argument.startswith("--local_rank") for argument in spelled):
        spelled += ["--local_rank", environ["LOCAL_RANK"]]
    return spelled
