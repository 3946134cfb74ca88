"""Training runs in processes of their own that can be killed, watched and given a fault.

A fork server imports the program once; each run is a fork of it: a real process with a real exit code, in a fraction of
a second instead of four.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
ENGINE = str(CHECKOUT / "sp_yolo" / "engine")
# Named by the test, run in the child before training starts: what goes wrong there.
Fault = Callable[..., None]


def fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sp_yolo.engine", "sp_yolo.cli", "fault_runs"])
    return context


def _child(argv: list[str], folder: str, log: str, fault: tuple[Fault, tuple[Any, ...]] | None) -> None:
    # Plots take seconds and have tests of their own.
    sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # data workers as the program starts them
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    if fault:
        fault[0](*fault[1])
    from sp_yolo.cli import main_train

    sys.exit(main_train(argv))


class Training:
    """One process that trains. ``output``: what it has printed so far."""

    def __init__(self, folder: Path, argv: list[str], fault: tuple[Fault, tuple[Any, ...]] | None) -> None:
        self.log = folder / f"log_{time.monotonic_ns()}.txt"
        self.process = fork_server().Process(target=_child, args=(argv, str(folder), str(self.log), fault))
        self.process.start()

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Its exit code; a signal's number negative."""
        self.process.join(240)
        assert self.process.exitcode is not None, f"still running after 240 s: {self.output}"
        return self.process.exitcode

    def wait_for(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not ready() and self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert ready(), self.output


class Runs:
    """Starts trainings of a tiny network on tiny data in ``folder``."""

    def __init__(self, folder: Path, data: Path, cfg: Path) -> None:
        self.folder, self.data, self.cfg = folder, data, cfg

    def flags(self, *more: str, data: Path | None = None) -> list[str]:
        flags = [
            "--data",
            str(data or self.data),
            "--cfg",
            str(self.cfg),
            "--img",
            "64",
            "--batch",
            "4",
            "--workers",
            "0",
        ]
        return [*flags, "--epochs", "2", "--device", "cpu", "--quiet", "--noautoanchor", "--set", "lr0=0.01", *more]

    def start(self, *flags: str, fault: tuple[Fault, tuple[Any, ...]] | None = None) -> Training:
        """A process that trains with just these ``flags``."""
        return Training(self.folder, list(flags), fault)

    def train(
        self, *more: str, data: Path | None = None, fault: tuple[Fault, tuple[Any, ...]] | None = None
    ) -> tuple[int, str]:
        """Exit code and output of a training of two epochs."""
        training = self.start(*self.flags(*more, data=data), fault=fault)
        return training.wait(), training.output

    def resume(self, path: Path, *flags: str) -> tuple[int, str]:
        training = self.start("--resume", str(path), "--quiet", *flags)
        return training.wait(), training.output

    def weights(self, name: str = "exp") -> Path:
        return self.folder / "runs" / "train" / name / "weights"


def one_error(output: str) -> str:
    """The single line that says what went wrong."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in output, output
    return lines[0]


def fingerprint(path: Path) -> str:
    """sha256 of the whole state of a run but for what a clock or the system's memory decides."""
    content = torch.load(path, weights_only=True)
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, entry in value.items():
                if key not in ("images_per_second", "gpu_mem"):
                    digest.update(str(key).encode())
                    add(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                add(entry)
        else:
            digest.update(repr(value).encode())

    for key in ("model", "ema", "ema_updates", "optimizer", "scaler", "progress", "hyp", "batches_per_epoch"):
        add([key, content[key]])
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ faults of a process
class _Moments:
    """Counts the calls that code of the engine makes, C functions such as os.replace and os.fsync included."""

    def __init__(self, die_at: int, count_file: str) -> None:
        self.die_at, self.count_file, self.count = die_at, count_file, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(ENGINE):
            return
        self.count += 1
        if self.count == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count_file and frame.f_code.co_name == "_finish":
            Path(self.count_file).write_text(str(self.count))
            sys.setprofile(None)


def count_moments(count_file: str) -> None:
    """Write the number of moments of a run, from the first iteration to the last save, to ``count_file``."""
    _profile_from_fit(_Moments(0, count_file))


def die_at_moment(number: int) -> None:
    """SIGKILL to this process, from itself, at that moment."""
    _profile_from_fit(_Moments(number, ""))


def _profile_from_fit(moments: _Moments) -> None:
    from sp_yolo.engine import Trainer

    fit = Trainer.fit

    def watched(trainer: Trainer) -> dict[str, Any]:
        sys.setprofile(moments)
        try:
            return fit(trainer)
        finally:
            sys.setprofile(None)

    Trainer.fit = watched  # type: ignore[method-assign]
