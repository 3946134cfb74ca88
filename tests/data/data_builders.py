"""Small files for the data tests: images of every kind, YOLO, VOC and COCO sets."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from sp_yolo.config import AugmentRecipe, DatasetConfig

RECIPE = AugmentRecipe(
    mosaic=1.0,
    mixup=0.2,
    degrees=5.0,
    flipud=0.1,
    copy_paste=0.3,
    paste_in=0.3,
)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that JPEG keeps them within a few levels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def jpeg(image: np.ndarray, orientation: int | None = None, order: str = "<") -> bytes:
    """JPEG bytes, with an EXIF orientation when asked."""
    data: bytes = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    if orientation is None:
        return data
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    tiff += struct.pack(order + "HHIHH", 0x112, 3, 1, orientation, 0) + struct.pack(order + "I", 0)
    body = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def yolo_set(root: Path, labels: Mapping[str, str | None], names: Sequence[str] = ("a", "b", "c")) -> DatasetConfig:
    """images/NAME.png of 40 x 60 px and labels/NAME.txt per item (None: no label file), used for every split."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    for seed, (name, text) in enumerate(labels.items()):
        cv2.imwrite(str(root / "images" / f"{name}.png"), picture(40, 60, seed))
        if text is not None:
            (root / "labels" / f"{name}.txt").write_text(text)
    entries = (str(root / "images"),)
    return DatasetConfig(root / "data.yaml", root, tuple(names), train=entries, val=entries)


def coco_document(**changes: object) -> dict[str, object]:
    """Two images 60 x 40 with three boxes of categories 7 and 90, one of them a crowd."""
    document: dict[str, object] = {
        "images": [
            {"id": 5, "file_name": "one.png", "width": 60, "height": 40},
            {"id": 9, "file_name": "two.png", "width": 60, "height": 40},
        ],
        "categories": [{"id": 90, "name": "b"}, {"id": 7, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [6, 4, 12, 8], "area": 50.0, "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 90, "bbox": [0, 0, 60, 40], "area": 2400, "iscrowd": 1},
            {"id": 3, "image_id": 9, "category_id": 90, "bbox": [30, 20, 30, 20]},
        ],
    }
    return document | changes


def coco_set(root: Path, document: object, names: Sequence[str] = ("a", "b")) -> DatasetConfig:
    """images/one.png and two.png beside annotations.json, used for every split."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("one", "two")):
        cv2.imwrite(str(root / "images" / f"{name}.png"), picture(40, 60, seed))
    path = root / "annotations.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    entries = (str(path),)
    return DatasetConfig(
        root / "data.yaml",
        root,
        tuple(names),
        train=entries,
        val=entries,
        images={"train": root / "images", "val": root / "images"},
    )


def voc_object(name: str = "a", box: Sequence[object] = (6, 4, 18, 12), difficult: int = 0) -> str:
    tags = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object>\n<name>{name}</name><difficult>{difficult}</difficult>\n<bndbox>{tags}</bndbox></object>\n"


def voc_set(root: Path, objects: Mapping[str, str], names: Sequence[str] = ("a", "b")) -> DatasetConfig:
    """A VOC tree of 60 x 40 px images; ``objects``: image name -> the XML inside <annotation>."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for seed, (name, xml) in enumerate(objects.items()):
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(jpeg(picture(40, 60, seed)))
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>\n{xml}</annotation>\n")
    (root / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{name}\n" for name in objects))
    return DatasetConfig(root / "data.yaml", root, tuple(names), train=("train",), val=("train",), format="voc")
