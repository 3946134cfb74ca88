"""Ctrl-C and SIGTERM: the first asks the loop to stop at a safe point, the second stops at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


def signal_words(number: int) -> str:
    """What a run says that signal ``number`` ended."""
    return "interrupted (Ctrl-C)" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


class Interrupt:
    """Context manager that turns SIGINT and SIGTERM into a wish the loop can read.

    ``signal`` is the number received so far, or 0. A second signal finds the previous handlers and acts at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread of the process: signals stay with whoever owns them
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
