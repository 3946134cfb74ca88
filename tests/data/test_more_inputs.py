"""Further inputs as Roboflow, CVAT, Label Studio, labelImg, VIA, Kaggle, Windows and macOS leave them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.datasets import coco_document, labelled, put, totals, voc_object

from sp_yolo.config import DatasetConfig, load_dataset_config
from sp_yolo.data import describe_folder
from sp_yolo.data.index import scan
from sp_yolo.errors import UserError


def yolo(root: Path, **splits: str) -> DatasetConfig:
    return DatasetConfig(root / "x.yaml", root, ("a", "b"), **{key: (str(root / at),) for key, at in splits.items()})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ whole folders
def cvat_yolo(root: Path) -> None:
    """CVAT's 'YOLO 1.1': the list says data/obj_train_data, the folder has no data."""
    labelled(root, *(f"obj_train_data/frame {n}.png" for n in range(4)))
    put(root / "obj.names", "a\nb\n")
    put(root / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    put(root / "train.txt", "".join(f"data/obj_train_data/frame {n}.png\n" for n in range(4)))


def label_studio(root: Path) -> None:
    labelled(root, *(f"images/{n}-x.jpg" for n in range(4)))
    put(root / "classes.txt", "a\nb\n")
    put(root / "notes.json", '{"categories": [{"id": 0, "name": "a"}], "info": {"contributor": "Label Studio"}}')


def labelimg_voc(root: Path) -> None:
    for n in range(4):
        put(root / f"{n}.jpg")
        put(root / f"{n}.xml", f"<annotation verified='yes'>{voc_object('b' if n else 'a')}</annotation>")


def kaggle_voc(root: Path) -> None:
    for n in range(4):
        put(root / "images" / f"maks{n}.png")
        put(root / "annotations" / f"maks{n}.xml", f"<annotation>{voc_object('b' if n else 'a')}</annotation>")


def roboflow_voc(root: Path) -> None:
    for split in ("train", "valid"):
        for n in range(2):
            put(root / split / f"{n}_jpg.rf.{split}.jpg")
            put(root / split / f"{n}_jpg.rf.{split}.xml", f"<annotation>{voc_object('ab'[n])}</annotation>")


def coco_root(root: Path) -> None:
    put(root / "images" / "one.png"), put(root / "images" / "two.png")
    put(root / "annotations.json", json.dumps(coco_document()))


def darknet_flat(root: Path) -> None:
    labelled(root, *(f"{n}.JPG" for n in range(4)))
    put(root / "classes.txt", "a\nb\n")
    put(root / "train.txt", "\n".join(f"{n}.JPG" for n in range(3)))
    put(root / "valid.txt", "3.JPG\n")


def images_by_split_labels_flat(root: Path) -> None:
    labelled(
        root, "images/train/1.jpg", "images/train/2.jpg", "images/train/3.jpg", "images/val/4.jpg", labels="labels"
    )
    put(root / "labels" / "classes.txt", "a\nb\n")


def zip_of_a_mac(root: Path) -> None:
    labelled(root, *(f"train/images/{n}.jpg" for n in range(3)), "valid/images/9.jpg")
    put(root / "__MACOSX" / "train" / "images" / "._1.jpg", b"\0\5\x16\7")
    put(root / "train" / "images" / "@eaDir" / "1.jpg" / "SYNOPHOTO_THUMB_M.jpg")
    put(root / "data.yaml", "train: ../train/images\nval: ../valid/images\n\nnc: 2\nnames: ['a', 'b']\n")


@pytest.mark.parametrize(
    ("make", "images", "boxes"),
    [
        (cvat_yolo, 4, 4),
        (label_studio, 4, 4),
        (labelimg_voc, 4, 4),
        (kaggle_voc, 4, 4),
        (roboflow_voc, 4, 4),
        (coco_root, 2, 2),
        (darknet_flat, 4, 4),
        (images_by_split_labels_flat, 4, 4),
        (zip_of_a_mac, 4, 4),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_folder_is_enough(tmp_path: Path, make: object, images: int, boxes: int) -> None:
    root = tmp_path / "Äpfel & Birnen 100% #1 [x]"
    make(root)  # type: ignore[operator]
    config = describe_folder(root)
    assert config.names == ("a", "b")
    train, val = scan(config, "train"), scan(config, "val")
    assert len(train.entries) + len(val.entries) == images and train.tally.boxes + val.tally.boxes == boxes
    assert val.entries and not {entry.path for entry in train.entries} & {entry.path for entry in val.entries}
    for index in (train, val):
        assert not index.tally.dropped.total() + index.tally.unread.total() + index.tally.no_label_file
        assert not index.tally.orphans and not index.tally.losses()
    assert any("held out" in note for note in config.notes) == config.held_out


def test_a_split_is_the_same_whatever_else_is_there(tmp_path: Path) -> None:
    labelled(tmp_path, *(f"images/{n}.jpg" for n in range(60)), *(f"images/s_jpg.rf.{n}.jpg" for n in range(9)))
    sides = [{Path(e.path).stem for e in scan(describe_folder(tmp_path), split).entries} for split in ("train", "val")]
    copies = [{name for name in side if name.startswith("s_jpg")} for side in sides]
    assert sorted(map(len, copies)) == [0, 9]  # copies of one picture are on one side
    assert 2 <= len(sides[1] - copies[1]) <= 12
    labelled(tmp_path, *(f"images/new{n}.jpg" for n in range(20)))
    after = {Path(entry.path).stem for entry in scan(describe_folder(tmp_path), "val").entries}
    assert {name for name in after if not name.startswith("new")} == sides[1]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "x.json",
            '{"version": "5.0", "shapes": [], "imagePath": "x.jpg"}',
            "labelme's json: convert it with labelme2coco",
        ),
        (
            "x.json",
            '[{"annotations": [{"result": [{"from_name": "l", "to_name": "i"}]}]}]',
            "Label Studio's json: export",
        ),
        ("via.json", '{"_via_settings": {}, "_via_img_metadata": {}}', "VIA's project: choose Annotation > Export"),
        ("annotations.xml", "<annotations>\n<version>1.1</version></annotations>", "CVAT's XML: export the task again"),
        ("train.csv", "filename,width,height,class,xmin,ymin,xmax,ymax\n", "a table of boxes: convert it to COCO"),
        ("_a.json", '[{"image": "x.jpg", "annotations": [{"label": "a", "coordinates": {}}]}]', "CreateML's json"),
    ],
)
def test_other_programs_files_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    put(tmp_path / "x.jpg")
    put(tmp_path / name, text)
    with pytest.raises(UserError) as caught:
        describe_folder(tmp_path)
    assert words in str(caught.value) and name in str(caught.value)
    config = yolo(tmp_path, train=".")
    with pytest.raises(UserError) as caught:
        scan(config, "train")
    assert words in str(caught.value)


