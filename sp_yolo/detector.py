"""Weights -> a Detector; an image -> its detections: the inference API."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import torch

from sp_yolo.boxes import boxes_to_original, letterbox, non_max_suppression
from sp_yolo.data.images import ImageFault, read_image
from sp_yolo.engine.inference import for_inference
from sp_yolo.engine.inputs import round_up, size_grid, to_input
from sp_yolo.errors import UserError
from sp_yolo.models import deploy, model_from_weights
from sp_yolo.report.pictures import class_color, draw_box
from sp_yolo.runtime.device import Compute, searched_convolutions, select_compute

Image: TypeAlias = str | os.PathLike[str] | np.ndarray
Images: TypeAlias = Sequence[os.PathLike[str] | np.ndarray] | list[str] | tuple[str, ...]  # a str is a sequence too


class Detector:
    """A deployed model with its post-processing: ``Detector("best.pt")("photo.jpg")`` gives the detections.

    ``compute``: device and precision, default the first GPU or the CPU. ``image_size`` px is the longer side that an
    image is scaled to. ``classes``: only these; ``agnostic``: a box suppresses those of other classes too;
    ``augment``: three scales, one mirrored.

    Raises:
        UserError: the file holds no model, or ``classes`` that it does not have.
    """

    def __init__(
        self,
        weights: str,
        compute: Compute | None = None,
        *,
        image_size: int = 640,
        conf_thres: float = 0.25,
        iou_thres: float = 0.45,
        classes: Sequence[int] | None = None,
        agnostic: bool = False,
        augment: bool = False,
    ) -> None:
        compute = compute or select_compute("", "auto")
        model = model_from_weights(weights)
        self.names, self.stride = model.names, size_grid(model)
        for label in classes or []:
            if not 0 <= label < len(self.names):
                raise UserError(f"--classes {label}: the model has classes 0..{len(self.names) - 1}")
        deployed = deploy(model).to(compute.device).to(memory_format=torch.channels_last).eval()
        self.model = for_inference(deployed, compute)
        self.compute, self.augment = compute, augment
        self.image_size = round_up(image_size, self.stride)
        self.nms: dict[str, Any] = {
            "conf_thres": conf_thres,
            "iou_thres": iou_thres,
            "classes": None if classes is None else list(classes),
            "agnostic": agnostic,
        }

    @overload
    def __call__(self, image: Image) -> torch.Tensor: ...

    @overload
    def __call__(self, image: Images) -> list[torch.Tensor]: ...

    def __call__(self, image: Image | Images) -> torch.Tensor | list[torch.Tensor]:
        """An image -> float32 [k, 6] x1, y1, x2, y2 (px of the image), score, class; best first. A list of images -> a
        list of these. An image: the path of a file, or uint8 [H, W, 3] BGR as OpenCV reads it.

        Raises:
            UserError: no such file, no picture in it, or an array of another shape or type.
        """
        if isinstance(image, list | tuple):
            return [self._detect(_pixels(each)) for each in image]
        return self._detect(_pixels(image))

    @torch.no_grad()
    def _detect(self, image: np.ndarray) -> torch.Tensor:
        padded, ratio, pads = letterbox(image, self.image_size, auto=True, stride=self.stride)
        chw = torch.from_numpy(np.ascontiguousarray(padded[..., ::-1].transpose(2, 0, 1)))[None]
        with self.compute.autocast(), searched_convolutions(shapes_repeat=False):
            decoded, _ = self.model(to_input(chw, self.compute), augment=self.augment)
        rows = non_max_suppression(decoded, multi_label=False, **self.nms)[0].float().cpu()
        original = (image.shape[0], image.shape[1])
        boxes = boxes_to_original(rows[:, :4], padded.shape[:2], original, ((ratio, ratio), pads))
        return torch.cat((boxes.round(), rows[:, 4:]), 1)

    def draw(self, image: np.ndarray, rows: torch.Tensor) -> np.ndarray:
        """A copy of the BGR image with boxes, names and scores."""
        canvas = np.ascontiguousarray(image[..., ::-1])
        for *box, score, label in rows.flip(0).tolist():
            draw_box(canvas, np.array(box), class_color(int(label)), f"{self.names[int(label)]} {score:.2f}")
        return np.ascontiguousarray(canvas[..., ::-1])

    def describe(self, rows: torch.Tensor) -> str:
        """'2 RBC, 1 WBC', or 'nothing'."""
        counts = torch.bincount(rows[:, 5].long(), minlength=len(self.names)).tolist()
        return ", ".join(f"{count} {self.names[label]}" for label, count in enumerate(counts) if count) or "nothing"


def _pixels(image: Any) -> np.ndarray:
    """uint8 [H, W, 3] BGR of a path or of an array that is such already."""
    if isinstance(image, str | os.PathLike):
        try:
            return read_image(image)
        except ImageFault as fault:
            raise UserError(f"{os.fspath(image)}: {fault}") from None
    if not isinstance(image, np.ndarray):
        raise UserError(f"an image must be a path or an array, not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"an image must be uint8 [H, W, 3] (BGR), not {image.dtype} {list(image.shape)}")
    return image
