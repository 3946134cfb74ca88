"""Validation items, rect batches and collated targets against recorded numbers of a small YOLO data set."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from sp_yolo.config import DatasetConfig
from sp_yolo.data import DetectionDataset, build_loader

ORACLE = np.load(Path(__file__).parent / "oracle" / "letterbox.npz")
COUNT = 9


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DatasetConfig:
    root = tmp_path_factory.mktemp("letterbox")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for index in range(COUNT):
        cv2.imwrite(str(root / "images" / f"{index:02d}.png"), ORACLE[f"ds_image{index}_bgr"])
        np.savetxt(root / "labels" / f"{index:02d}.txt", ORACLE[f"ds_label{index}"], "%g")
    names = tuple("abcdef")
    return DatasetConfig(root / "data.yaml", root, names, val=(str(root / "images"),), format="yolo")


@pytest.mark.parametrize("case", ["rect64", "rect96_pad0", "square64"])
def test_items_are_as_recorded(config: DatasetConfig, case: str) -> None:
    arguments = json.loads(str(ORACLE[f"{case}_args"]))
    size, batch_size = arguments["img_size"], arguments.get("batch_size", 4)
    dataset = DetectionDataset(
        config, "val", size, rect=arguments["rect"], batch_size=batch_size, pad=arguments.get("pad", 0.0)
    )
    # images 1 and 7 have one aspect ratio: which comes first is the sorting's affair
    order = [int(Path(dataset.path(index)).stem) for index in range(len(dataset))]
    recorded = ORACLE[f"{case}_order"].tolist()
    assert [7 if image == 1 else image for image in order] == [7 if image == 1 else image for image in recorded]
    for index in range(COUNT):
        item = dataset[order.index(recorded[index])]
        assert dataset.shapes_wh[order.index(recorded[index])].tolist() == ORACLE[f"{case}_shapes_wh"][index].tolist()
        expected = ORACLE[f"{case}_{index}_img_chw_rgb"].transpose(1, 2, 0)
        assert item.image.shape == expected.shape
        # resizing differs by rounding between OpenCV versions
        assert np.abs(item.image.astype(int) - expected).max() <= 2
        np.testing.assert_allclose(item.labels, ORACLE[f"{case}_{index}_labels"][:, 1:], atol=1e-6)
        original_hw, ratio_pad = json.loads(str(ORACLE[f"{case}_{index}_shapes"]))
        assert item.meta.original_hw == tuple(original_hw)
        np.testing.assert_allclose(item.meta.ratio_pad, ratio_pad, rtol=1e-12)


@pytest.mark.parametrize("case", ["rect64", "rect96_pad0"])
def test_rect_batches(config: DatasetConfig, case: str) -> None:
    arguments = json.loads(str(ORACLE[f"{case}_args"]))
    dataset = DetectionDataset(
        config, "val", arguments["img_size"], rect=True, batch_size=arguments["batch_size"], pad=arguments["pad"]
    )
    loader = build_loader(dataset, batch_size=arguments["batch_size"], shuffle=False, seed=0)
    batches = list(loader.epoch(0))
    assert [batch.images.shape[2:] for batch in batches] == [tuple(hw) for hw in ORACLE[f"{case}_batch_shapes_hw"]]
    batch_of = [number for number, batch in enumerate(batches) for _ in batch.metas]
    assert batch_of == ORACLE[f"{case}_batch_index"].tolist()
    np.testing.assert_allclose(batches[0].targets.numpy(), ORACLE[f"{case}_collate0_targets"], atol=1e-6)
