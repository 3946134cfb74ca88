"""Further forms of labels and pictures: poses and polygons, COCO put together from exports, one class, odd pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.datasets import coco_document, coco_set, picture, voc_object, voc_set, yolo_set

from sp_yolo.config import DatasetConfig
from sp_yolo.config.text import NotText, decode, read_text
from sp_yolo.data.images import EXTENSIONS, ImageFault, is_image_name, read_image, read_size
from sp_yolo.data.index import scan
from sp_yolo.data.labels.annotation import LabelFile
from sp_yolo.data.labels.yolo import read_yolo, survey_rows
from sp_yolo.engine.review import losses, require_little_loss
from sp_yolo.errors import UserError

POSE_BOX = "0 0.5 0.5 0.4 0.6"
KEYPOINTS = [(0.35, 0.25), (0.65, 0.3), (0.4, 0.7), (0.6, 0.75)]


def read(folder: Path, text: str | bytes, **options: object) -> LabelFile:
    path = folder / "x.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_yolo(path, 3, **options)  # type: ignore[arg-type]


def pose_row(columns: int) -> str:
    """17 keypoints as COCO's, 2 or 3 columns each, some not labelled."""
    points = [(x, y, 2) for x, y in KEYPOINTS] + [(0.0, 0.0, 0)] * 13
    return " ".join([POSE_BOX, *(f"{value:g}" for point in points for value in point[:columns])])


# ---------------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb", "a\nb"),
        ("ä\r\n".encode("utf-16"), "ä\n"),
        ("\ufeffä".encode("utf-16-be"), "ä"),
        ("ä".encode("utf-32"), "ä"),
        (b"", ""),
    ],
)
def test_text_of_any_editor(data: bytes, text: str) -> None:
    assert decode(data) == text


def test_what_is_no_text_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(NotText, match=r"not UTF-8 text \(byte 0xe4 in line 2\): save it as UTF-8"):
        decode(b"a\n\xe4\n")
    (tmp_path / "x").write_bytes(b"0" * 11)
    with pytest.raises(NotText, match="11 bytes, at most 10"):
        read_text(tmp_path / "x", 10)


# ---------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize(
    ("row", "box"),
    [
        ("0 0.5 0.5 1.000001 1.0", (0.5, 0.5, 1, 1)),
        ("0 1.004 0.5 0.1 0.2", (0.977, 0.5, 0.046, 0.2)),
        ("0 -0.000001 0.5 0.2 0.2", (0.05, 0.5, 0.1, 0.2)),
        ("0 -0.001 0.1 0.4 0.1 0.2 1.002", (0.2, 0.55, 0.4, 0.9)),
        ("0 .5 5e-1 2E-1 +.4", (0.5, 0.5, 0.2, 0.4)),
    ],
)
def test_a_rounding_error_outside_is_cut(tmp_path: Path, row: str, box: tuple[float, ...]) -> None:
    found = read(tmp_path, row)
    np.testing.assert_allclose(found.labels, [[0, *box]], atol=1e-6)
    assert not found.problems.reasons


@pytest.mark.parametrize("columns", [2, 3])
def test_pose_rows_give_their_box(tmp_path: Path, columns: int) -> None:
    given = {"keypoints": 17 * columns} if columns == 2 else {}
    found = read(tmp_path, pose_row(columns), **given)
    np.testing.assert_allclose(found.labels, [[0, 0.5, 0.5, 0.4, 0.6]], atol=1e-7)
    assert found.problems.notes == {"keypoints behind the box not used": 1} and found.segments is None


def test_a_row_that_may_be_both_is_judged_by_its_company(tmp_path: Path) -> None:
    unsure = f"{POSE_BOX} " + " ".join(f"{value}" for point in KEYPOINTS for value in point)
    outline = "1 0.7 0.7 0.9 0.7 0.9 0.9 0.8 0.95 0.7 0.9"
    sets = {"refuse": [unsure, outline], "keypoints": [unsure] * 3, "polygon": [unsure] + [outline] * 9}
    for expected, rows in sets.items():
        paths = [tmp_path / f"{expected}{number}.txt" for number in range(len(rows))]
        for path, row in zip(paths, rows, strict=True):
            path.write_text(row)
        assert survey_rows(paths) == expected
    assert read(tmp_path, unsure).problems.reasons == {"polygon or keypoints": 1}
    assert "kpt_shape: [4, 2]" in str(read(tmp_path, unsure).problems)
    np.testing.assert_allclose(read(tmp_path, unsure, keypoints=8).labels, [[0, 0.5, 0.5, 0.4, 0.6]], atol=1e-7)
    as_polygon = read(tmp_path, unsure, ambiguous="polygon")
    assert as_polygon.segments is not None and len(as_polygon.segments[0]) == 6


