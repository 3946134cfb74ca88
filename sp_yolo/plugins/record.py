"""``sp.yaml`` in the host's run folder: SP's settings, which a resumed run takes from there, and its progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from sp_yolo.errors import UserError
from sp_yolo.plugins.generic import replaced
from sp_yolo.plugins.host_sp import HostSP, Terms, settings_of

NAME = "sp.yaml"
_HEADER = "# SP in this run, as of its last checkpoint. A resumed run takes the settings from here.\n"


def progress_of(optimizer: HostSP) -> dict[str, Any]:
    """Steps so far, the length of the run, gamma, and the share of zeros by role."""
    first = optimizer.param_groups[0]
    sparsity = {role: round(share, 6) for role, share in optimizer.sparsity().items() if role in ("backbone", "head")}
    gamma = float(first.get("gamma", 0.0))
    return {"steps": first.get("k", 0), "total_steps": first["total_steps"], "gamma": gamma, "sparsity": sparsity}


def write_record(folder: Path, optimizer: HostSP) -> str:
    """Write ``folder``/sp.yaml; returns a line of words on it."""
    progress = progress_of(optimizer)
    first = optimizer.param_groups[0]
    content = {"settings": {**settings_of(first), "lr": first.get("given_lr")}, "progress": progress}
    path = folder / NAME
    path.write_text(_HEADER + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    zeros = ", ".join(f"{100 * share:.1f} % of the {role}'s weights" for role, share in progress["sparsity"].items())
    words = f"{progress['steps']} steps, gamma {progress['gamma']:.3g}, zeros: {zeros}"
    return f"SP at the last checkpoint: {words} ({path})"


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in ``folder``, without what was the host's (null); none where it has no record.

    Raises:
        UserError: a file that is not of this kind.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))["settings"]
        return {name: value for name, value in settings.items() if value is not None}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a record of SP's settings ({type(error).__name__}); remove it to go on") from None


@contextmanager
def recorded(terms: Terms, resume: bool, current: Callable[[], HostSP | None]) -> Iterator[None]:
    """Inside the block a checkpoint with the ``current`` optimizer's state that is saved has a record beside it; where
    the run is to ``resume``, what is loaded brings its settings into ``terms``."""
    save, load = torch.save, torch.load

    def save_and_record(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        save(obj, f, *args, **kwargs)
        optimizer = current()
        if optimizer is not None and isinstance(f, str | os.PathLike) and _holds_sp(obj):
            terms.progress = write_record(_run_folder(f), optimizer)

    def load_and_recall(f: Any, *args: Any, **kwargs: Any) -> Any:
        content = load(f, *args, **kwargs)
        if resume and isinstance(f, str | os.PathLike) and _holds_sp(content):
            terms.fallback = read_settings(_run_folder(f))
        return content

    with replaced(torch, "save", save_and_record), replaced(torch, "load", load_and_recall):
        yield


def _holds_sp(content: Any) -> bool:
    """Whether it is a checkpoint with the state of a HostSP."""
    states = content.values() if isinstance(content, dict) else ()
    groups = [state.get("param_groups") or [{}] for state in states if isinstance(state, dict)]
    return any("sigmas" in found[0] for found in groups)


def _run_folder(checkpoint: str | os.PathLike[str]) -> Path:
    folder = Path(checkpoint).resolve().parent
    return folder.parent if folder.name == "weights" else folder
