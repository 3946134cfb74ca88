"""Who may import whom (docs/architecture.md): read from the source, function-level imports included."""

import ast
import sys
from pathlib import Path

import pytest
from support.launcher import python

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "sp_yolo"
LEAVES = {"transfer", "boxes", "config", "errors", "suppression"}
BELOW = {"data", "models", "losses", "eval", "optim", *LEAVES}
ENGINE = {"backends", "engine", "report", "runtime", "trackers", *BELOW}
# A room not listed here has no place yet. Nothing imports `cli`, and only `cli` imports `commands`.
ALLOWED = {
    "optim": set(),
    "errors": set(),
    "transfer": {"errors"},
    "hub": {"models", *LEAVES},
    "config": {"errors", "optim"},
    "boxes": {"errors", "suppression"},
    "suppression": set(),
    "data": LEAVES,
    "models": LEAVES,
    "losses": LEAVES,
    "eval": LEAVES,
    "report": {"data", "eval", *LEAVES},
    "runtime": {"models", *LEAVES},
    "trackers": set(),
    "backends": {"models", *LEAVES},
    "engine": ENGINE,
    "detections": {"errors"},
    "detector": {"detections", *ENGINE},
    "export": ENGINE,
    "experiments": ENGINE,
    "plugins": {"optim", "errors"},
    "commands": {"detections", "detector", "experiments", "export", "plugins", *ENGINE},
    "cli": {"commands", "config", "errors", "runtime"},
}
OUTSIDE = {"optim": {"torch", "triton"}}  # triton: by one file, which is imported where a GPU is used


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "sp_yolo"


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "sp_yolo" else {node.module}
            )
    return found


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_direction(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    here = relative.parts[0].removesuffix(".py")
    ours = {room(name) for name in imported_modules(path) if name.split(".")[0] == "sp_yolo"} - {here, "__version__"}
    if here in ("__init__", "__main__"):
        return
    assert here in ALLOWED, f"{relative}: a new room; give it a place in docs/architecture.md and here"
    assert ours - {"sp_yolo"} <= ALLOWED[here], f"{relative} imports {sorted(ours - ALLOWED[here])}"
    if here in OUTSIDE:
        outside = {name.split(".")[0] for name in imported_modules(path)} - {"sp_yolo"} - set(sys.stdlib_module_names)
        assert outside <= OUTSIDE[here], f"{relative} imports {sorted(outside)}"


def test_tests_share_by_their_support_only() -> None:
    """What tests of two folders need stands in tests/support; nothing else is imported from another folder."""
    paths = sorted(TESTS.rglob("*.py"))
    homes = {path.stem: path.parent for path in paths if path.parent != TESTS / "support"}
    for path in paths:
        others = {name for name in imported_modules(path) if homes.get(name, path.parent) != path.parent}
        assert not others, f"{path.relative_to(TESTS)} imports {sorted(others)} of another folder"


def test_optimizer_alone_brings_no_vision_library() -> None:
    heavy = "{'cv2', 'pycocotools', 'torchvision'}"
    code = f"import sys; from sp_yolo.optim import SP; print(sorted({heavy} & set(sys.modules)))"
    assert python(code) == "[]"


def test_command_line_starts_without_opencv() -> None:
    code = "import sys; import sp_yolo.commands.train, sp_yolo.config; print('cv2' in sys.modules)"
    assert python(code) == "False"
