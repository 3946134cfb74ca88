from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.datasets import coco_document, voc_object

from sp_yolo.data.labels.annotation import CROWD, LabelFile
from sp_yolo.data.labels.coco import coco_labels, read_coco
from sp_yolo.data.labels.voc import read_voc, read_voc_list, voc_split
from sp_yolo.data.labels.yolo import read_yolo
from sp_yolo.errors import UserError


def _yolo(folder: Path, text: str, *, compat: bool = False) -> LabelFile:
    path = folder / "x.txt"
    path.write_text(text)
    return read_yolo(path, 3, compat=compat)


def _voc(folder: Path, xml: str) -> LabelFile:
    path = folder / "x.xml"
    path.write_text(xml)
    return read_voc(path, {"a": 0, "b": 1}, (60, 40))


# -------------------------------------------------------------------------------------------------------------- YOLO
def test_yolo_boxes_and_polygons_are_told_apart_line_by_line(tmp_path: Path) -> None:
    found = _yolo(tmp_path, "0 0.5 0.5 0.2 0.4\n\n2 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6\n1 0.1 0.1 0.4 0.1 0.2 0.3\n")
    expected = [[0, 0.5, 0.5, 0.2, 0.4], [2, 0.2, 0.4, 0.2, 0.4], [1, 0.25, 0.2, 0.3, 0.2]]
    np.testing.assert_allclose(found.labels, expected, atol=1e-7)
    assert found.segments is not None and [len(polygon) for polygon in found.segments] == [0, 4, 3]
    assert not found.problems.reasons


def test_yolo_compat_reads_the_whole_file_as_polygons(tmp_path: Path) -> None:
    found = _yolo(tmp_path, "0 0.5 0.6 0.2 0.4\n2 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6\n", compat=True)
    # the first row is now the points (.5, .6) and (.2, .4)
    np.testing.assert_allclose(found.labels, [[0, 0.35, 0.5, 0.3, 0.2], [2, 0.2, 0.4, 0.2, 0.4]], atol=1e-7)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0 0.5 0.5 0.2", "wrong column count"),
        ("0 0.5 0.5 0.2 0.2 9", "wrong column count"),
        ("0 0.5 0.5 0.2 x", "not a number"),
        ("0 nan 0.5 0.2 0.2", "not finite"),
        ("0 0.5 0.5 inf 0.2", "not finite"),
        ("0 -0.5 0.5 0.2 0.2", "outside the image"),
        ("0 0.5 1.5 0.2 0.2", "outside the image"),
        ("-1 0.5 0.5 0.2 0.2", "bad class"),
        ("0.5 0.5 0.5 0.2 0.2", "bad class"),
        ("3 0.5 0.5 0.2 0.2", "class beyond nc"),
        ("0 0.5 0.5 0 0.2", "zero area"),
        ("1 0.1 0.1 0.1 0.3 0.1 0.5", "zero area"),
        ("1 0.4 0.4 0.1 0.1", "duplicate"),
    ],
)
def test_yolo_bad_row_is_dropped_and_named_once(tmp_path: Path, row: str, reason: str) -> None:
    found = _yolo(tmp_path, f"1 0.4 0.4 0.1 0.1\n{row}\n{row}\n2 0.6 0.6 0.1 0.1\n")
    np.testing.assert_allclose(found.labels[:, 0], [1, 2])
    assert found.problems.reasons == {reason: 2}
    message = str(found.problems)
    assert message.startswith(f"{tmp_path / 'x.txt'}:2: {reason}: ") and message.endswith("(and 1 more in this file)")
    assert "\n" not in message


def test_yolo_without_rows_or_file_or_text(tmp_path: Path) -> None:
    assert _yolo(tmp_path, " \n\n").labels.shape == (0, 5)
    assert read_yolo(tmp_path / "none.txt", 3).labels.shape == (0, 5)
    (tmp_path / "binary.txt").write_bytes(b"\xff\x00\x80")
    assert read_yolo(tmp_path / "binary.txt", 3).problems.reasons == {"unreadable label file": 1}


# --------------------------------------------------------------------------------------------------------------- VOC
def test_voc_boxes_in_pixels_and_difficult_as_ignore(tmp_path: Path) -> None:
    found = _voc(tmp_path, f"<annotation>{voc_object()}{voc_object('b', (30, 20, 70, 60), 1)}</annotation>")
    np.testing.assert_allclose(found.labels, [[0, 0.2, 0.2, 0.2, 0.2]], atol=1e-7)
    assert found.truth is not None
    np.testing.assert_allclose(found.truth, [[0, 6, 4, 12, 8, 96, 0], [1, 30, 20, 30, 20, 600, 1]])


