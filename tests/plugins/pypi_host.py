"""Trainers from PyPI as black boxes, each in a folder outside the repository."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

from support.launcher import CHECKOUT, Program

# What the trainers import, beside what is here already; their declared dependencies are years old.
COMMON = shlex.split("""
    pandas scipy seaborn matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil pytz six pillow
    packaging requests certifi charset-normalizer idna urllib3 psutil tensorboard tensorboard-data-server absl-py grpcio
    markdown protobuf werkzeug markupsafe tqdm pyyaml
""")


def installed(package: str, folder: Path, *requirements: str) -> Path:
    """The folder that holds ``package``: where it is installed already, or ``folder``, filled now."""
    found = importlib.util.find_spec(package)
    if found and found.origin:
        return Path(found.origin).parents[1]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *requirements, *COMMON]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    return folder


class Host(Program):
    """Commands in one folder, with the host importable. ``first``: its packages hide those that are installed."""

    def __init__(self, folder: Path, site: Path, package: str, first: bool = False, **environment: str) -> None:
        paths = os.pathsep.join((str(folder), str(CHECKOUT)))
        super().__init__(folder, PYTHONPATH=paths, WANDB_MODE="disabled", **environment)
        self.host = site / package
        # Else they come last, so that torch's own dependencies are the ones already installed.
        place = f"sys.path.insert(0, {str(site)!r})" if first else f"sys.path.append({str(site)!r})"
        (folder / "sitecustomize.py").write_text(f"import sys; {place}")

    def __call__(self, *argv: str) -> str:
        done = self.run(*argv, script=None)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def plug_in(self, *argv: str) -> str:
        return self("-m", "sp_yolo.cli", "yolov7", str(self.host), *argv)

    def plainly(self, *argv: str) -> str:
        """The host's train.py with its own optimizer: the compatibility patches only, no swap."""
        start = "import runpy, sys; from sp_yolo.plugins.compat import modern_stack\nwith modern_stack(lambda: None):\n"
        run = f"    runpy.run_module('{self.host.name}.train', run_name='__main__', alter_sys=True)"
        return self("-c", start + run, *argv)
