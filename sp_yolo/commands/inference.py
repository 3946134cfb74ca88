"""What `val`, `predict` and `export` have in common: options, the data of weights, detections as lines of files."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sp_yolo.boxes import xyxy_to_cxcywh
from sp_yolo.config import REQUIRED, DatasetConfig, Rule, option
from sp_yolo.engine.splits import open_dataset
from sp_yolo.errors import UserError
from sp_yolo.models.weights.published import find_weights

SHARE = Rule(0, 1)


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Model and detections."""

    weights: tuple[str, ...] = option(
        REQUIRED, "checkpoint, .safetensors, or an exported file (.onnx, .xml, .pt2, ..)", metavar="FILE"
    )
    img_size: int | None = option(
        None,
        "px (default: the training's test size, or 640)",
        "--img-size",
        "--img",
        "--imgsz",
        rule=Rule(1, 8192),
    )
    conf_thres: float = option(0.25, "least confidence of a detection", "--conf-thres", "--conf", rule=SHARE)
    iou_thres: float | None = option(None, "of NMS (default: as the training)", "--iou-thres", "--iou", rule=SHARE)
    augment: bool = option(False, "test-time augmentation: three scales, one mirrored")
    no_trace: bool = option(False, "accepted; nothing is traced here")
    offline: bool = option(False, "download no weights; their file is named instead")

    @functools.cached_property
    def checkpoint(self) -> str:
        """The one file given, or of the published weights named.

        Raises:
            UserError: several, as the original takes them. EnvironmentFault, StorageError: see ``find_weights``.
        """
        if len(self.weights) > 1:
            words = "ensembles of several models are not supported here, give one file"
            raise UserError(f"--weights {' '.join(self.weights)}: {words}")
        return find_weights(self.weights[0], offline=self.offline)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Device and speed."""

    device: str = option("", "cpu, 0, 1, ... ('' = first GPU, else CPU)")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Results."""

    project: str = option("runs", "folder of run directories")
    name: str = option("exp", "run directory")
    exist_ok: bool = option(False, "write into an existing run directory")
    save_txt: bool = option(False, "labels/*.txt: class cx cy w h, normalised")
    save_conf: bool = option(False, "confidence as the last column of the txt files")


def training_options(content: Any) -> dict[str, Any]:
    """What the weights' run was told, where the content of the checkpoint says so."""
    told = content.get("config") if isinstance(content, dict) else None
    return told if isinstance(told, dict) else {}


def data_of(data: str, trained: Mapping[str, Any]) -> DatasetConfig:
    """The data given, or those that the weights were trained on.

    Raises:
        UserError: neither is known, or the description is wrong.
    """
    given = data or trained.get("data")
    if not given:
        raise UserError("--data: give the dataset YAML (these weights do not name one)")
    root = "" if data else trained.get("root") or trained.get("overrides", {}).get("root", "")
    return open_dataset(given, root)


class FreeNames:
    """Called with a name it gives that name, or with a number behind it where it was given before.

    Images of one name in several folders must not overwrite each other.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        self._counts[name] = count = self._counts.get(name, 0) + 1
        return name if count == 1 else self(f"{name}_{count}")


def yolo_lines(rows: torch.Tensor, original_hw: tuple[int, int], with_confidence: bool) -> str:
    """Detections [k, 6] (xyxy in original px, score, class) as lines of a YOLO label file, best detection last."""
    height, width = original_hw
    boxes = xyxy_to_cxcywh(rows[:, :4]) / torch.tensor([width, height, width, height])
    lines = []
    for box, (score, label) in zip(boxes.tolist(), rows[:, 4:].tolist(), strict=True):
        values = [*box, score] if with_confidence else box
        lines.append(" ".join([f"{int(label)}", *(f"{value:g}" for value in values)]) + "\n")
    return "".join(reversed(lines))
