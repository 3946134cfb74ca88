"""The program as a user starts it, and the flags of a run of seconds."""

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


class Program:
    """`train_sp.py` in a process of its own, one thread, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def start(self, *flags: str) -> "subprocess.Popen[str]":
        command = [sys.executable, str(CHECKOUT / "train_sp.py"), *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, text=True, **pipes)  # type: ignore[call-overload]

    def run(self, *flags: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*flags)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def small(toy_yaml: Path, *more: str) -> list[str]:
    """Flags of a run of seconds."""
    flags = f"--img 64 --batch 4 --epochs 2 --workers 0 --device cpu --quiet --noautoanchor --data {toy_yaml}"
    return [*flags.split(" "), *more]
