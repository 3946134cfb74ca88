"""An exported file that is called as the model it was made from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sp_yolo.backends.facts import Facts
from sp_yolo.backends.formats import require, runtime_of
from sp_yolo.boxes import xyxy_to_cxcywh
from sp_yolo.errors import UserError

GRAY = 114 / 255  # of the border that letterboxing puts round an image


class ExportedModel:
    """Attributes: names, num_classes, stride (float tensor [nl], px), facts.

    Called with float images [B, 3, H, W] in 0..1 it gives (decoded [B, N, 5 + nc]: cx, cy, w, h in px of these images,
    objectness, classes; None). Where the file takes one size, smaller images get a border at the right and below;
    where it takes so many images, they go through it in groups of that many. A file that ends with NMS gives its
    detections as boxes of sure objectness.

    Raises:
        UserError: no such file, of no known format, without our metadata; images larger than it takes.
        EnvironmentFault: its runtime is not installed. StorageError: it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], device: str = "cpu") -> None:
        self.path = Path(path)
        runtime = runtime_of(self.path.name)
        if runtime is None:
            raise UserError(f"{path}: no exported file: its name ends in none of their suffixes")
        if not self.path.exists():
            raise UserError(f"{path}: no such file")
        require(runtime.packages, runtime.extra, f"running a {runtime.suffix} file")
        self._run, text = runtime.open(self.path, device)
        self.facts = Facts.read(text, self.path)
        self._device = torch.device(device)
        self._head = self.facts.head()
        self.names = list(self.facts.names)
        self.num_classes = len(self.names)
        self.stride = torch.tensor(self.facts.strides, dtype=torch.float32)

    def __call__(self, images: Tensor, augment: bool = False) -> tuple[Tensor, None]:
        if augment:
            raise UserError(f"{self.path}: --augment needs a checkpoint; an exported file is run as it is")
        pixels = self._fitted(images).to(torch.float16 if self.facts.half else torch.float32)
        prepared = np.ascontiguousarray(pixels.cpu().numpy())
        size = self.facts.batch or len(prepared)
        parts = [self._decoded(part) for part in self._groups(prepared, size)]
        longest = max(part.shape[1] for part in parts)
        decoded = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])
        return decoded[: len(images)].to(self._device), None

    @staticmethod
    def _groups(images: np.ndarray, size: int) -> list[np.ndarray]:
        """Parts of ``size`` images; the last is filled up with gray ones."""
        lacking = -len(images) % size
        filled = np.concatenate((images, np.full((lacking, *images.shape[1:]), GRAY, images.dtype)))
        return [filled[start : start + size] for start in range(0, len(filled), size)]

    def _fitted(self, images: Tensor) -> Tensor:
        if self.facts.image_size is None:
            return images
        height, width = self.facts.image_size
        below, right = height - images.shape[2], width - images.shape[3]
        if below < 0 or right < 0:
            words = f"not {images.shape[2]} x {images.shape[3]}: give a smaller --img, or export it larger"
            raise UserError(f"{self.path}: made for images of {height} x {width} px, {words}")
        return F.pad(images, (0, right, 0, below), value=GRAY)

    def _decoded(self, images: np.ndarray) -> Tensor:
        results = [torch.from_numpy(np.array(result)) for result in self._run(images)]
        if self.facts.outputs == "rows":
            return self._of_rows(results[0].float(), len(images))
        if self.facts.outputs == "efficient":
            _, boxes, scores, labels = results
            return self._sure(boxes, scores, labels.long())
        if self.facts.outputs == "maps":
            with torch.no_grad():
                return self._head.decode([raw.float() for raw in results])
        return results[0].float()

    def _of_rows(self, rows: Tensor, batch: int) -> Tensor:
        own = [rows[rows[:, 0] == index] for index in range(batch)]
        longest = max(len(each) for each in own)
        padded = torch.stack([F.pad(each, (0, 0, 0, longest - len(each))) for each in own])
        return self._sure(padded[..., 1:5], padded[..., 6], padded[..., 5].long())

    def _sure(self, boxes_xyxy: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Detections [B, K, ..] as decoded boxes: objectness is the score, their class 1 and the others 0."""
        classes = F.one_hot(labels.clamp(min=0), self.num_classes).to(scores)
        return torch.cat((xyxy_to_cxcywh(boxes_xyxy), scores[..., None], classes), -1)
