"""The files that people give as weights: every wrapper is read, everything else is named for what it is."""

import ast
import datetime
import pathlib
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.networks import mini
from torch import Tensor, nn

from sp_yolo.errors import StorageError, UserError
from sp_yolo.models import description, follow_names, load_weights, model_from_weights
from sp_yolo.runtime.checkpoint import load_checkpoint, save_checkpoint

PACKAGE = Path(__file__).resolve().parents[2] / "sp_yolo"
WEB_PAGE = b"\xef\xbb\xbf\r\n<!DOCTYPE html><html><body>404</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


STATE = mini(3).state_dict()


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


READ = {
    "plain": STATE,
    "state_dict": {"state_dict": STATE, "epoch": 3},
    "model_state_dict": {"model_state_dict": STATE, "epoch": 3},
    "net": {"net": STATE},
    "without an average": {"model": STATE, "ema": None, "optimizer": None, "epoch": -1},
    "half an average": {"ema": {key: value.half() for key, value in STATE.items()}, "model": None},
    "DistributedDataParallel": {"model": prefixed("module.")},
    "compiled and distributed": {"model": prefixed("module._orig_mod.")},
    "Lightning": {"state_dict": prefixed("model."), "pytorch-lightning_version": "2.0"},
    "of a run": {"model": STATE, "optimizer": {"state": {}, "param_groups": []}, "wandb_id": None},
}


@pytest.mark.parametrize("form", READ)
def test_every_wrapper_is_read_whole(form: str, tmp_path: Path) -> None:
    torch.save(READ[form], tmp_path / "w.pt")
    model = mini(3)
    report = load_weights(model, tmp_path / "w.pt")
    assert (report.transferred, report.total) == (len(STATE), len(STATE))
    for key, value in model.state_dict().items():
        expected = STATE[key].half().float() if form == "half an average" else STATE[key]
        assert torch.equal(value, expected.to(value)), key


def truncated(path: Path) -> None:
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-100])


