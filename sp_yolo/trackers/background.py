"""A tracker in a thread of its own: it may be slow, fail, hang or be missing, and the run does not notice."""

from __future__ import annotations

import importlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from sp_yolo.trackers.callback import Callback, Record, RunStart

PATIENCE, HASTE = 60.0, 20.0  # seconds that a run waits for its trackers when it is done, and when it was stopped
_LOG = logging.getLogger("sp_yolo")


def in_background(name: str, *, asked_for: bool = True) -> Callback:
    """The tracker of ``--log name``. ``asked_for``: otherwise nothing is said where its package is missing."""
    return _Background(name, asked_for)


class _Background(Callback):
    def __init__(self, name: str, asked_for: bool) -> None:
        self._name, self._asked_for = name, asked_for
        self._events: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failed = False
        self._show_failed_thread = threading.excepthook

    def on_start(self, run: RunStart) -> None:
        tracker = self._load()
        if tracker is not None:
            self._show_failed_thread, threading.excepthook = threading.excepthook, self._thread_failed
            self._thread = threading.Thread(target=self._work, args=[tracker], name=f"--log {self._name}", daemon=True)
            self._thread.start()
            self._events.put(("on_start", run))

    def on_epoch(self, record: Record) -> None:
        self._tell("on_epoch", record)

    def on_files(self, paths: Sequence[Path]) -> None:
        self._tell("on_files", paths)

    def on_end(self, summary: Record | None) -> None:
        self._tell("on_end", summary)
        if self._thread:
            self._thread.join(PATIENCE if summary else HASTE)
            if self._thread.is_alive():
                _LOG.warning("--log %s: has not sent everything yet and is left behind", self._name)
            if threading.excepthook == self._thread_failed:
                threading.excepthook = self._show_failed_thread

    def _tell(self, event: str, value: object) -> None:
        if self._thread:
            self._events.put((event, value))

    def _load(self) -> Callback | None:
        """Imported before the run starts loader processes: a fork in the middle of an import could leave it locked."""
        try:
            tracker: Callback = importlib.import_module(f"sp_yolo.trackers.{self._name}").Tracker()
        except ImportError as error:
            if self._asked_for:
                words = f"pip install 'sp-yolo[{self._name}]' ({error})"
                _LOG.warning("--log %s: not installed, nothing is logged there: %s", self._name, words)
        except Exception as error:  # whatever a package raises
            self._give_up(error)
        else:
            return tracker
        return None

    def _work(self, tracker: Callback) -> None:
        """Do what was put into the queue, up to the end or the first fault; BaseException: a package may exit."""
        event = ""
        try:
            while event != "on_end":
                event, value = self._events.get()
                handler: Callable[[object], None] = getattr(tracker, event)
                handler(value)
        except BaseException as error:
            self._give_up(error)

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """One line, not a traceback, where it is a thread of the tracker's package: TensorBoard writes in one."""
        if type(failed.thread).__module__.partition(".")[0] == self._name and failed.exc_value:
            self._give_up(failed.exc_value)
        else:
            self._show_failed_thread(failed)

    def _give_up(self, error: BaseException) -> None:
        if self._failed:
            return
        self._failed = True
        words = next(iter(str(error).splitlines()), "") or type(error).__name__
        _LOG.warning("--log %s: failed, nothing more is logged there; the run goes on: %s", self._name, words)
