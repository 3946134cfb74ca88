"""Pictures that need OpenCV only: batches with their boxes, and the images with the worst results."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from sp_yolo.boxes import cxcywh_to_xyxy
from sp_yolo.errors import StorageError

TRUTH_COLOR, MISSED_COLOR, FALSE_COLOR = (60, 170, 60), (240, 140, 0), (220, 30, 30)  # RGB
MAX_IMAGES, MAX_SIDE = 16, 1920
Layer = tuple[np.ndarray, tuple[int, int, int], str]  # box_xyxy [4] in original pixels, RGB colour, text


def class_color(index: int) -> tuple[int, int, int]:
    """A distinct RGB colour per class: hues a golden angle apart."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.85, 0.9)
    return int(red * 255), int(green * 255), int(blue * 255)


def boxes_of_targets(targets: Tensor, batch_size: int, image_hw: tuple[int, int]) -> list[np.ndarray]:
    """Batch targets [n, 6] (image, class, normalised cx, cy, w, h) -> per image [k, 5] x1, y1, x2, y2 px, class."""
    rows = targets.detach().cpu().numpy()
    scale = np.array([image_hw[1], image_hw[0]] * 2)
    boxes = np.concatenate((cxcywh_to_xyxy(rows[:, 2:6]) * scale, rows[:, 1:2]), axis=1)
    return [boxes[rows[:, 0] == index] for index in range(batch_size)]


def draw_mosaic(
    images: Tensor | np.ndarray,
    boxes: Sequence[Tensor | np.ndarray],
    names: Sequence[str],
    path: str | Path,
    *,
    titles: Sequence[str] = (),
    confidence: float = 0.25,
) -> None:
    """Write the first 16 images of a batch with their boxes as one picture.

    Args:
        images: uint8 [B, 3, H, W] RGB.
        boxes: per image [k, 5] rows x1, y1, x2, y2 (px), class, or [k, 6] with the score before the class; boxes
            scored at or below `confidence` are left out.
        titles: one line per image, e.g. its file name.

    Raises:
        StorageError: the file cannot be written.
    """
    pixels = np.asarray(images)[:MAX_IMAGES].transpose(0, 2, 3, 1)
    count, height, width = pixels.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = min(1.0, MAX_SIDE / (max(rows, columns) * max(height, width)))
    tile_h, tile_w = max(round(height * scale), 1), max(round(width * scale), 1)
    canvas = np.full((rows * tile_h, columns * tile_w, 3), 255, np.uint8)
    for index in range(count):
        tile = pixels[index].copy()  # the batch itself stays as it is
        if scale < 1:
            tile = cv2.resize(tile, (tile_w, tile_h), interpolation=cv2.INTER_AREA)
        for row in np.asarray(boxes[index], dtype=np.float64).reshape(-1, np.shape(boxes[index])[-1] or 5):
            label, score = int(row[-1]), row[4] if len(row) == 6 else None
            if score is not None and score <= confidence:
                continue
            name = names[label] if label < len(names) else str(label)
            draw_box(tile, row[:4] * scale, class_color(label), name if score is None else f"{name} {score:.2f}")
        if index < len(titles):
            _write(tile, Path(titles[index]).name[:40], (4, 14), (220, 220, 220))
        cv2.rectangle(tile, (0, 0), (tile_w - 1, tile_h - 1), (255, 255, 255), 1)
        y, x = index // columns * tile_h, index % columns * tile_w
        canvas[y : y + tile_h, x : x + tile_w] = tile
    write_picture(canvas, path)


def draw_box(image: np.ndarray, box_xyxy: np.ndarray, color: tuple[int, int, int], text: str = "") -> None:
    """Draw into [H, W, 3] RGB: a rectangle and its label inside the image."""
    x1, y1, x2, y2 = (round(float(value)) for value in np.clip(box_xyxy, -1e6, 1e6))
    cv2.rectangle(image, (x1, y1), (x2, y2), color, 2, cv2.LINE_AA)
    if text:
        _write(image, text, (max(x1, 0), y1 - 4 if y1 > 14 else min(y1 + 14, image.shape[0] - 2)), color)


def _write(image: np.ndarray, text: str, at: tuple[int, int], color: tuple[int, int, int]) -> None:
    plain = text.encode("ascii", "replace").decode()  # OpenCV's font has no other letters
    (width, height), below = cv2.getTextSize(plain, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
    cv2.rectangle(image, (at[0] - 1, at[1] - height - 2), (at[0] + width + 1, at[1] + below - 1), color, -1)
    ink = (0, 0, 0) if sum(color) > 380 else (255, 255, 255)
    cv2.putText(image, plain, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, 1, cv2.LINE_AA)


def write_picture(image: np.ndarray, path: str | Path) -> None:
    """Write [H, W, 3] RGB; the suffix decides the format.

    Raises:
        StorageError: the file cannot be written.
    """
    ok, data = cv2.imencode(Path(path).suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    try:
        if not ok:
            raise OSError(0, "the picture cannot be encoded")
        Path(path).write_bytes(data.tobytes())
    except OSError as error:
        raise StorageError(f"{path}: picture cannot be written: {error.strerror}") from None


def draw_worst(
    image_ids: Iterable[int],
    read_image: Callable[[int], np.ndarray],
    layers: Callable[[int], list[Layer]],
    titles: Mapping[int, str],
    path: str | Path,
) -> None:
    """Write images side by side, each 480 px on its longer side, with boxes in original pixels; none: no picture.

    Args:
        read_image: image id -> uint8 [H, W, 3] RGB.
        layers: image id -> what to draw, in order.
        titles: image id -> its file name.
    """
    tiles = []
    for image_id in image_ids:
        image = read_image(image_id)
        height, width = image.shape[:2]
        scale = 480 / max(height, width)
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        tile = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        for box, color, text in layers(image_id):
            draw_box(tile, box * scale, color, text)
        _write(tile, Path(titles[image_id]).name[:60], (4, 14), (220, 220, 220))
        tiles.append(tile)
    if not tiles:
        Path(path).unlink(missing_ok=True)  # of an earlier run in this folder
        return
    columns = min(len(tiles), 3)
    lines = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.shape[0] for tile in line) for line in lines]
    canvas = np.full((sum(heights), columns * 480, 3), 255, np.uint8)
    for line, top in zip(lines, np.cumsum([0, *heights[:-1]]), strict=True):
        for column, tile in enumerate(line):
            left = column * 480
            canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    write_picture(canvas, path)
