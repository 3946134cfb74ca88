"""What the program says beside its results: notes and warnings through `logging`, and a bar where one is wanted."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TypedDict

LOG = logging.getLogger("sp_yolo")
_WARNING = "warning: "


def note(text: str) -> None:
    """A record for each line of ``text``: a warning where it begins with "warning: ", else information."""
    for line in filter(None, text.splitlines()):
        if line.startswith(_WARNING):
            LOG.warning("%s", line.removeprefix(_WARNING))
        else:
            LOG.info("%s", line)


class _Plain(logging.Handler):
    """Prints to the stdout of the moment, where the tables are: a run's words stay in order in one file."""

    def emit(self, record: logging.LogRecord) -> None:
        before = _WARNING if record.levelno >= logging.WARNING else ""
        print(f"{before}{record.getMessage()}", file=sys.stdout, flush=True)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Within it notes and warnings are printed, as a command does; a program of your own decides by `logging`."""
    if any(isinstance(handler, _Plain) for handler in LOG.handlers):
        yield
        return
    handler, level = _Plain(), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)


class BarSwitch(TypedDict, total=False):
    disable: bool | None


def bar_switch(off: bool | None) -> BarSwitch:
    """tqdm's ``disable``, but for what TQDM_DISABLE says; None: no bar where nobody looks."""
    return {} if "TQDM_DISABLE" in os.environ and not off else {"disable": off}
