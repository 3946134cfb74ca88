"""Weights -> a Detector; an image -> its detections: the inference API."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias, TypedDict, overload

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray

from sp_yolo.boxes import boxes_to_original, letterbox, non_max_suppression
from sp_yolo.data.images import ImageFault, read_image
from sp_yolo.detections import Detections
from sp_yolo.engine.inference import open_network
from sp_yolo.engine.inputs import round_up
from sp_yolo.errors import UserError
from sp_yolo.report.pictures import class_color, draw_box
from sp_yolo.runtime.device import Compute, select_compute

Pixels: TypeAlias = NDArray[np.uint8]
Image: TypeAlias = str | os.PathLike[str] | Pixels | PIL.Image.Image
# A str is a sequence too.
Images: TypeAlias = Sequence[os.PathLike[str] | Pixels | PIL.Image.Image] | list[str] | tuple[str, ...]


class _Suppression(TypedDict):
    """Settings of :func:`non_max_suppression`."""

    conf_thres: float
    iou_thres: float
    classes: list[int] | None
    agnostic: bool


class Detector:
    """A deployed model with its post-processing: ``Detector("best.pt")("photo.jpg")`` gives the detections.

    ``compute``: device and precision, default the first GPU or the CPU. ``image_size`` px is the longer side that an
    image is scaled to. ``classes``: only these; ``agnostic``: a box suppresses those of other classes too;
    ``augment``: three scales, one mirrored. ``batch_size``: images that the network sees at once, at most.

    One detector may be called from several threads: they read and scale their images side by side, the network takes
    one call after the other.

    Raises:
        UserError: the file holds no model, or ``classes`` that it does not have.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str],
        compute: Compute | None = None,
        *,
        image_size: int = 640,
        conf_thres: float = 0.25,
        iou_thres: float = 0.45,
        classes: Sequence[int] | None = None,
        agnostic: bool = False,
        augment: bool = False,
        batch_size: int = 8,
    ) -> None:
        self._network = open_network(os.fspath(weights), compute or select_compute("", "auto"), augment=augment)
        self.names, self.stride = self._network.names, self._network.stride
        for label in classes or []:
            if not 0 <= label < len(self.names):
                raise UserError(f"--classes {label}: the model has classes 0..{len(self.names) - 1}")
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        self.image_size, self.batch_size = round_up(image_size, self.stride), batch_size
        self._lock = threading.Lock()
        self._nms: _Suppression = {
            "conf_thres": conf_thres,
            "iou_thres": iou_thres,
            "classes": None if classes is None else list(classes),
            "agnostic": agnostic,
        }

    @overload
    def __call__(self, image: Image) -> Detections: ...

    @overload
    def __call__(self, image: list[Image]) -> list[Detections]: ...  # of several kinds

    @overload
    def __call__(self, image: Images) -> list[Detections]: ...

    def __call__(self, image: Image | list[Image] | Images) -> Detections | list[Detections]:
        """The detections of an image, best first; of a list of images a list of these.

        An image: the path of a file, a PIL image, or uint8 [H, W, 3] BGR as OpenCV reads it.

        Raises:
            UserError: no such file, no picture in it, or an array of another shape or type.
        """
        if isinstance(image, list | tuple):
            starts = range(0, len(image), self.batch_size)
            return [each for start in starts for each in self._detect(image[start : start + self.batch_size])]
        return self._detect([image])[0]

    def _detect(self, given: Sequence[Any]) -> list[Detections]:
        """As many images as may go through the network together; those of one shape do, or padding would move boxes."""
        images = [_pixels(each) for each in given]
        boxed = [self._boxed(each) for each in images]
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, (padded, _, _) in enumerate(boxed):
            alike.setdefault(padded.shape, []).append(index)
        found: dict[int, Detections] = {}
        for shape, members in alike.items():
            stacked = np.stack([boxed[index][0] for index in members])
            chw = torch.from_numpy(np.ascontiguousarray(stacked[..., ::-1].transpose(0, 3, 1, 2)))
            with self._lock, torch.no_grad():
                rows_of_each = non_max_suppression(self._network.forward(chw), multi_label=False, **self._nms)
            for index, rows in zip(members, rows_of_each, strict=True):
                height, width = images[index].shape[:2]
                _, ratio, pads = boxed[index]
                kept = rows.float().cpu()
                boxes = boxes_to_original(kept[:, :4], (shape[0], shape[1]), (height, width), ((ratio, ratio), pads))
                labels = kept[:, 5].long().numpy()
                found[index] = Detections(boxes.round().numpy(), kept[:, 4].numpy(), labels, self.names)
        return [found[index] for index in range(len(images))]

    def _boxed(self, image: Pixels) -> tuple[Pixels, float, tuple[float, float]]:
        if fixed := self._network.fixed_hw:
            return letterbox(image, fixed)
        return letterbox(image, self.image_size, auto=True, stride=self.stride)

    def draw(self, image: Pixels, detections: Detections) -> Pixels:
        """A copy of the BGR image with boxes, names and scores."""
        canvas = np.ascontiguousarray(image[..., ::-1])
        for index in reversed(range(len(detections))):  # the best on top
            box, score, label, name = detections[index]
            draw_box(canvas, np.array(box), class_color(label), f"{name} {score:.2f}")
        return np.ascontiguousarray(canvas[..., ::-1])


def _pixels(image: object) -> Pixels:
    """uint8 [H, W, 3] BGR of a path, of a PIL image, or of an array that is such already."""
    if isinstance(image, str | os.PathLike):
        try:
            return read_image(image)
        except ImageFault as fault:
            raise UserError(f"{os.fspath(image)}: {fault}") from None
    if isinstance(image, PIL.Image.Image):
        return np.ascontiguousarray(np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))[..., ::-1])
    if not isinstance(image, np.ndarray):
        raise UserError(f"an image must be a path, an array or a PIL image, not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"an image must be uint8 [H, W, 3] (BGR), not {image.dtype} {list(image.shape)}")
    return image
