"""A detection data set with few training images: the same val and test splits, a random part of the training split."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from sp_yolo.config import DatasetConfig
from sp_yolo.data import DetectionDataset
from sp_yolo.engine.splits import open_dataset
from sp_yolo.errors import UserError
from sp_yolo.runtime.folder import RunDir

_ANY_SIZE = 32  # px: labels are read, pixels are not


def subset_yaml(data: str, root: str, samples: int, seed: int, folder: Path, *, val_samples: int = 0) -> str:
    """Write ``data`` with ``samples`` training images, drawn by ``seed``, below ``folder``/data; path of its YAML.

    ``val_samples``: at most so many images of the other splits, the same ones for every seed. 0: all of them.

    All splits are written as COCO json, whatever the format of ``data``.

    Raises:
        UserError: there are fewer training images.
    """
    few = f"-{val_samples}" if val_samples else ""
    target = folder / "data" / f"{Path(data).stem}-{samples}{few}-seed{seed}"
    target.mkdir(parents=True, exist_ok=True)
    dataset = open_dataset(data, root)
    lines: dict[str, Any] = {"format": "coco", "root": str(target.resolve()), "images": {}}
    for split in ("train", "val", "test"):
        if getattr(dataset, split):
            content, images = _as_coco(dataset, split)
            if split == "train" and samples:
                content = _drawn(content, samples, seed, data)
            elif split != "train" and 0 < val_samples < len(content["images"]):
                content = _drawn(content, val_samples, 0, data)
            RunDir(target).write(f"{split}.json", json.dumps(content))
            lines[split] = f"{split}.json"
            lines["images"][split] = images
    RunDir(target).write_yaml("data.yaml", {**lines, "names": list(dataset.names)})
    return str(target / "data.yaml")


def _as_coco(dataset: DatasetConfig, split: str) -> tuple[dict[str, Any], str]:
    """One split as a COCO dict whose file names are relative to the folder that is returned with it."""
    data = DetectionDataset(dataset, split, _ANY_SIZE)
    content = data.ground_truth()
    paths = [os.path.abspath(data.path(index)) for index in range(len(content["images"]))]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    for image, path in zip(content["images"], paths, strict=True):
        image["file_name"] = os.path.relpath(path, folder)
    return content, folder


def _drawn(content: dict[str, Any], samples: int, seed: int, data: str) -> dict[str, Any]:
    images = content["images"]
    if samples > len(images):
        raise UserError(f"samples = {samples}: {data} has {len(images)} training images")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:samples])
    kept = [images[index] for index in chosen]
    ids = {image["id"] for image in kept}
    annotations = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    return {**content, "images": kept, "annotations": annotations}