def test_a_set_of_poses_is_read_as_such(tmp_path: Path) -> None:
    row = f"{POSE_BOX} " + " ".join(f"{value}" for point in KEYPOINTS for value in point)
    index = scan(yolo_set(tmp_path, {"1": row, "2": row, "3": ""}), "val")
    assert index.counts["keypoints behind the box not used"] == 2 and index.tally.boxes == 2
    assert index.tally.line().endswith("2 keypoints behind the box not used")


# ---------------------------------------------------------------------------------------------------- COCO
def coco(root: Path, document: object, mark: bytes = b"") -> DatasetConfig:
    config = coco_set(root, document)
    (root / "annotations.json").write_bytes(mark + json.dumps(document).encode())
    return config


def test_coco_exports_put_together(tmp_path: Path) -> None:
    first = coco_document()
    twice = {"id": 77, "file_name": "one.png", "width": 60, "height": 40}
    box = {"id": 9, "image_id": 77, "category_id": 8, "bbox": [20, 20, 9, 9], "iscrowd": "0"}
    document = {
        "images": [*first["images"], twice, first["images"][0]],  # type: ignore[misc, index]
        "categories": [*first["categories"], {"id": 8, "name": "a"}],  # type: ignore[misc]
        "annotations": [*first["annotations"], box],  # type: ignore[misc]
    }
    index = scan(coco(tmp_path, document, b"\xef\xbb\xbf"), "val")
    assert [len(entry.labels) for entry in index.entries] == [2, 1] and index.tally.ignored == 1
    assert index.entries[0].labels[:, 0].tolist() == [0, 0] and index.category_ids == [7, 90]
    assert index.tally.notes == {"image listed twice": 2}


@pytest.mark.parametrize("name", ["images\\one.png", "images/one.png", "no/such/folder/one.png", "./one.png"])
def test_coco_file_names_of_other_machines(tmp_path: Path, name: str) -> None:
    document = coco_document()
    document["images"][0]["file_name"] = name  # type: ignore[index]
    for config in (coco(tmp_path, document), replace(coco(tmp_path, document), images={})):
        assert [len(entry.labels) for entry in scan(config, "val").entries] == [1, 1]


def test_coco_crowds_as_tools_write_them(tmp_path: Path) -> None:
    box = {"image_id": 5, "category_id": 7, "bbox": [6, 4, 12, 8]}
    for value, crowd in ((1, True), ("1", True), (True, True), (0, False), ("0", False), (False, False), (None, False)):
        document = coco_document(annotations=[box | {"iscrowd": value}])
        index = scan(coco(tmp_path, document), "val")
        assert (index.tally.ignored, index.tally.boxes) == (int(crowd), int(not crowd)), value


# ---------------------------------------------------------------------------------------------------- one class
def test_one_class_takes_every_label(tmp_path: Path) -> None:
    """--single-cls with one name: the ids and names of the labels do not matter."""
    sets = [
        yolo_set(tmp_path / "yolo", {"1": "0 0.5 0.5 0.2 0.4\n7 0.2 0.2 0.2 0.2\n"}, ("thing",)),
        voc_set(tmp_path / "voc", {"1": voc_object("dog") + voc_object("cat", (20, 20, 40, 30))}, ("thing",)),
        replace(coco_set(tmp_path / "coco", coco_document()), names=("thing",)),
    ]
    for config, boxes in zip(sets, (2, 2, 2), strict=True):
        index = scan(config, "val", single_class=True)
        assert index.tally.boxes == boxes and not index.tally.dropped
        assert {float(row[0]) for entry in index.entries for row in entry.labels} == {0.0}


