"""Random damage in all three formats: labelled boxes = loaded + dropped + ignored, images found = used + unread."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.datasets import encoded, picture

from sp_yolo.config import DatasetConfig
from sp_yolo.data.index import scan
from sp_yolo.errors import UserError

NAMES = ("a", "b")
PICTURES = ("good", "good", "good", "cut", "empty", "text", "gone")
FILES = ("whole", "whole", "whole", "bom", "utf16", "crlf", "gone", "damaged")
BOXES = ("good", "good", "good", "class", "outside", "flat", "word", "nan", "ignored", "twice")


@dataclass(frozen=True)
class Made:
    """One image: what is done to its picture and its label file, and its boxes by kind."""

    picture: str
    file: str
    boxes: tuple[str, ...]


KINDS = st.lists(st.sampled_from(BOXES), max_size=4).map(tuple)
IMAGES = st.lists(st.builds(Made, st.sampled_from(PICTURES), st.sampled_from(FILES), KINDS), min_size=1, max_size=6)


def write_picture(path: Path, what: str, seed: int) -> None:
    data = encoded(picture(40, 60, seed), ".png")
    if what != "gone":
        path.write_bytes({"good": data, "cut": data[: len(data) // 2], "empty": b"", "text": b"no picture"}[what])


def encode(text: str, how: str) -> bytes:
    if how == "utf16":
        return text.encode("utf-16")
    text = text.replace("\n", "\r\n") if how == "crlf" else text
    return (b"\xef\xbb\xbf" if how == "bom" else b"") + text.encode()


def corners(kind: str, index: int) -> tuple[object, ...]:
    """xmin, ymin, xmax, ymax px of box ``index`` of an image of 60 x 40 px."""
    x, y = 2 + 7 * index, 3 + 5 * index
    odd = {"outside": (70, 50, 80, 60), "flat": (x, y, x, y + 4), "word": ("six", y, x + 6, y + 4)}
    return odd.get(kind, ("nan", y, x + 6, y + 4) if kind == "nan" else (x, y, x + 6, y + 4))


def yolo_row(kind: str, index: int) -> str:
    x1, y1, x2, y2 = (
        value if isinstance(value, int) else 0 for value in corners("good" if kind in ("word", "nan") else kind, index)
    )
    centre = [(x1 + x2) / 120, (y1 + y2) / 80, (x2 - x1) / 60, (y2 - y1) / 40]
    first = {"word": "six", "nan": "nan"}.get(kind, f"{centre[0]:.6f}")
    return f"{5 if kind == 'class' else index % 2} {first} {centre[1]:.6f} {centre[2]:.6f} {centre[3]:.6f}\n"


def yolo(root: Path, images: list[Made]) -> DatasetConfig:
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for number, made in enumerate(images):
        write_picture(root / "images" / f"{number}.png", made.picture, number)
        rows = [yolo_row(kind, index) for index, kind in enumerate(made.boxes)]
        rows += [rows[made.boxes.index("twice")]] if "twice" in made.boxes else []
        # a list of pictures, so that the one that is gone is missed; "damaged" bytes are no text
        data = b"".join(b"\xff\x81" + row.encode() for row in rows) if made.file == "damaged" else b""
        if made.file != "gone":
            (root / "labels" / f"{number}.txt").write_bytes(data or encode("".join(rows), made.file))
    listed = root / "list.txt"
    listed.write_text("".join(f"./images/{number}.png\n" for number in range(len(images))))
    return DatasetConfig(root / "x.yaml", root, NAMES, val=(str(listed),))


def voc(root: Path, images: list[Made]) -> DatasetConfig:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for number, made in enumerate(images):
        write_picture(root / "JPEGImages" / f"{number}.png", made.picture, number)
        objects = [voc_object(kind, index) for index, kind in enumerate(made.boxes)]
        objects += [objects[made.boxes.index("twice")]] if "twice" in made.boxes else []
        text = f"<annotation>\n{''.join(objects)}" + ("" if made.file == "damaged" else "</annotation>")
        if made.file != "gone":
            declared = '<?xml version="1.0"?>\n' if number % 2 else ""
            (root / "Annotations" / f"{number}.xml").write_bytes(encode(declared + text, made.file))
    (root / "ImageSets/Main/val.txt").write_text("".join(f"{number}\n" for number in range(len(images))))
    return DatasetConfig(root / "x.yaml", root, NAMES, val=("val",), format="voc")


def voc_object(kind: str, index: int) -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners(kind, index), strict=True)
    bounds = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    name = "zebra" if kind == "class" else NAMES[index % 2]
    difficult = f"<difficult>{int(kind == 'ignored')}</difficult>"
    return f"<object><name>{name}</name>{difficult}<bndbox>{bounds}</bndbox></object>\n"


def coco(root: Path, images: list[Made]) -> DatasetConfig:
    (root / "images").mkdir(parents=True)
    annotations: list[dict[str, object]] = []
    for number, made in enumerate(images):
        write_picture(root / "images" / f"{number}.png", made.picture, number)
        mine = [coco_box(kind, index, number) for index, kind in enumerate(made.boxes)]
        annotations += mine + ([mine[made.boxes.index("twice")]] if "twice" in made.boxes else [])
    document = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(len(images))],
        "categories": [{"id": index, "name": name} for index, name in enumerate((*NAMES, "zebra"))],
        "annotations": annotations,
    }
    path = root / "val.json"
    path.write_bytes(encode(json.dumps(document), images[0].file))
    return DatasetConfig(root / "x.yaml", root, NAMES, val=(str(path),), images={"val": root / "images"})


def coco_box(kind: str, index: int, image: int) -> dict[str, object]:
    x1, y1, x2, y2 = (float(value) if value != "six" else value for value in corners(kind, index))  # type: ignore[arg-type]
    box = [x1, y1, x2 - x1 if x1 != "six" else 6, y2 - y1]  # type: ignore[operator]
    category = 2 if kind == "class" else index % 2
    return {"image_id": image, "category_id": category, "bbox": box, "iscrowd": "1" if kind == "ignored" else "0"}


def labelled(images: list[Made], form: str) -> int:
    """Objects in the files, those that stand there twice counted twice."""
    count = 0
    for made in images:
        if form == "coco" or made.file != "gone":
            count += len(made.boxes) + ("twice" in made.boxes)
    return count


FORMS: dict[str, Callable[[Path, list[Made]], DatasetConfig]] = {"yolo": yolo, "voc": voc, "coco": coco}


@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_every_labelled_box_is_loaded_dropped_or_ignored(tmp_path: Path, form: str, examples: int) -> None:
    outcomes = {"read": 0, "refused": 0}

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(IMAGES)
    def run(images: list[Made]) -> None:
        root = tmp_path / "set"
        shutil.rmtree(root, ignore_errors=True)
        config = FORMS[form](root, images)
        try:
            index = scan(config, "val")
        except UserError as error:  # nothing in it can be used, which is said
            assert "no usable image" in str(error)
            outcomes["refused"] += 1
            return
        outcomes["read"] += 1
        tally = index.tally
        assert tally.boxes + tally.dropped.total() + tally.ignored == labelled(images, form)
        assert tally.boxes == sum(len(entry.labels) for entry in index.entries)
        assert tally.found == len(images) and tally.used == len(index.entries)
        unread = sum(made.picture != "good" for made in images)
        assert tally.unread.total() >= unread
        kept = [entry for entry in index.entries if not len(entry.labels)]
        assert len(kept) == tally.background + tally.no_label_file
        for reason in (*tally.dropped, *tally.unread):
            if tally.dropped[reason] or tally.unread[reason]:
                assert tally.examples[reason]
        assert all(np.isfinite(entry.labels).all() for entry in index.entries)

    run()
    assert outcomes["read"] > examples / 2
