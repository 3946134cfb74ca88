"""`ANOTHER_MACHINE=win32 python another_machine.py FLAGS...`: train_sp.py as if on Windows, or on macOS ("darwin").

What Python and the kernel have on Linux only is hidden from it; processes are spawned; other packages are left alone.
"""

import ctypes
import importlib
import multiprocessing
import os
import pkgutil
import runpy
import signal
import sys
import types
from pathlib import Path
from typing import Any

# They look at the system while they are imported: first, as on the real one.
for _name in ("torch", "torch.utils.data", "torchvision", "cv2", "numpy", "yaml", "tqdm", "pycocotools.cocoeval"):
    importlib.import_module(_name)

MODULES = {
    "win32": ("resource", "fcntl", "pwd", "grp", "termios", "syslog", "readline", "crypt", "tty", "pty"),
    "darwin": (),
}
# Modules that need a package of an extra; they are imported where that is asked for.
OF_EXTRAS = (
    "sp_yolo.plugins.ultralytics",
    "sp_yolo.hub",
    *(f"sp_yolo.trackers.{name}" for name in ("mlflow", "tensorboard", "trackio", "wandb")),
)
NAMES: dict[str, tuple[tuple[Any, str], ...]] = {
    "win32": (
        *((os, name) for name in ("fork", "uname", "getuid", "getloadavg", "O_DIRECTORY", "mkfifo", "sysconf")),
        *((signal, name) for name in ("SIGCHLD", "SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "alarm", "setitimer")),
    ),
    "darwin": (),
}
NOT_OUTSIDE_LINUX = ("posix_fadvise", "sched_getaffinity", "sched_setaffinity", "memfd_create")
_real_open = os.open


def _open(path: Any, *arguments: Any, **more: Any) -> int:
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return _real_open(path, *arguments, **more)


def _no_library(name: Any, *_: Any, **__: Any) -> None:
    raise TypeError("bad argument type for built-in operation") if name is None else OSError(f"no {name}")


def become(system: str) -> None:
    """Hide what ``system`` has not got, in this process; its spawned children come here too."""
    for module in MODULES[system]:
        sys.modules[module] = None  # type: ignore[assignment]
    for place, name in (*NAMES[system], *((os, name) for name in NOT_OUTSIDE_LINUX)):
        if hasattr(place, name):
            delattr(place, name)
    if system == "win32":
        os.open = _open  # type: ignore[assignment]
        ctypes.CDLL = _no_library  # type: ignore[assignment,misc]
        handlers: Any = importlib.import_module("torch.utils.data._utils.signal_handling")
        handlers.IS_WINDOWS = True  # torch looked while it was imported
    # Python's own processes are this system's: their locks and pipes are handed on as Linux does it.
    own = types.ModuleType("sys")
    own.__dict__.update(sys.__dict__)
    for name in ("synchronize", "queues", "connection", "spawn", "popen_spawn_posix", "reduction", "resource_tracker"):
        module: Any = importlib.import_module(f"multiprocessing.{name}")
        if hasattr(module, "sys"):
            module.sys = own
    sys.platform = system


become(os.environ["ANOTHER_MACHINE"])

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    import sp_yolo

    if sys.argv[1:] == ["import everything"]:
        for found in pkgutil.walk_packages(sp_yolo.__path__, "sp_yolo."):
            if found.name not in ("sp_yolo.__main__", *OF_EXTRAS):
                importlib.import_module(found.name)
        print(sum(name.startswith("sp_yolo.") for name in sys.modules))
    else:
        script = Path(sp_yolo.__file__).parents[1] / "train_sp.py"
        sys.argv[0] = str(script)
        runpy.run_path(str(script), run_name="__main__")
