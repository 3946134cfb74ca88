"""A classification data set in an npz file and a study of seconds on it."""

from pathlib import Path

import numpy as np
import pytest

from sp_yolo.experiments.compare.study import Study, Variant, make_study


@pytest.fixture
def tiny_npz(tmp_path: Path) -> Path:
    """Three classes: one third of the picture is bright."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 150), ("test", 60)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 150, (count, 9, 9))
        for image, label in zip(images, labels, strict=True):
            image[3 * label : 3 * label + 3] += 100
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels}
    path = tmp_path / "tiny.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def tiny_study(tiny_npz: Path) -> Study:
    options = {"dataset": str(tiny_npz), "samples": 60, "epochs": 2, "batch_size": 20}
    variants = [Variant("sp", "sp", {"lr0": (0.1, 0.3)}), Variant("sgd", "sgd", {"lr0": (0.01, 0.05)})]
    return make_study("tiny", task="classify", options=options, variants=variants, seeds=2, tuning_seeds=1)
