"""Model configurations in the original's YAML grammar, read, never evaluated."""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sp_yolo.config import read_yaml
from sp_yolo.errors import UserError

PACKAGED = Path(__file__).parent / "cfg"
HEADS = {"Detect": 1, "IDetect": 1, "IAuxDetect": 2}  # name -> inputs per level

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "LeakyReLU": nn.LeakyReLU,
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "Hardswish": nn.Hardswish,
    "Identity": nn.Identity,
}
_WEIGHTS = (".pt", ".pth", ".safetensors", ".weights", ".onnx")
_WORDS = {"None": None, "True": True, "False": False}


@dataclass(frozen=True)
class Row:
    """One layer: ``sources`` are absolute layer indices, -1 the image; ``where`` names file and row for messages."""

    index: int
    where: str
    sources: tuple[int, ...]
    repeats: int
    layer: str
    arguments: tuple[Any, ...]


def packaged_models() -> list[str]:
    return sorted(file.stem for file in PACKAGED.glob("*.yaml"))


def read_model_config(cfg: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Find and read a model configuration; returns it with the name to use for it in messages.

    ``cfg``: a mapping; the path of a YAML; or the name of a packaged model, written bare ("yolov7-tiny") or as the path
    that the original has it under ("cfg/training/yolov7.yaml", "cfg/deploy/yolov7.yaml": the deployed form).

    Raises:
        UserError: no such file or model, or not a YAML mapping.
    """
    if isinstance(cfg, Mapping):
        return copy.deepcopy(dict(cfg)), "model configuration"
    path = Path(cfg)
    if path.suffix.lower() in _WEIGHTS:
        raise UserError(f"{cfg}: weights are given as --weights; the model, --cfg, is a name or a YAML")
    if path.is_file():
        return copy.deepcopy(dict(read_yaml(path))), str(path)
    stem = path.name.removesuffix(".yaml")
    if stem in packaged_models() and path.parent.name in ("", "training", "deploy"):
        config = dict(read_yaml(PACKAGED / f"{stem}.yaml"))
        return (deploy_config(config, stem) if path.parent.name == "deploy" else config), str(path)
    near = nearest_model(stem)
    hint = f" (did you mean {near}?)" if near else ""
    raise UserError(f"{cfg}: no such model file, and not one of {', '.join(packaged_models())}{hint}")


def nearest_model(name: str) -> str:
    """The packaged model that ``name`` is a slip of, else the one that it begins with, else the likest; '' for none."""
    known = packaged_models()
    begun = [model for model in reversed(known) if name.lower().startswith(model)]
    for likeness in (0.85, 0.6):
        if near := difflib.get_close_matches(name.lower(), known, 1, likeness):
            return near[0]
        if begun:
            return max(begun, key=len)
    return ""


def positive_number(config: Mapping[str, Any], key: str, default: float | None, where: str) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} must be a positive number, got {value!r}")
    return value


def num_classes_of(config: Mapping[str, Any], where: str) -> int:
    nc = positive_number(config, "nc", None, where)
    if nc != int(nc):
        raise UserError(f"{where}: nc must be a whole number, got {nc!r}")
    return int(nc)


def checked_anchors(anchors: Any, levels: int, where: str) -> list[list[float]]:
    """Anchors in pixels, one flat list w,h,w,h,... per level; an integer k stands for k placeholders per level."""
    if isinstance(anchors, int) and not isinstance(anchors, bool) and anchors > 0:
        # To be replaced by autoanchor. The original counts from 0, but a box of size 0 has no logarithm or ratio.
        return [[float(v) for v in range(1, 2 * anchors + 1)] for _ in range(levels)]
    rule = f"{where}: anchors must be an integer or {levels} lists of as many width,height pairs in pixels"
    if not isinstance(anchors, Sequence) or isinstance(anchors, str) or len(anchors) != levels:
        raise UserError(f"{rule}, got {anchors!r}")
    for level in anchors:
        if not isinstance(level, Sequence) or not level or len(level) % 2 or len(level) != len(anchors[0]):
            raise UserError(f"{rule}, got {level!r}")
        for value in level:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(f"{rule}; {value!r} is not a positive number")
    return [[float(v) for v in level] for level in anchors]


def parse_rows(config: Mapping[str, Any], where: str) -> list[Row]:
    """The rows of backbone and head, with absolute sources and evaluated arguments.

    Raises:
        UserError: naming the row whose form, ``from`` or argument is wrong.
    """
    depth = positive_number(config, "depth_multiple", 1.0, where)
    words = {**_WORDS, "nc": config.get("nc"), "anchors": config.get("anchors")}
    rows: list[Row] = []
    for section in ("backbone", "head"):
        written = config.get(section)
        if not isinstance(written, Sequence) or isinstance(written, str) or not written:
            raise UserError(f"{where}: {section} must be a list of rows [from, number, module, args]")
        for position, row in enumerate(written):
            index = len(rows)
            place = f"{where}: row {index} ({section}[{position}])"
            if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 4:
                raise UserError(f"{place}: expected [from, number, module, args], got {row!r}")
            origin, number, layer, arguments = row
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise UserError(f"{place}: number must be a whole number from 1, got {number!r}")
            if not isinstance(layer, str):
                raise UserError(f"{place}: module must be a name, got {layer!r}")
            if not isinstance(arguments, Sequence) or isinstance(arguments, str):
                raise UserError(f"{place}: args must be a list, got {arguments!r}")
            rows.append(
                Row(
                    index,
                    place,
                    _absolute(origin, index, place),
                    max(round(number * depth), 1) if number > 1 else 1,
                    layer,
                    tuple(_value(argument, words, place) for argument in arguments),
                )
            )
    return rows


def _absolute(origin: Any, index: int, where: str) -> tuple[int, ...]:
    sources = []
    for source in origin if isinstance(origin, Sequence) and not isinstance(origin, str) else [origin]:
        if isinstance(source, bool) or not isinstance(source, int):
            raise UserError(f"{where}: from must be layer numbers, got {origin!r}")
        absolute = source + index if source < 0 else source
        if not (0 <= absolute < index or (source == -1 and index == 0)):
            raise UserError(f"{where}: from {source} is not a layer before it (0 to {index - 1})")
        sources.append(absolute)
    if not sources:
        raise UserError(f"{where}: from is empty")
    return tuple(sources)


def _value(written: Any, words: Mapping[str, Any], where: str) -> Any:
    """An argument: numbers and lists as they are; of strings only the grammar's own words mean something."""
    if not isinstance(written, str):
        return written
    if written in words:
        return words[written]
    if not written.startswith("nn."):
        return written
    call = re.fullmatch(r"nn\.(\w+)\(\s*(?:negative_slope\s*=\s*)?([0-9.eE+-]*)\s*\)", written)
    kind = _ACTIVATIONS.get(call[1]) if call else None
    try:
        slope = [float(call[2])] if call and call[2] else []
        if kind is None or (slope and kind is not nn.LeakyReLU):
            raise ValueError
        if kind is nn.Identity or kind is nn.SiLU:  # SiLU in place would have to copy its input for autograd
            return kind()
        return kind(*slope, inplace=True)
    except ValueError:
        known = ", ".join(f"nn.{name}({'0.1' if name == 'LeakyReLU' else ''})" for name in _ACTIVATIONS)
        raise UserError(f"{where}: {written} is not an activation this grammar knows: {known}") from None


def lead_rows(rows: Sequence[Row]) -> frozenset[int]:
    """Indices of the rows that inference needs: all but those that only the auxiliary inputs of the head use."""
    head = rows[-1]
    inputs = head.sources
    if HEADS.get(head.layer, 1) == 1:
        return frozenset(range(len(rows)))
    half = len(inputs) // 2
    auxiliary_only = _reached(rows, inputs[half:]) - _reached(rows, inputs[:half])
    return frozenset(range(len(rows))) - auxiliary_only


def _reached(rows: Sequence[Row], ends: Sequence[int]) -> set[int]:
    found: set[int] = set()
    pending = list(ends)
    while pending:
        index = pending.pop()
        if index >= 0 and index not in found:
            found.add(index)
            pending.extend(rows[index].sources)
    return found


def deploy_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration of the deployed model: a Detect head, no auxiliary rows."""
    rows = parse_rows(config, where)
    kept = sorted(lead_rows(rows))
    renumbered = {old: new for new, old in enumerate(kept)}
    result = copy.deepcopy(dict(config))
    written = [*result["backbone"], *result["head"]]
    sections: dict[str, list[list[Any]]] = {"backbone": [], "head": []}
    for new, old in enumerate(kept):
        origin, number, layer, arguments = written[old]
        sources = rows[old].sources
        if old == rows[-1].index:
            sources = sources[: len(sources) // HEADS.get(layer, 1)]
            layer = "Detect"
        given = list(origin) if isinstance(origin, Sequence) else [origin]
        moved = [
            source if source < 0 and source + new == renumbered.get(absolute, -1) else renumbered[absolute]
            for source, absolute in zip(given, sources, strict=False)
        ]
        section = "backbone" if old < len(result["backbone"]) else "head"
        sections[section].append([moved if isinstance(origin, Sequence) else moved[0], number, layer, arguments])
    if "widths" in result:  # by names such as model.51.cv1
        result["widths"] = {_renumbered(name, renumbered): width for name, width in result["widths"].items()}
    return {**result, **sections}


def _renumbered(name: str, rows: Mapping[int, int]) -> str:
    """A name that begins with "model.ROW" under the row's new number."""
    return re.sub(r"(?<=^model\.)\d+", lambda row: str(rows[int(row[0])]), name)
