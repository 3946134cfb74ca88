from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.datasets import RECIPE, picture, yolo_set

from sp_yolo.config import DatasetConfig
from sp_yolo.data import DetectionDataset, build_loader
from sp_yolo.data.cache import DiskCache, MemoryCache, bytes_in, cache_folder
from sp_yolo.data.shared import SharedBlock

ROW = "0 0.5 0.5 0.2 0.4\n"
Usage = namedtuple("Usage", "total used free")


def _training(config: DatasetConfig, size: int = 64, **options: object) -> DetectionDataset:
    return DetectionDataset(config, "train", size, **({"augment": RECIPE} | options))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- memory
def test_memory_cache_keeps_what_fits_and_says_so() -> None:
    loads: list[int] = []

    def load(index: int) -> np.ndarray:
        loads.append(index)
        return np.full((2, 5 + index, 3), index, np.uint8)

    sizes = np.array([(5 + index, 2) for index in range(5)])
    cache = MemoryCache(load, sizes, budget=3 * 2 * (5 + 6 + 7))
    assert sorted(loads) == [0, 1, 2] and "3 of 5 cached" in cache.note and not cache.complete
    for index in range(5):
        assert cache(index).shape == (2, 5 + index, 3) and (cache(index) == index).all()
    assert set(loads[3:]) == {3, 4}
    with pytest.raises(ValueError, match="read-only"):  # it would be another image for everyone from then on
        cache(0)[:] = 9


def _answer(blocks: list[SharedBlock], answers: multiprocessing.SimpleQueue[list[int]]) -> None:
    answers.put([int(block.bytes[7]) for block in blocks])
    for block in blocks:
        block.bytes[8] = 44


def test_a_shared_block_is_the_same_memory_in_a_started_process(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [SharedBlock(100)]
    monkeypatch.delattr(os, "memfd_create")  # as on systems other than Linux
    blocks.append(SharedBlock(100))
    for block in blocks:
        block.bytes[7] = 33
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_answer, args=(blocks, answers))
    process.start()
    assert answers.get() == [33, 33]
    process.join()
    assert [block.bytes[8] for block in blocks] == [44, 44]


def test_a_shared_block_is_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    block = SharedBlock(1 << 20)
    assert len(os.listdir("/proc/self/fd")) > before
    del block
    assert len(os.listdir("/proc/self/fd")) == before


def test_started_workers_share_the_cache_instead_of_getting_a_copy(tmp_path: Path) -> None:
    """50 MB of pixels; pickled whole they went into every worker."""
    config = yolo_set(tmp_path, {str(n): ROW for n in range(6)})
    dataset = _training(config, 2048, cache_images=True)
    assert dataset.in_memory and sum(3 * 2048 * 1365 for _ in range(6)) > 50e6
    assert len(pickle.dumps(dataset)) < 1e5
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"")  # what the workers show can only come from the cache
    expected = next(build_loader(dataset, batch_size=2, shuffle=True, seed=1).epoch(0))
    loader = build_loader(dataset, batch_size=2, shuffle=True, seed=1, workers=1)
    loader._torch_loader.multiprocessing_context = "forkserver"
    batch = next(loader.epoch(0))
    loader.close()
    np.testing.assert_array_equal(batch.images, expected.images)