def test_a_box_across_the_border_is_clipped(tmp_path: Path) -> None:
    found = _voc(
        tmp_path, f"<annotation>{voc_object(box=(-6, -4, 6, 4))}{voc_object(box=(54, 36, 66, 48))}</annotation>"
    )
    np.testing.assert_allclose(found.labels, [[0, 0.05, 0.05, 0.1, 0.1], [0, 0.95, 0.95, 0.1, 0.1]], atol=1e-7)


@pytest.mark.parametrize(
    ("xml", "reason", "line"),
    [
        (voc_object("c"), "unknown class", 2),
        (voc_object(box=(6, 4, 6, 12)), "zero area", 2),
        (voc_object(box=(70, 4, 80, 12)), "outside the image", 2),
        (voc_object(box=("six", 4, 8, 12)), "not a number", 2),
        (voc_object(box=("nan", 4, 8, 12)), "not finite", 2),
        (voc_object(box=("", 4, 8, 12)), "missing field", 2),
        (voc_object(""), "missing field", 2),
        ("<object><name>a</name></object>", "missing field", 2),
        (f"{voc_object()}<object></object>", "missing field", 5),
        (f"{voc_object()}{voc_object()}", "duplicate", 5),
        ("<size><width>61</width></size>", "declared size differs", 2),
    ],
)
def test_voc_fault_is_named_with_its_line(tmp_path: Path, xml: str, reason: str, line: int) -> None:
    found = _voc(tmp_path, f"<annotation>\n{xml}</annotation>")
    assert found.problems.reasons + found.problems.notes == {reason: 1}
    assert str(found.problems).startswith(f"{tmp_path / 'x.xml'}:{line}: {reason}: ")


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<annotation>\n<object>",
        "no xml",
        "<annotation></annotation><annotation/>",
        '<?xml version="1.0" encoding="klingon"?><annotation/>',
    ],
)
def test_voc_malformed(tmp_path: Path, xml: str) -> None:
    found = _voc(tmp_path, xml)
    assert found.unread == "malformed XML" and len(found.labels) == 0
    assert found.problems.reasons["malformed XML"] == xml.count("<object>")  # what is lost with the file
    assert "\n" not in str(found.problems)


