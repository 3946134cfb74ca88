"""--resume: the run that goes on, with the options it was started with."""

from __future__ import annotations

import json
from pathlib import Path

from sp_yolo.config import Config, entries, load_config
from sp_yolo.engine.state import Content, check_resumable
from sp_yolo.errors import UserError
from sp_yolo.runtime.checkpoint import load_last_whole, newest_checkpoint
from sp_yolo.runtime.folder import RunDir


def reopen(config: Config) -> tuple[Config, Content, RunDir, str]:
    """``--resume``: the options the run was started with, its last checkpoint, its folder, lines to say or "".

    A damaged ``last.pt`` is replaced by the one before it. What the command line says now wins for the options that say
    so themselves (``on_resume``); others stay the run's own, and a line names those given that are not followed.
    Nothing of the data is looked at yet.

    Raises:
        UserError: no checkpoint, one with finished weights only, or one outside a run directory; a complete run.
        StorageError: a damaged one, and no whole one before it.
    """
    path = Path(config.resume) if isinstance(config.resume, str) else newest_checkpoint(Path.cwd())
    if path.is_dir():
        path = newest_checkpoint(path)
    content, words = load_last_whole(path)
    check_resumable(content, str(path))
    weights = path.resolve().parent
    if weights.name != "weights":
        raise UserError(f"--resume {path}: not in the weights folder of a run directory; --weights starts from it")
    known = entries(Config)
    given = {key: value for key, value in vars(config).items() if value != known[key].default and key != "resume"}
    changed = {key: given.pop(key) for key in list(given) if known[key].option.on_resume}
    kept = load_config(**{**content["config"], **changed, "resume": str(path)})
    differing = [known[key].flags[0] for key, value in given.items() if _differs(value, getattr(kept, key))]
    if differing:
        ignored = f"warning: --resume goes on with the run's own options, not the {', '.join(differing)} given now"
        words = "\n".join(filter(None, (words, ignored)))
    _require_rest(kept, content, weights.parent)
    return kept, content, RunDir(weights.parent), words


def _require_rest(kept: Config, content: Content, folder: Path) -> None:
    """Raises UserError where all epochs are done, and the summary that follows the last one is written."""
    done, epochs = content["progress"].get("iteration"), kept.epochs or 0
    complete = isinstance(done, int) and done >= epochs * content["batches_per_epoch"]
    try:
        summed_up = int(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["final"]["epoch"]) + 1
    except (OSError, ValueError, KeyError, TypeError):
        summed_up = 0
    if complete and summed_up >= epochs:
        words = f"the run is already complete ({epochs} epochs); a larger --epochs extends it"
        raise UserError(f"--resume {folder}: {words}")


def _differs(given: object, kept: object) -> bool:
    # The run keeps absolute paths.
    return given != kept and not (isinstance(given, str) and given and str(kept).endswith(given))
