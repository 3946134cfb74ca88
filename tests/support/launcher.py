"""The program as a user starts it, and runs of seconds in processes that can be killed, watched and given a fault."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
# Named by the test, run in the child before training starts: what goes wrong there.
Fault = Callable[..., None]
# A run of seconds: as flags, and as the options of Config.
FLAGS = "--img 64 --batch 4 --epochs 2 --workers 0 --device cpu --quiet --noautoanchor"
OPTIONS = {"img_size": [64], "batch_size": 4, "epochs": 1, "workers": 0}
OPTIONS |= {"device": "cpu", "quiet": True, "noautoanchor": True}


def small(data: str | Path, *more: str) -> list[str]:
    """Flags of a run of seconds."""
    return [*FLAGS.split(" "), "--data", str(data), *more]


def python(code: str, *arguments: str) -> str:
    """What ``code`` prints in an interpreter of its own."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Program:
    """A script, `train_sp.py` where none is named, in processes of its own, one thread each, in a folder of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **environment}

    def start(
        self, *arguments: str, script: Path | None = CHECKOUT / "train_sp.py", processes: int = 1, **more: Any
    ) -> subprocess.Popen[str]:
        """``script`` None: the arguments are Python's own. More than one of ``processes``: under torchrun."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*(launcher if processes > 1 else []), *([str(script)] if script else []), *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *command], cwd=self.folder, env=self.environment, **pipes, **more)

    def run(self, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def fork_server() -> Any:
    """Imports the program once; each process is a fork of it: a real one with a real exit code, in a fraction of the
    time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sp_yolo.engine", "sp_yolo.cli", __name__])
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

    def __init__(self, folder: Path, data: Path, cfg: str) -> None:
        self.folder, self.data, self.cfg = folder, data, cfg

    def flags(self, *more: str, data: Path | None = None) -> list[str]:
        return small(data or self.data, "--cfg", self.cfg, "--set", "lr0=0.01", *more)

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
