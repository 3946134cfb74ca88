"""Converters without their own talk."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The converters' own talk, which is no news of the user's model, is not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        silent = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            with _programs():
                yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _programs() -> Iterator[None]:
    """What programs that a converter calls write is not shown either."""
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with open(os.devnull, "wb") as nowhere:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
        yield
    finally:
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