# ---------------------------------------------------------------------------------------------------------------- disk
def test_disk_cache_without_room_goes_on_uncached(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cache = DiskCache(lambda index: np.zeros(3, np.uint8), ["a"], 3, blocked / "cache", "v")
    assert "not cached" in cache.note and cache(0).shape == (3,)


@pytest.mark.parametrize(
    ("free_memory", "free_disk", "outcome"),
    [
        (10.1, 0, "memory"),  # below a tenth of the memory
        (9.9, 10.1, "disk"),
        (9.9, 9.9, "none"),  # more than a tenth of the disk
        (2.1, 1000, "disk"),  # below half of the memory: read from there once written
        (1.9, 1000, "none"),
    ],
)
def test_what_is_cached_without_being_asked(
    tmp_path: Path, free_memory: float, free_disk: float, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free bytes in multiples of what the images need."""
    config = yolo_set(tmp_path, {str(n): ROW for n in range(4)})
    need = 4 * 3 * 64 * 42
    monkeypatch.setattr("sp_yolo.data.cache.free_memory", lambda: int(free_memory * need))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, int(free_disk * need)))
    dataset = _training(config, cache_images="auto")
    for index in range(4):
        dataset.item(index)
    kept = bytes_in_tree(tmp_path / ".image_cache")
    words = {"memory": "cached in memory", "disk": f"cached in {tmp_path}", "none": "not cached"}
    assert words[outcome] in dataset.cache_note and "\n" not in dataset.cache_note
    assert dataset.in_memory == (outcome == "memory") and (kept >= need) == (outcome == "disk")
    measured = DetectionDataset(config, "val", 64, cache_images="auto")  # looked at once an epoch: never on disk
    measured.item(0)
    assert bytes_in_tree(tmp_path / ".image_cache") == kept


def test_a_cache_that_is_there_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yolo_set(tmp_path, {str(n): ROW for n in range(4)})
    need = 4 * 3 * 64 * 42
    monkeypatch.setattr("sp_yolo.data.cache.free_memory", lambda: 5 * need)
    for free in (11, 0):  # written in the first run, which leaves little
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(10**9, 0, free * need))
        dataset = _training(config, cache_images="auto")
        assert "are cached in" in dataset.cache_note
        for epoch in range(20):
            dataset.item(epoch % 4, epoch)


def test_data_that_cannot_be_written_to_are_cached_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yolo_set(tmp_path / "set", {"1": ROW})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    allowed = os.access  # a superuser may write anywhere, so the folder's mode would not do
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != config.root and allowed(path, mode))
    other = cache_folder(tmp_path / "other")
    assert cache_folder(config.root).is_relative_to(tmp_path / "cache" / "sp-yolo") and other != config.root
    dataset = _training(config, cache_images="disk")
    dataset.item(0)
    assert str(tmp_path / "cache") in dataset.cache_note and not (config.root / ".image_cache").exists()
    assert bytes_in_tree(tmp_path / "cache") >= 3 * 64 * 42


def bytes_in_tree(folder: Path) -> int:
    return sum(bytes_in(each) for each in [folder, *folder.rglob("*")] if each.is_dir()) if folder.exists() else 0


# ----------------------------------------------------------------------------------------------------- reduced decoding
def test_training_decodes_large_jpegs_reduced_and_nothing_else_does(tmp_path: Path) -> None:
    """By what the pixels are: 1 px stripes are gray after averaging, and aliased where every third pixel is taken."""
    config = yolo_set(tmp_path, {"1": ROW})
    (tmp_path / "images" / "1.png").unlink()
    stripes = np.zeros((400, 600, 3), np.uint8)
    stripes[:, ::2] = 255
    cv2.imwrite(str(tmp_path / "images" / "1.jpg"), stripes, [cv2.IMWRITE_JPEG_QUALITY, 100])
    still = replace(RECIPE, mosaic=0.0, mixup=0.0, degrees=0.0, translate=0.0, scale=0.0, shear=0.0)

    def contrast(**options: object) -> float:
        return float(_training(config, 200, augment=still, **options)._read_resized(0).std())

    reduced, compat = contrast(), contrast(compat=True)
    assert reduced < 10 and compat > 50
    measured = DetectionDataset(config, "val", 200)._read_resized(0)
    exact = cv2.resize(cv2.imread(str(tmp_path / "images" / "1.jpg")), (200, 133), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(measured, exact)


@pytest.mark.parametrize("longest", [127, 128, 255, 256, 512, 1030])
def test_reduced_decoding_keeps_size_boxes_and_picture(tmp_path: Path, longest: int) -> None:
    config = yolo_set(tmp_path, {"1": ROW})
    (tmp_path / "images" / "1.png").unlink()
    image = picture(longest * 3 // 5, longest, seed=3)
    cv2.imwrite(str(tmp_path / "images" / "1.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    reduced, whole = _training(config, 64), _training(config, 64, compat=True)
    first, second = reduced._read_resized(0), whole._read_resized(0)
    assert first.shape == second.shape and max(first.shape) == 64
    np.testing.assert_allclose(reduced.item(0).labels, whole.item(0).labels, atol=1e-6)
    exact = cv2.resize(image, first.shape[1::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(first - exact).mean() < 2.5
