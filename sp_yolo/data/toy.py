"""The embedded default data set: shapes and digits on busy backgrounds, drawn with OpenCV, always the same."""

from __future__ import annotations

import colorsys
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sp_yolo.errors import StorageError, UserError

NAMES = ("circle", "square", "triangle", "star", "four", "eight")
TRAIN_IMAGES, VAL_IMAGES, IMAGE_SIZE = 600, 100, 192
OBJECTS = (1, 5)  # per image
OBJECT_SHARE = (0.22, 0.5)  # of the image's side
HUE_SPREAD = 10  # degrees around the hue of the class: colour helps to tell the classes apart, shape alone would do
VERSION = 3  # raise it when the pictures change, so that an older copy is made anew

_Strokes = tuple[tuple[tuple[float, float], ...], ...]


def _ellipse(x: float, y: float, width: float, height: float) -> tuple[tuple[float, float], ...]:
    angles = [step * math.pi / 16 for step in range(33)]
    return tuple((x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles)


# Pen strokes in a box of 1 x 1, several hands per digit. OpenCV's own fonts differ between its versions 4 and 5.
_DIGITS: dict[str, tuple[_Strokes, ...]] = {
    "four": (
        (((0.65, 1.0), (0.65, 0.0), (0.1, 0.7), (0.95, 0.7)),),
        (((0.2, 0.0), (0.2, 0.5), (0.8, 0.5)), ((0.8, 0.0), (0.8, 1.0))),
        (((0.35, 0.0), (0.1, 0.6), (0.95, 0.6)), ((0.7, 0.3), (0.6, 1.0))),
    ),
    "eight": (
        (_ellipse(0.5, 0.25, 0.26, 0.25), _ellipse(0.5, 0.75, 0.33, 0.25)),
        (((0.2, 0.0), (0.8, 0.0), (0.8, 1.0), (0.2, 1.0), (0.2, 0.0)), ((0.2, 0.5), (0.8, 0.5))),
        (((0.2, 0.1), (0.8, 0.1), (0.2, 0.9), (0.8, 0.9), (0.2, 0.1)),),
    ),
}
_CANVAS = 160  # px: objects are drawn at this size, then turned and scaled
_MOST_COVERED = 0.35  # of an earlier object's box


def ensure_toy_dataset(
    root: str | os.PathLike[str],
    *,
    train: int = TRAIN_IMAGES,
    val: int = VAL_IMAGES,
    image_size: int = IMAGE_SIZE,
) -> Path:
    """Make the data set below ``root`` unless it is complete there; returns its dataset YAML.

    Layout: images/{train,val}/*.jpg, annotations/{train,val}.json (COCO), dataset.yaml. It is drawn into a folder
    beside ``root`` and renamed, so that an interruption leaves nothing half-made; several processes may call at once.

    Raises:
        UserError: ``root`` holds something else. StorageError: it cannot be written.
    """
    root = Path(root).absolute()
    description = _description(root, train, val, image_size)
    if _complete(root, description, train, val):
        return root / "dataset.yaml"
    if root.exists() and (not root.is_dir() or (any(root.iterdir()) and not _ours(root))):
        raise UserError(f"{root}: the toy data are to be made here, but the folder holds something else")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".partial", dir=root.parent))
        try:
            for number, (split, count) in enumerate((("train", train), ("val", val))):
                _write_split(partial, split, number, count, image_size)
            (partial / "dataset.yaml").write_text(description, encoding="utf-8")
            partial.chmod(0o755)
            if not _complete(root, description, train, val):  # another process may have been faster
                if root.exists():
                    shutil.rmtree(root)
                partial.rename(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if not _complete(root, description, train, val):
            raise StorageError(f"{root}: the toy data cannot be written: {error.strerror or error}") from None
    return root / "dataset.yaml"


def _description(root: Path, train: int, val: int, image_size: int) -> str:
    return (
        f"# Made by sp_yolo/data/toy.py: version {VERSION}, {train} + {val} images of {image_size} px.\n"
        f"root: {json.dumps(str(root))}\n"
        "format: coco\n"
        "train: annotations/train.json\n"
        "val: annotations/val.json\n"
        "images: {train: images/train, val: images/val}\n"
        f"names: [{', '.join(NAMES)}]\n"
    )


def _ours(root: Path) -> bool:
    """Whether a folder was made by this file, complete or not."""
    try:
        return (root / "dataset.yaml").read_text(encoding="utf-8").startswith("# Made by sp_yolo/data/toy.py")
    except (OSError, UnicodeDecodeError):
        return {entry.name for entry in root.iterdir()} <= {"images", "annotations"}


def _complete(root: Path, description: str, train: int, val: int) -> bool:
    try:
        if (root / "dataset.yaml").read_text(encoding="utf-8") != description:
            return False
        for split, count in (("train", train), ("val", val)):
            document = root / "annotations" / f"{split}.json"
            if len(os.listdir(root / "images" / split)) != count or not document.stat().st_size:
                return False
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _write_split(root: Path, split: str, number: int, count: int, size: int) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        image, objects = draw_image(np.random.default_rng((VERSION, number, index)), size)
        name = f"{split}_{index:04d}.jpg"
        done, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])
        if not done:
            raise StorageError(f"{folder / name}: OpenCV cannot write JPEG")
        (folder / name).write_bytes(encoded.tobytes())
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for label, (x1, y1, x2, y2) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(NAMES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(document), encoding="utf-8")


def draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """One picture uint8 [size, size, 3] BGR and its objects: (class, (x1, y1, x2, y2) px)."""
    image = _background(rng, size)
    objects: list[tuple[int, tuple[int, int, int, int]]] = []
    for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))):
        label = int(rng.integers(len(NAMES)))
        mask = _turned(rng, _shape(rng, label), size * rng.uniform(*OBJECT_SHARE))
        height, width = mask.shape
        for _ in range(10):  # a few tries for a place that leaves the earlier objects visible
            x, y = int(rng.integers(0, size - width)), int(rng.integers(0, size - height))
            box = (x, y, x + width, y + height)
            if all(max(_covered(earlier, box), _covered(box, earlier)) < _MOST_COVERED for _, earlier in objects):
                _paint(rng, image[y : y + height, x : x + width], mask, label)
                objects.append((label, box))
                break
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    image += rng.normal(0, rng.uniform(1, 6), image.shape).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), objects


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """float32 [size, size, 3]: a smooth random texture, sometimes with stripes and thin lines across."""
    cells = int(rng.integers(2, 9))
    texture = rng.normal(0, rng.uniform(5, 28), (cells, cells, 3)).astype(np.float32)
    image = cv2.resize(texture, (size, size), interpolation=cv2.INTER_CUBIC)
    image += (rng.uniform(40, 215) + rng.uniform(-20, 20, 3)).astype(np.float32)
    if rng.random() < 0.35:
        y, x = np.mgrid[:size, :size].astype(np.float32)
        angle, period = rng.uniform(0, math.pi), rng.uniform(8, 40)
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
        image += (wave * rng.uniform(4, 18))[..., None].astype(np.float32)
    for _ in range(int(rng.integers(0, 4))):
        ends = rng.integers(0, size, (2, 2)).tolist()
        cv2.line(image, ends[0], ends[1], rng.uniform(0, 255, 3).tolist(), int(rng.integers(1, 3)), cv2.LINE_AA)
    return image


def _shape(rng: np.random.Generator, label: int) -> np.ndarray:
    """uint8 mask [160, 160] of an upright object about 100 px large: filled or an outline; digits in several hands."""
    mask = np.zeros((_CANVAS, _CANVAS), np.uint8)
    centre, radius = _CANVAS // 2, 50
    name = NAMES[label]
    if name in _DIGITS:
        strokes = _DIGITS[name][int(rng.integers(len(_DIGITS[name])))]
        slant, width, thickness = rng.uniform(-0.2, 0.2), rng.uniform(60, 85), int(rng.integers(9, 20))
        for stroke in strokes:
            points = (np.array(stroke) - 0.5) * (width, 100)
            points[:, 0] -= slant * points[:, 1]
            cv2.polylines(mask, [(points + centre).round().astype(np.int32)], False, 255, thickness, cv2.LINE_AA)
        return mask
    thickness = cv2.FILLED if rng.random() < 0.6 else int(rng.integers(9, 18))
    if name == "circle":
        cv2.circle(mask, (centre, centre), radius, 255, thickness, cv2.LINE_AA)
        return mask
    corners = {"square": 4, "triangle": 3, "star": 10}[name]
    angles = np.arange(corners) * (2 * math.pi / corners) - math.pi / 2
    radii = np.where(np.arange(corners) % 2 == 1, radius * 0.45, radius) if name == "star" else np.full(corners, radius)
    points = np.stack((np.cos(angles), np.sin(angles)), 1) * radii[:, None] + centre
    polygon = [points.round().astype(np.int32)]
    if thickness == cv2.FILLED:
        cv2.fillPoly(mask, polygon, 255, cv2.LINE_AA)
    else:
        cv2.polylines(mask, polygon, True, 255, thickness, cv2.LINE_AA)
    return mask


def _turned(rng: np.random.Generator, mask: np.ndarray, longest: float) -> np.ndarray:
    """float32 coverage [h, w] in 0..1 of the object turned by up to 30 degrees and stretched to ``longest`` px."""
    matrix = cv2.getRotationMatrix2D((_CANVAS / 2, _CANVAS / 2), rng.uniform(-30, 30), 1.0)
    matrix[0] *= rng.uniform(0.8, 1.0)
    mask = cv2.warpAffine(mask, matrix, (_CANVAS, _CANVAS))
    x, y, width, height = cv2.boundingRect((mask > 127).astype(np.uint8))
    scale = longest / max(width, height)
    target = max(int(width * scale), 4), max(int(height * scale), 4)
    cut = cv2.resize(mask[y : y + height, x : x + width], target, interpolation=cv2.INTER_AREA)
    return cut.astype(np.float32) / 255


def _paint(rng: np.random.Generator, area: np.ndarray, mask: np.ndarray, label: int) -> None:
    """Blend a strong colour around the hue of the class into ``area``, in place."""
    hue = (label * 360 / len(NAMES) + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 360
    rgb = colorsys.hsv_to_rgb(hue / 360, rng.uniform(0.6, 1.0), rng.uniform(0.5, 1.0))
    color = np.array(rgb[::-1], np.float32) * 255
    opacity = mask[..., None] * np.float32(rng.uniform(0.8, 1.0))
    area += (color - area) * opacity


def _covered(box: tuple[int, int, int, int], by: tuple[int, int, int, int]) -> float:
    """Share of ``box`` under ``by``."""
    width, height = min(box[2], by[2]) - max(box[0], by[0]), min(box[3], by[3]) - max(box[1], by[1])
    return max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))
