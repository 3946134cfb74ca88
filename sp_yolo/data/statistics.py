"""What a split's labels are like, in numbers."""

from __future__ import annotations

import numpy as np

from sp_yolo.data.dataset import DetectionDataset


def class_counts(data: DetectionDataset) -> np.ndarray:
    """[2, classes]: images with the class, boxes of the class."""
    result = np.zeros((2, len(data.names)), np.int64)
    for labels in data.labels:
        boxes = np.bincount(labels[:, 0].astype(int), minlength=len(data.names))
        result += np.stack((boxes > 0, boxes))
    return result


def box_sides(data: DetectionDataset, image_size: int) -> np.ndarray:
    """Width and height [n, 2] in px of every box once the longer side of its image has `image_size` px."""
    scaled = image_size * data.shapes_wh / data.shapes_wh.max(axis=1, keepdims=True)
    sides = [labels[:, 3:5] * wh for labels, wh in zip(data.labels, scaled, strict=True)]
    return np.concatenate([np.zeros((0, 2)), *sides])
