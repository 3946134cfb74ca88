"""The MIT-licensed YOLOv7 of MultimediaTechLab/YOLO (v7.pt), and LibreYOLO's copies of it, under the original's keys.

Its rows are numbered as the original's; inside a row its modules have other names. Key names, shapes and what the
modules compute: that repository, MIT licence. Three differences from the original: its state_dict holds no anchors; its
three pools follow each other, so that their windows are 5, 13 and 25 wide; a row's number has no prefix, or "layers.".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sp_yolo.models import grammar
from sp_yolo.models.build import build_model

_MARK = re.compile(r"^(?P<prefix>.*?)(?P<row>\d+)\.heads\.0\.head_conv\.weight$")
_POOLS = [5, 13, 25]
_SPPCSPC = {
    "pre_conv.0": "cv1",
    "short_conv": "cv2",
    "pre_conv.1": "cv3",
    "pre_conv.2": "cv4",
    "post_conv.0": "cv5",
    "post_conv.1": "cv6",
    "merge_conv": "cv7",
}
_RULES = (
    *((re.compile(rf"^{re.escape(theirs)}\."), f"{ours}.") for theirs, ours in _SPPCSPC.items()),
    (re.compile(r"^conv1\.conv\."), "rbr_dense.0."),
    (re.compile(r"^conv1\.bn\."), "rbr_dense.1."),
    (re.compile(r"^conv2\.conv\."), "rbr_1x1.0."),
    (re.compile(r"^conv2\.bn\."), "rbr_1x1.1."),
    (re.compile(r"^heads\.(\d+)\.head_conv\."), r"m.\1."),
    (re.compile(r"^heads\.(\d+)\.implicit_a\."), r"ia.\1."),
    (re.compile(r"^heads\.(\d+)\.implicit_m\."), r"im.\1."),
)


def renamed_key(key: str) -> str:
    """``key`` without its prefix, "51.pre_conv.0.conv.weight" -> "model.51.cv1.conv.weight"."""
    row, _, inside = key.partition(".")
    for pattern, replacement in _RULES:
        inside, count = pattern.subn(replacement, inside)
        if count:
            break
    return f"model.{row}.{inside}"


def from_mit(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state under the original's keys, anchors added, and the configuration that computes the same; None where
    ``state`` is of no such model.
    """
    marks = (_MARK.match(key) for key in state)
    found = next((mark for mark in marks if mark), None)
    if found is None:
        return None
    prefix, head = found["prefix"], f"model.{found['row']}."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    result = {renamed_key(key): value for key, value in own.items()}
    config, _ = grammar.read_model_config("yolov7")
    for row in config["head"]:
        if row[2] == "SPPCSPC":
            row[3] = [row[3][0], False, 1, 0.5, list(_POOLS)]
    anchors = build_model(config, 1).head
    return {**result, f"{head}anchors": anchors.anchors, f"{head}anchor_grid": anchors.anchor_grid}, config
