"""docs/api.md: its signatures are those of the code, its examples run."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
SECTIONS = dict(re.findall(r"^## `([\w.]+)`$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S))
SIGNATURES = {
    name: block for name, text in SECTIONS.items() for block in re.findall(r"^```py\n(.*?)^```", text, re.M | re.S)
}
EXAMPLES = {
    name: block for name, text in SECTIONS.items() for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
}
TRAINS = "sp_yolo.engine.Trainer"


def of(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def signature_of(text: str, name: str) -> dict[str, tuple[Any, Any]]:
    """Parameter -> (kind, default), read from a call such as ``f(a, *, b=1, **c)``."""
    source = f"def {text.strip().rstrip(')').rstrip().rstrip(',')}): ..."
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef) and function.name == name.rpartition(".")[2]
    names: dict[str, Any] = {"print": print}
    exec(source, names)
    return parameters(names[function.name])


def parameters(function: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (entry.kind, entry.default) for name, entry in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert signature_of(SIGNATURES[name], name) == parameters(of(name))


def test_every_section_names_something_public() -> None:
    for name in SECTIONS:
        module, _, attribute = name.rpartition(".")
        assert attribute in importlib.import_module(module).__all__
    assert len(EXAMPLES) >= 7


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != TRAINS])
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[name], str(PAGE), "exec"), {})


@pytest.mark.slow
def test_trainer_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(EXAMPLES[TRAINS], str(PAGE), "exec"), names)
    assert (tmp_path / "runs" / "train" / "exp" / "summary.json").is_file()
    assert 0 <= names["summary"]["best"]["map50"] <= 1
