"""Who watches a run: the callbacks that were given, and the trackers of --log."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from sp_yolo.config import FolderOptions, entries
from sp_yolo.engine.setup import Run
from sp_yolo.trackers import Callback, Callbacks, RunStart, in_background, new_identity

IDENTITY = "run_id"  # a file of the run's folder


def watchers(options: FolderOptions, given: Sequence[Callback]) -> Callbacks:
    """The callbacks ``given``, then the trackers: those of --log, or TensorBoard where it is installed."""
    names = dict.fromkeys(options.log)
    if not names and importlib.util.find_spec("tensorboard"):
        names = {"tensorboard": None}
    return Callbacks([*given, *(in_background(name, asked_for=bool(options.log)) for name in names)])


def run_start(run: Run) -> RunStart:
    """What watchers are told when the run begins or goes on.

    Raises:
        StorageError: its identity cannot be written.
    """
    options, resumed = run.options, bool(run.options.resume)
    usual = options.project == entries(FolderOptions)["project"].default
    return RunStart(
        folder=run.folder.path.resolve(),
        project="sp-yolo" if usual else Path(options.project).name,
        name=run.folder.path.name,
        identity=_identity(run, resumed),
        settings={**run.told["config"], **{f"hyp/{key}": value for key, value in run.told["hyp"].items()}},
        epoch=len(run.state.progress.records),
        epochs=run.size.epochs,
        resumed=resumed,
        model=run.model,
        optimizer=run.state.optimizer,
    )


def _identity(run: Run, resumed: bool) -> str:
    path = run.folder.path / IDENTITY
    if resumed and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    identity = new_identity()
    run.folder.write(IDENTITY, identity + "\n")
    return identity