# ------------------------------------------------------------------------------------------ the YAML
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: images\nvalid: images\nnames: [a]\n", ":2: unknown key 'valid' (did you mean 'val'?)"),
        ("train: images\nval: image\nnames: [a]\n", "(there is images)"),
        ("train: images\nnames: {1: a, 2: b}\n", "names are numbered 1..2, but class ids count from 0"),
        ("train: images\nkpt_shape: [17]\nnames: [a]\n", ":2: kpt_shape = [17]: must be [points, 2 or 3]"),
    ],
)
def test_what_a_yaml_gets_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError) as caught:
        load_dataset_config(put(tmp_path / "x.yaml", text))
    assert words in str(caught.value)


def test_a_yaml_is_read_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(tmp_path / "set", "images/1.jpg")
    monkeypatch.chdir(tmp_path / "set" / "images")
    texts = (
        "train: images",
        "path: .\ntrain: images",
        "train: set/images",
        "path: set\ntrain: images",
        "train: .\\images",
    )
    for text in (*texts, "train: ../images", "train: ./images/"):
        config = load_dataset_config(put(tmp_path / "set" / "x.yaml", f"{text}\nnc: 1\nnames: [a]\n"))
        assert totals(scan(config, "train")) == (1, 1), text


@pytest.mark.parametrize("form", ["voc", "auto"])
def test_voc_without_lists_of_its_own(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kaggle_voc(tmp_path / "set")
    yaml = put(tmp_path / "set" / "x.yaml", f"format: {form}\ntrain: images\nnames: [a, b]\n")
    for place in (tmp_path, tmp_path / "set"):
        monkeypatch.chdir(place)
        assert totals(scan(load_dataset_config(yaml), "train")) == (4, 4)
    put(tmp_path / "set" / "ImageSets" / "Main" / "train.txt", "maks1\nmaks2\n")
    for name, folder in (("JPEGImages", "images"), ("Annotations", "annotations")):
        (tmp_path / "set" / folder).rename(tmp_path / "set" / name)
    (tmp_path / "set" / "train").mkdir()  # the name of a list, and of a folder
    yaml = put(tmp_path / "set" / "y.yaml", "format: voc\ntrain: train\nnames: [a, b]\n")
    monkeypatch.chdir(tmp_path)
    assert totals(scan(load_dataset_config(yaml), "train")) == (2, 2)


# ------------------------------------------------------------------------------------------ list files
@pytest.mark.parametrize(
    "line",
    [
        "\ufeffimages/a b.jpg",
        '"images/a b.jpg"',
        "images\\a b.jpg",
        "images/a b.jpg 0,10,20,30,1",
        "images/a b.jpg,1",
        "images/a b.jpg\t1",
        "images/a b",
        "  images/a b.jpg  \r",
        "/content/drive/MyDrive/set/images/a b.jpg",
        "D:\\Nutzer\\ich\\set\\images\\a b.jpg",
    ],
)
def test_a_line_of_a_list(tmp_path: Path, line: str) -> None:
    labelled(tmp_path, "images/a b.jpg")
    put(tmp_path / "train.txt", f"{line}\n")
    index = scan(yolo(tmp_path, train="train.txt"), "train")
    assert totals(index) == (1, 1)
    assert bool(index.warnings) == (line[0] in "/D")  # another machine's path is followed, and said


def test_lists_of_two_splits_share_a_label_folder(tmp_path: Path) -> None:
    labelled(tmp_path, *(f"images/{n}.jpg" for n in range(4)))
    put(tmp_path / "train.txt", "images/0.jpg\nimages/1.jpg\n")
    put(tmp_path / "val.txt", "images/2.jpg\n")
    index = scan(yolo(tmp_path, train="train.txt", val="val.txt"), "train")
    assert index.tally.orphans == 1  # 3.txt, whose image is in no list
    assert "label files have no image" in index.warnings[0] and "3.txt" in index.warnings[0]


# ------------------------------------------------------------------------------------------ the folders
def test_links_that_lead_back_end(tmp_path: Path) -> None:
    labelled(tmp_path, "images/1.jpg", "images/sub/2.jpg")
    os.symlink(tmp_path / "images", tmp_path / "images" / "sub" / "again")
    os.symlink(tmp_path / "images" / "sub", tmp_path / "images" / "also")
    index = scan(yolo(tmp_path, train="images"), "train")
    assert totals(index) == (2, 2) and "2 links to folders that are listed already left out" in index.warnings[0]


def test_one_name_in_several_folders(tmp_path: Path) -> None:
    labelled(tmp_path, "images/day/1.jpg", "images/night/1.jpg")
    (tmp_path / "labels/night/1.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    index = scan(yolo(tmp_path, train="images"), "train")
    assert [int(entry.labels[0, 0]) for entry in index.entries] == [0, 1]
    assert len({entry.image_id for entry in index.entries}) == 2
