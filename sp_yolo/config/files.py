"""Strict YAML that remembers its lines, and where the files that come with the program are found."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sp_yolo.config.text import NotText, read_text
from sp_yolo.errors import UserError

# Recipes of version 0.1 -> what replaces them.
FORMER = {f"{name}.{size}.yaml": f"{name}.yaml" for name in ("sp", "sgd", "adamw") for size in ("tiny", "p5", "p6")}
CHECKOUT = Path(__file__).resolve().parents[2]
# Where hyp/, data/ and studies/ are: an installed copy has them inside the package (setup.cfg, package_dir).
SHIPPED = CHECKOUT if (CHECKOUT / "setup.cfg").is_file() else CHECKOUT / "sp_yolo" / "shipped"


class YamlDict(dict[Any, Any]):
    """A top-level YAML mapping that remembers its file and the line of each key.

    ``path`` is the file, ``line(key)`` the 1-based line of a top-level key (1 for an absent key).
    """

    def __init__(self, values: Mapping[Any, Any], path: Path, lines: Mapping[Any, int]) -> None:
        super().__init__(values)
        self.path = path
        self._lines: dict[Any, int] = dict(lines)

    def line(self, key: Any) -> int:
        return self._lines.get(key, 1)

    def where(self, key: Any) -> str:
        """``file:line`` of ``key``, for error messages."""
        return f"{self.path}:{self.line(key)}"


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 without tags and duplicate keys, and with ``1e-3`` read as the number everybody means."""


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _construct_strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            repeated = key in result
        except TypeError:
            raise _refusal("a key must be a plain word", key_node.start_mark) from None
        if repeated:
            raise _refusal(f"key {key!r} appears twice", key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _construct_strict_mapping)


def _parse(text: str) -> tuple[Any, yaml.Node | None]:
    """(value, node with the lines) of one document.

    A tag chooses a constructor and an alias lets a small file unfold without end: no file of ours needs either.
    """
    for event in yaml.parse(text, Loader=_StrictLoader):
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _refusal(f"tag {tag!r} is not allowed", event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(f"alias '*{event.anchor}' is not allowed", event.start_mark)
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node), node
    finally:
        loader.dispose()


def read_scalar(text: str) -> Any:
    """``text`` as the value YAML takes it for.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        return _parse(text)[0]
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None


def read_yaml(path: str | os.PathLike[str]) -> YamlDict:
    """Read one YAML file whose top level is a mapping.

    Raises:
        UserError: the file is missing, unreadable, not YAML, has a tag, an alias or a duplicate key, or is no mapping.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, NotText) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    try:
        values, node = _parse(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:1: expected 'key: value' lines at the top level")
    return YamlDict(values, path, {key.value: key.start_mark.line + 1 for key, _ in node.value})


def find_file(name: str | os.PathLike[str], folder: str) -> Path:
    """The file ``name`` as given, or with that name below ``folder`` ("hyp", "data") of the working directory or among
    those that come with the program.

    Raises:
        UserError: nowhere; names near misses.
    """
    given = Path(name)
    shelves = [Path.cwd() / folder, SHIPPED / folder]
    candidates = [given, SHIPPED / given, *(shelf / given.name for shelf in shelves)]
    for candidate in candidates:
        with contextlib.suppress(OSError):  # such as a name too long for the file system
            if candidate.is_file():
                return candidate
    if given.name in FORMER:
        raise UserError(f"{given}: no such file; version 0.2 has {FORMER[given.name]} for all model sizes")
    known = sorted({file.name for shelf in shelves if shelf.is_dir() for file in shelf.glob("*.yaml")})
    near = difflib.get_close_matches(given.name, known, n=3) or known
    raise UserError(f"{given}: no such file (known in {folder}/: {', '.join(near)})")