def test_voc_entity_bomb_is_refused_before_it_goes_off(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    found = _voc(tmp_path, f'<!DOCTYPE a [<!ENTITY e0 "lol">{entities}]>\n<annotation>&e11;</annotation>')
    assert "document type" in str(found.problems)


def test_voc_split_names(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / year / "ImageSets" / "Main").mkdir(parents=True)
        (tmp_path / year / "ImageSets" / "Main" / "train.txt").write_text("000001  1\n000002 -1\n")
    folder, split, listed = voc_split("VOC2012/train", tmp_path)
    assert (folder, split) == (tmp_path / "VOC2012", "train")
    assert read_voc_list(listed) == [(1, "000001"), (2, "000002")]
    assert voc_split(str(listed), tmp_path) == (folder, split, listed)
    with pytest.raises(UserError, match="no such file"):
        voc_split("VOC2007/test", tmp_path)
    listed.write_text("ok\n../../secret\n")
    with pytest.raises(UserError, match=r"train.txt:2: .*leads out"):
        read_voc_list(listed)


# -------------------------------------------------------------------------------------------------------------- COCO
def _coco(folder: Path, document: object) -> Path:
    path = folder / "x.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_coco_sparse_categories_crowd_and_area(tmp_path: Path) -> None:
    document = read_coco(_coco(tmp_path, coco_document()), ["a", "b", "c"])
    assert document.category_ids == {0: 7, 1: 90}
    found = coco_labels(document.path, document.images[0], (60, 40))
    np.testing.assert_allclose(found.labels, [[0, 0.2, 0.2, 0.2, 0.2]], atol=1e-7)
    assert found.truth is not None
    np.testing.assert_allclose(found.truth, [[0, 6, 4, 12, 8, 50, 0], [1, 0, 0, 60, 40, 2400, CROWD]])


def test_coco_ids_may_be_words_or_numbers(tmp_path: Path) -> None:
    document = coco_document(
        images=[{"id": "0005", "file_name": "one.png"}],
        categories=[{"id": "dog", "name": "a"}],
        annotations=[{"image_id": "0005", "category_id": "dog", "bbox": [1, 2, 3, 4]}],
    )
    found = read_coco(_coco(tmp_path, document), ["a"])
    assert found.category_ids == {0: 1} and len(found.images[0].rows) == 1
    mixed = coco_document()
    mixed["annotations"] = [{"image_id": "9", "category_id": "7", "bbox": [1, 2, 3, 4]}]
    assert len(read_coco(_coco(tmp_path, mixed), ["a"]).images[1].rows) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": 6}, "unknown image"),
        ({"category_id": 8}, "unknown category"),
        ({"category_id": 90}, "unknown class"),
    ],
)
def test_coco_annotation_that_points_nowhere_is_counted(tmp_path: Path, change: dict[str, int], reason: str) -> None:
    annotation = {"image_id": 5, "category_id": 7, "bbox": [6, 4, 12, 8]}
    found = read_coco(_coco(tmp_path, coco_document(annotations=[annotation, annotation | change])), ["a"])
    assert found.problems.reasons == {reason: 1} and "annotations[1]" in str(found.problems)
    assert len(found.images[0].rows) == 1


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([6, 4, 0, 8], "zero area"),
        ([6, 4, -3, 8], "zero area"),
        ([61, 4, 3, 8], "outside the image"),
        ([6, 4, 3], "malformed annotation"),
        ([6, 4, 3, "8"], "not a number"),
        ([6, 4, 3, float("nan")], "not finite"),
        ([6, 4, 3, 10**400], "not finite"),
        (None, "missing field"),
        ("6 4 3 8", "malformed annotation"),
    ],
)
def test_coco_bad_box_is_dropped_everywhere(tmp_path: Path, box: object, reason: str) -> None:
    document = read_coco(
        _coco(tmp_path, coco_document(annotations=[{"image_id": 5, "category_id": 7, "bbox": box}])), ["a"]
    )
    found = coco_labels(document.path, document.images[0], (60, 40))
    assert found.problems.reasons == {reason: 1}
    assert len(found.labels) == 0 and found.truth is not None and len(found.truth) == 0


def test_coco_polygons(tmp_path: Path) -> None:
    square = [6, 4, 18, 4, 18, 12, 6, 12]
    annotation = {"image_id": 5, "category_id": 7, "bbox": [6, 4, 12, 8]}
    shapes: list[object] = [
        [square],
        [square, square],
        {"counts": "abc", "size": [40, 60]},
        [[1, 2, 3]],
        "nonsense",
        [],
    ]
    annotations = [annotation | {"bbox": [6, 4, 12, 8 + n], "segmentation": shape} for n, shape in enumerate(shapes)]
    document = read_coco(_coco(tmp_path, coco_document(annotations=annotations)), ["a"])
    segments = coco_labels(document.path, document.images[0], (60, 40)).segments
    assert segments is not None and [len(polygon) for polygon in segments] == [4, 8, 0, 0, 0, 0]
    np.testing.assert_allclose(segments[0], [[0.1, 0.1], [0.3, 0.1], [0.3, 0.3], [0.1, 0.3]], atol=1e-7)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "x.json:1: not valid JSON"),
        ('{"images": ' + "[" * 100000, "cannot be read as JSON"),
        ("[" * 100000, "expected a COCO object"),
        ("[]", "expected a COCO object"),
        ("{}", "'images' is missing"),
        (coco_document(categories=None), "'categories' is missing"),
        (coco_document(annotations=3), "'annotations' is missing or no list"),
        (coco_document(images=[{"id": 1}]), "file_name"),
        (coco_document(images=[{"id": 1, "file_name": "a"}, {"id": "1", "file_name": "b"}]), "appears twice"),
        (coco_document(images=[{"id": 1.5, "file_name": "a"}]), "id must be"),
        (coco_document(categories=[{"id": 1, "name": "zebra"}]), "none of its categories"),
        (coco_document(categories=[{"id": 1, "name": "a"}, {"id": "1", "name": "b"}]), "appears twice"),
        (coco_document(categories=["a"]), "expected an object with id and name"),
    ],
)
def test_coco_malformed_file_is_one_line(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_coco(_coco(tmp_path, document), ["a", "b"])
    assert "\n" not in str(caught.value) and "x.json" in str(caught.value)