# ---------------------------------------------------------------------------------------------------- losses
def test_what_stops_before_training(tmp_path: Path) -> None:
    from sp_yolo.data import DetectionDataset

    rows = "".join(f"0 0.{n}5 0.5 0.04 0.04\n" for n in range(1, 9)) * 2
    good = {str(n): rows[: len(rows) // 2].replace("0.5 0.04", f"0.{n + 1}5 0.04") for n in range(8)}
    config = yolo_set(tmp_path, good)
    label = tmp_path / "labels" / "0.txt"
    cases = {
        "": (good["0"], True),
        "0 0.5 0.5 0 0.2\n": (good["0"] + "0 0.5 0.5 0 0.2\n", True),  # 1 of 65
        "zero area": (good["0"] + "".join(f"0 0.{n} 0.5 0 0.2\n" for n in range(1, 5)), False),  # 4 of 68
        "class beyond nc": (good["0"] + "3 0.5 0.5 0.2 0.2\n", False),  # one is enough
        "duplicate": (good["0"] * 3, True),  # nothing is lost
    }
    for reason, (text, trains) in cases.items():
        label.write_text(text)
        data = DetectionDataset(config, "val", 64)
        assert (not losses("val", data)) == trains, reason
        require_little_loss({"val": data}, accepted=True)
        if not trains:
            with pytest.raises(UserError, match=f"{reason}.*labels/0.txt:9: {reason}.*--accept-losses"):
                require_little_loss({"val": data}, accepted=False)


def test_an_image_whose_every_label_is_bad_is_no_background(tmp_path: Path) -> None:
    index = scan(yolo_set(tmp_path, {"1": "0 0.5 0.5 0.2 0.2\n", "2": "0 30 40 10 10\n", "3": ""}), "val")
    assert index.tally.unread == {"no usable label": 1} and index.tally.background == 1 and len(index.entries) == 2
    only_others = voc_set(tmp_path / "voc", {"1": voc_object("a"), "2": voc_object("zebra")})
    assert scan(only_others, "val").tally.background == 1  # labelled, with classes that are not asked for


# ---------------------------------------------------------------------------------------------------- pictures
READ = "avif bmp dib gif jp2 jpe jpeg jpg pbm pgm png pnm ppm ras tif tiff webp JPG PNG"


@pytest.mark.parametrize("suffix", READ.split())
def test_every_extension_that_the_reader_reads(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    image = picture(40, 60)
    image = image if suffix not in ("pgm", "pbm") else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    path.write_bytes(cv2.imencode(f".{suffix.lower()}", image)[1].tobytes())
    assert is_image_name(path) and f".{suffix.lower()}" in EXTENSIONS
    assert read_size(path) == (60, 40) and read_image(path).shape == (40, 60, 3)
    bare = path.rename(tmp_path / "no_extension")
    assert is_image_name(bare) and not is_image_name(tmp_path / "none") and not is_image_name("x.txt")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not read by OpenCV: convert it"),
        ("x.svg", b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "SVG is not read by OpenCV"),
        ("x.psd", b"8BPS\0\1" + b"\0" * 40, "PSD is not read by OpenCV"),
        ("x.jxl", b"\xff\x0a\xfa\x1f\x41" + b"\0" * 40, "JPEG XL is not read by OpenCV"),
        ("x.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("x.jpg", b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page: the download"),
    ],
)
def test_what_a_picture_really_is(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert is_image_name(path)  # called a picture: named, not passed over
    with pytest.raises(ImageFault, match=words):
        read_size(path)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_few_bits_in_sixteen(tmp_path: Path, bits: int) -> None:
    wide = np.linspace(0, 2**bits - 1, 60 * 40).astype(np.uint16).reshape(40, 60)
    cv2.imwrite(str(tmp_path / "x.png"), wide)
    image = read_image(tmp_path / "x.png")
    assert np.abs(image[..., 0].astype(int) - (wide >> (bits - 8))).max() <= 1 and image.max() == 255


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (0.0, 5000.0), (-3.0, 800.0)])
def test_floats(tmp_path: Path, low: float, high: float) -> None:
    values = np.linspace(low, high, 60 * 40).astype(np.float32).reshape(40, 60)
    values[0, 1] = np.nan
    cv2.imwrite(str(tmp_path / "x.tiff"), values)
    image = read_image(tmp_path / "x.tiff")
    assert image[0, 0, 0] == 0 and image[-1, -1, 0] == 255 and abs(int(image[20, 0, 0]) - 127) <= 2
    cv2.imwrite(str(tmp_path / "x.tiff"), np.full((20, 20), np.nan, np.float32))
    with pytest.raises(ImageFault, match="no finite pixel"):
        read_image(tmp_path / "x.tiff")