FILES: dict[str, tuple[str, bytes | Callable[[Path], None], str]] = {
    "empty": ("w.pt", b"", "the file is empty"),
    "web page": ("w.pt", WEB_PAGE, "a web page"),
    "Git LFS pointer": ("w.pt", POINTER, "a Git LFS pointer .*git lfs pull"),
    "truncated": ("w.pt", truncated, "cut short"),
    "darknet": ("yolov7.weights", bytes(100), "darknet weights"),
    "ONNX": ("yolov7.onnx", b"\x08\x06", "ONNX program"),
    "gzip": ("w.pt", b"\x1f\x8b\x08", "gzip archive: unpack"),
    "before 1.6": ("w.pt", lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False), "version 1.6"),
    "bare pickle": ("w.pt", pickle.dumps({"a": 1}), "a bare pickle"),
    "anything": ("w.pt", b"hello", "not a zip file as torch.save"),
    "another network": ("w.pt", lambda path: torch.save({"a.weight": torch.ones(2)}, path), "no detection head"),
    "a tensor": ("w.pt", lambda path: torch.save(torch.ones(2), path), "no model in it"),
    "below a key of its own": (
        "w.pt",
        lambda path: torch.save({"generator": STATE, "epoch": 1}, path),
        "below its key 'generator': save that alone",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_checkpoint_is_named(kind: str, tmp_path: Path) -> None:
    name, content, words = FILES[kind]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    with pytest.raises((UserError, StorageError), match=words) as caught:
        model_from_weights(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.fixture
def other_programs() -> Iterator[Callable[[str], nn.Module]]:
    """``make(dotted name)``: a module of that class, as the program that has it would pickle it."""
    made: list[str] = []

    def make(dotted: str) -> nn.Module:
        place, _, name = dotted.rpartition(".")
        parts = place.split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if module not in sys.modules:
                sys.modules[module] = types.ModuleType(module)
                made.append(module)
        kind = type(name, (nn.Module,), {"__module__": place})
        setattr(sys.modules[place], name, kind)
        result: nn.Module = kind()
        result.conv = nn.Conv2d(3, 4, 1)
        return result

    yield make
    for module in made:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("models.yolo.DetectionModel", {}, "a YOLOv5 checkpoint"),
        ("models.yolo.DetectionModel", {"opt": {"save_dir": pathlib.PurePosixPath("runs")}}, "a YOLOv5 checkpoint"),
        ("ultralytics.nn.tasks.DetectionModel", {"date": datetime.date(2024, 1, 1)}, "an ultralytics checkpoint"),
    ],
)
def test_relatives_are_named(
    kind: str, more: dict, words: str, other_programs: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    torch.save({"model": other_programs(kind).half(), "ema": None, **more}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=f"{words}.*another network") as caught:
        model_from_weights(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_names_in_another_order_move_the_outputs(tmp_path: Path) -> None:
    model = mini(3)
    for parameter in model.head.parameters():
        nn.init.normal_(parameter)
    model.names = ["cat", "dog", "cow"]
    torch.save({**description(model), "model": model.state_dict()}, tmp_path / "w.pt")
    other = mini(3)
    report = load_weights(other, tmp_path / "w.pt")
    words = follow_names(other, report.names, ["cow", "cat", "dog"])
    assert "another order, cat, dog, cow" in words and other.names == ["cow", "cat", "dog"]
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before, after = model.eval()(image)[0], other.eval()(image)[0]
    torch.testing.assert_close(after, before[..., [0, 1, 2, 3, 4, 7, 5, 6]])


def test_other_names_are_said_and_equal_ones_are_not() -> None:
    model = mini(3)
    weights = model.head.m[0].weight.clone()
    assert follow_names(model, ["a", "b", "c"], ["a", "b", "c"]) == ""
    assert follow_names(model, None, ["a", "b", "c"]) == "" and model.names == ["a", "b", "c"]
    assert "classes are x, b, c, the data's a, b, c" in follow_names(model, ["x", "b", "c"], ["a", "b", "c"])
    assert follow_names(model, ["a"], ["a", "b", "c"]) == ""  # another head: load_weights has said so
    assert torch.equal(model.head.m[0].weight, weights)


class Gadget:
    def __reduce__(self) -> tuple:
        return sys.exit, (99,)


def test_no_file_reaches_an_unpickler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Python's nor torch's (CVE-2025-32434, CVE-2026-24747): the package has a reader of its own."""
    save_checkpoint(tmp_path / "good.pt", {**description(mini(3)), "model": STATE, "step": 7})
    torch.save({"format": "sp-yolo", "model": Gadget()}, tmp_path / "bad.pt")
    torch.save(Gadget(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("an unpickler was reached")

    for place, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (torch.serialization, "load"),
        (torch.serialization, "_load"),
        (torch.serialization, "_legacy_load"),
        (torch._weights_only_unpickler, "load"),
        (torch._weights_only_unpickler, "Unpickler"),
    ):
        monkeypatch.setattr(place, name, reached)
    assert load_checkpoint(tmp_path / "good.pt")["step"] == 7
    assert model_from_weights(tmp_path / "good.pt").num_classes == 3
    for name in ("bad.pt", "old.pt"):
        for read in (load_checkpoint, model_from_weights):
            with pytest.raises((UserError, StorageError), match=name):
                read(tmp_path / name)


# The optimizer may be copied out alone and so has no reader of ours; hosts of plug-ins bring their own files.
WITH_TORCH_LOAD = {"optim/report.py", "plugins/compat.py", "plugins/record.py"}


def test_nothing_else_in_the_package_unpickles() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if name in ("torch.load", "torch.serialization.load") or {"pickle", "dill", "joblib"} & set(modules):
                found.add(str(path.relative_to(PACKAGE)))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
                assert any(key.arg == "allow_pickle" and not key.value.value for key in node.keywords), path  # type: ignore[attr-defined]
    assert found <= WITH_TORCH_LOAD
