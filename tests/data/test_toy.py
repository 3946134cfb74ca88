from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from sp_yolo.config import load_dataset_config
from sp_yolo.data import DetectionDataset, ensure_toy_dataset, toy
from sp_yolo.errors import StorageError, UserError


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_it_is_read_as_a_dataset_without_a_single_warning(tmp_path: Path) -> None:
    config = load_dataset_config(ensure_toy_dataset(tmp_path / "toy", train=30, val=5))
    assert config.names == toy.NAMES
    train, val = (DetectionDataset(config, split, 192) for split in ("train", "val"))
    assert (len(train), len(val)) == (30, 5) and not train.warnings and not val.warnings
    assert train.counts["boxes"] > 60 and train.shapes_wh.tolist() == [[192, 192]] * 30
    classes = np.concatenate(train.labels)[:, 0]
    assert set(classes.tolist()) == set(range(len(toy.NAMES)))


def test_it_is_the_same_every_time_and_both_splits_differ(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "toy", tmp_path / "b" / "toy"
    for root in (first, second):
        ensure_toy_dataset(root, train=4, val=4)
    one, two = _files(first), _files(second)
    del one["dataset.yaml"], two["dataset.yaml"]  # holds the root's path
    assert one == two and len(one) == 10
    assert one["images/train/train_0000.jpg"] != one["images/val/val_0000.jpg"]


def test_boxes_are_tight_around_what_is_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    # without noise, blur and texture an object is what differs from the flat background
    monkeypatch.setattr(toy, "_background", lambda rng, size: np.full((size, size, 3), 100, np.float32))
    monkeypatch.setattr(toy, "OBJECTS", (1, 1))
    monkeypatch.setattr(cv2, "GaussianBlur", lambda image, size, sigma: image)
    for seed in range(40):
        image, objects = toy.draw_image(np.random.default_rng(seed), 192)
        ((_, box),) = objects
        # an object stands out by 70 * 0.8 at least; the filter removes the noise of up to 9 levels
        ys, xs = np.nonzero(np.abs(cv2.medianBlur(image, 3).astype(int) - 100).max(2) > 40)
        np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], box, atol=2)


def test_only_what_is_missing_is_made_again(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    ensure_toy_dataset(root, train=3, val=2)
    before = _files(root)
    marker = root / "images" / "train" / "train_0001.jpg"
    stamp = marker.stat().st_mtime_ns
    ensure_toy_dataset(root, train=3, val=2)
    assert marker.stat().st_mtime_ns == stamp
    for victim in ("images/train/train_0002.jpg", "annotations/val.json", "dataset.yaml"):
        (root / victim).unlink()
        ensure_toy_dataset(root, train=3, val=2)
        assert _files(root) == before
    ensure_toy_dataset(root, train=4, val=2)  # other constants: made anew
    assert len(json.loads((root / "annotations" / "train.json").read_text())["images"]) == 4
    assert os.listdir(tmp_path) == ["toy"]


def test_an_interruption_leaves_no_half_made_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, calls = toy.draw_image, 0

    def interrupted(rng: np.random.Generator, size: int) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return draw(rng, size)

    monkeypatch.setattr(toy, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_toy_dataset(tmp_path / "toy", train=4, val=2)
    assert os.listdir(tmp_path) == []
    ensure_toy_dataset(tmp_path / "toy", train=4, val=2)
    assert len(_files(tmp_path / "toy")) == 9


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        ensure_toy_dataset(tmp_path / "toy", train=1, val=1)
    assert (tmp_path / "toy" / "thesis.tex").read_text() == "years of work"


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="cannot be written"):
        ensure_toy_dataset(tmp_path / "file" / "toy", train=1, val=1)
