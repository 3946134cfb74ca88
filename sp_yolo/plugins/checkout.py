"""Where a host's script lies, how it wants to be started, and what of the process it may not keep."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sp_yolo.errors import UserError


@dataclass(frozen=True)
class Host:
    """A checkout (``package`` is ""), or the same trainer as an installed package."""

    directory: Path
    script: Path
    package: str

    @property
    def trains(self) -> bool:
        """Whether the script is a trainer: only then the plug-in has to find an optimizer to replace."""
        return self.script.name.startswith("train")

    @property
    def import_roots(self) -> list[str]:
        """What Python would put before sys.path, and what the script adds to it: its own folder, the checkout."""
        return [str(self.directory.parent)] if self.package else [str(self.script.parent), str(self.directory)]

    @property
    def module(self) -> str:
        """The script's name as a module of the package."""
        parts = self.script.relative_to(self.directory).with_suffix("").parts
        return ".".join((self.package, *parts))

    def owns(self, module: ModuleType) -> bool:
        file = getattr(module, "__file__", None)
        return bool(file) and Path(str(file)).resolve().is_relative_to(self.directory)


def find_host(directory: str | Path, script: str = "train.py") -> Host:
    """The trainer in ``directory``.

    Raises:
        UserError: no such folder or script.
    """
    root = Path(directory).resolve()
    if not root.is_dir():
        raise UserError(f"{directory}: no such folder; expected a checkout of YOLOv7 or a relative")
    path = (root / script).resolve()
    if not path.is_file():
        trainers = [str(found.relative_to(root)) for place in ("", "*/") for found in root.glob(f"{place}train*.py")]
        others = ", ".join(sorted(trainers)) or "none"
        raise UserError(
            f"{directory}: no {script}; other training scripts, for --script: {others}; "
            "for a loop of your own see swap_optimizer in docs/plugins.md"
        )
    return Host(root, path, root.name if _is_package(root, path) else "")


def _is_package(root: Path, script: Path) -> bool:
    """Whether the script imports its neighbours through the folder it lies in. An __init__.py alone does not tell."""
    if not (root / "__init__.py").is_file():
        return False
    try:
        tree = ast.parse(script.read_bytes())
    except SyntaxError as error:
        raise UserError(f"{script}:{error.lineno}: not Python that this interpreter reads: {error.msg}") from None
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(node.level or (node.module or "").split(".")[0] == root.name for node in imports)


@contextmanager
def process_state(host: Host) -> Iterator[None]:
    """sys.path begins with the host's folders; at the end path, argv, environment and modules are as before."""
    path, argv, environ = list(sys.path), list(sys.argv), dict(os.environ)
    theirs = set() if host.package else {p.stem for p in map(Path, _listed(host)) if p.suffix in ("", ".py")}
    shadowed = {
        name: module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in theirs - {"__main__"} and not host.owns(module)
    }
    for name in shadowed:
        del sys.modules[name]
    before = set(sys.modules)
    sys.path[:0] = host.import_roots
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            if name not in before and host.owns(module):
                del sys.modules[name]
        sys.modules.update(shadowed)
        sys.path[:], sys.argv[:] = path, argv
        os.environ.clear()
        os.environ.update(environ)


def _listed(host: Host) -> list[str]:
    """Names in the folders that imports come from: modules, and folders with modules."""
    found = []
    for root in map(Path, host.import_roots):
        found += [entry.name for entry in root.iterdir() if entry.suffix == ".py" or any(entry.glob("*.py"))]
    return found
