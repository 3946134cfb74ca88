"""What an exported file says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from sp_yolo.errors import UserError
from sp_yolo.models.heads import Detect

# Images [B, 3, H, W] -> the outputs of a file, in their order.
Runner: TypeAlias = Callable[[np.ndarray], list[np.ndarray]]
FACTS = "sp_yolo"  # the key of a file's metadata that holds its Facts


@dataclass(frozen=True)
class Facts:
    """What a file says of itself, as JSON in its metadata, or in NAME.json beside it where the format has none.

    ``outputs``: maps (raw, per level), decoded (boxes), rows or efficient (after NMS, see :mod:`end2end`).
    ``anchors``: px, per level w, h, w, h, ... ``image_size``: height, width of its images, ``batch``: how many; None
    where any does. ``half``: its images are float16.
    """

    names: list[str]
    strides: list[int]
    anchors: list[list[float]]
    outputs: str
    image_size: list[int] | None
    batch: int | None
    half: bool

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str | None, path: Path) -> Facts:
        """The facts in the metadata ``text`` of ``path``.

        Raises:
            UserError: there are none, or they are not whole: another program wrote the file.
        """
        try:
            return cls(**json.loads(text or ""))
        except (ValueError, TypeError):
            words = "does not say what it holds: `sp-yolo export` did not write it, or its .json is not beside it"
            raise UserError(f"{path}: {words}") from None

    def write_beside(self, path: Path) -> None:
        """For a format without metadata: best.tflite -> best.tflite.json."""
        beside(path, ".json").write_text(self.text(), encoding="utf-8")

    def head(self) -> Detect:
        """A head that decodes the file's raw maps."""
        return Detect(len(self.names), self.anchors, [1] * len(self.strides), self.strides).eval()


def beside(path: Path, ending: str) -> Path:
    """A file that belongs to ``path``: best.ncnn.param -> best.ncnn.param.json, best.ncnn.bin."""
    return path.with_name(path.name + ending) if ending == ".json" else path.with_suffix(ending)


def text_beside(path: Path) -> str | None:
    """What ``Facts.write_beside`` wrote for ``path``, None where it is gone."""
    place = beside(path, ".json")
    return place.read_text(encoding="utf-8") if place.is_file() else None
