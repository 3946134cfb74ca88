"""A data set of a few hundred tiny images that a network learns in a second."""

from pathlib import Path

import numpy as np
import pytest

CLASSES = 3


def pictures(count: int, seed: int, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, side, side] with one bright row, column or diagonal on noise, and their classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 90, (count, side, side))
    for image, label in zip(images, labels, strict=True):
        place = int(rng.integers(side))
        if label == 0:
            image[place] += 130
        elif label == 1:
            image[:, place] += 130
        else:
            image[np.arange(side), (np.arange(side) + place) % side] += 130
    return images.astype(np.uint8), labels.astype(np.uint8)


@pytest.fixture
def tiny_npz(tmp_path: Path) -> Path:
    (x_train, y_train), (x_test, y_test) = pictures(240, 0), pictures(90, 1)
    path = tmp_path / "tiny.npz"
    np.savez_compressed(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path
