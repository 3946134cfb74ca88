"""Small files: pictures of every kind, YOLO, VOC and COCO sets."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from sp_yolo.config import AugmentRecipe, DatasetConfig, load_dataset_config
from sp_yolo.data.index import Index

ROW = "0 0.5 0.5 0.2 0.4\n"

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


def encoded(image: np.ndarray, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def jpeg(image: np.ndarray, orientation: int, order: str = "<") -> bytes:
    """JPEG bytes with an EXIF orientation."""
    data = encoded(image)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    tiff += struct.pack(order + "HHIHH", 0x112, 3, 1, orientation, 0) + struct.pack(order + "I", 0)
    body = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def put(path: Path, content: str | bytes | None = None) -> Path:
    """Write a file; a picture of 60 x 40 px where no content is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        suffix = path.suffix if path.suffix in (".jpg", ".png", ".JPG", ".jfif") else ".png"
        content = encoded(picture(40, 60, len(path.stem)), suffix.replace("jfif", "jpg"))
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def labelled(root: Path, *images: str, labels: str = "") -> None:
    """Pictures with a label file of one row each, where it is looked for or in ``labels``."""
    for image in images:
        put(root / image)
        label = Path(labels) / Path(image).name if labels else Path(image.replace("images", "labels"))
        put((root / label).with_suffix(".txt"), ROW)


def totals(index: Index) -> tuple[int, int]:
    """Images and boxes."""
    return len(index.entries), index.tally.boxes


def described(root: Path, names: Sequence[str], text: str) -> DatasetConfig:
    """ROOT/data.yaml of ``text`` and the names, as the program reads it."""
    text += f"root: {root}\nnc: {len(names)}\nnames: [{', '.join(names)}]\n"
    return load_dataset_config(put(root / "data.yaml", text))


def yolo_set(
    root: Path,
    labels: Mapping[str, str | None],
    names: Sequence[str] = ("a", "b", "c"),
    pictures: Mapping[str, bytes] | None = None,
) -> DatasetConfig:
    """images/NAME.png of 40 x 60 px and labels/NAME.txt per item (None: no label file).

    NAMEs that begin with train/ and val/ are two splits; others are used for both. ``pictures``: the files in images/.
    """
    made = {f"{name}.png": encoded(picture(40, 60, seed), ".png") for seed, name in enumerate(labels)}
    for name, data in (pictures or made).items():
        put(root / "images" / name, data)
    for name, text in labels.items():
        if text is not None:
            put(root / "labels" / f"{name}.txt", text)
    places = [f"{split}/" if any(name.startswith(f"{split}/") for name in labels) else "" for split in ("train", "val")]
    return described(root, names, f"train: {root}/images/{places[0]}\nval: {root}/images/{places[1]}\n")


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


def coco_set(
    root: Path, document: object, names: Sequence[str] = ("a", "b"), pictures: Sequence[str] = ("one", "two")
) -> DatasetConfig:
    """images/one.png and two.png beside annotations.json, used for both splits."""
    for seed, name in enumerate(pictures):
        put(root / "images" / f"{name}.png", encoded(picture(40, 60, seed), ".png"))
    put(root / "annotations.json", document if isinstance(document, str) else json.dumps(document))
    return described(root, names, "train: annotations.json\nval: annotations.json\nimages: images\n")


def voc_object(name: str = "a", box: Sequence[object] = (6, 4, 18, 12), difficult: int = 0) -> str:
    tags = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object>\n<name>{name}</name><difficult>{difficult}</difficult>\n<bndbox>{tags}</bndbox></object>\n"


def voc_set(root: Path, objects: Mapping[str, str], names: Sequence[str] = ("a", "b")) -> DatasetConfig:
    """A VOC tree of 60 x 40 px images; ``objects``: image name -> the XML inside <annotation>."""
    for seed, (name, xml) in enumerate(objects.items()):
        put(root / "JPEGImages" / f"{name}.jpg", encoded(picture(40, 60, seed)))
        put(root / "Annotations" / f"{name}.xml", f"<annotation>\n{xml}</annotation>\n")
    put(root / "ImageSets" / "Main" / "train.txt", "".join(f"{name}\n" for name in objects))
    return described(root, names, "format: voc\ntrain: train\nval: train\n")
