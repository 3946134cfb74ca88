"""Exports of other programs, YAMLs of other machines, other habits of naming: what is to come of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.datasets import ROW, coco_document, coco_set, labelled, put, totals, voc_object

from sp_yolo.config import DatasetConfig, load_dataset_config
from sp_yolo.data.index import scan
from sp_yolo.engine.splits import open_dataset
from sp_yolo.errors import UserError

ROBOFLOW = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['a', 'b']\n"


def opened(data: Path) -> tuple[DatasetConfig, int, int, str]:
    """The description, images and boxes of train and val, and everything that is said."""
    config = open_dataset(str(data))
    train, val = scan(config, "train"), scan(config, "val")
    said = [*config.notes, *train.warnings, *val.warnings]
    pairs = [totals(train), totals(val)]
    assert not {entry.path for entry in train.entries} & {entry.path for entry in val.entries}
    return config, sum(count for count, _ in pairs), sum(boxes for _, boxes in pairs), "\n".join(said)


# --------------------------------------------------------------------------------------- folders that are enough
def roboflow_darknet(root: Path) -> str:
    for split in ("train", "valid"):
        labelled(root, f"{split}/1.jpg", f"{split}/2.jpg")
        put(root / split / "_darknet.labels", "a\nb\n")
    return "classes of train/_darknet.labels"


def an_archive_in_a_folder(root: Path) -> str:
    inner = root / "shapes.v1i.yolov7pytorch"
    labelled(inner, "train/images/1.jpg", "train/images/2.jpg", "valid/images/3.jpg", "valid/images/4.jpg")
    put(inner / "data.yaml", ROBOFLOW)
    put(root / ".DS_Store", "x")
    return f"all of it lies in {inner}"


def cvat_subsets(root: Path) -> str:
    for split in ("Train", "Validation"):
        labelled(root, *(f"obj_{split}_data/{split}{n}.png" for n in range(2)))
        put(root / f"{split}.txt", "".join(f"data/obj_{split}_data/{split}{n}.png\n" for n in range(2)))
    put(root / "obj.names", "a\nb\n")
    return "train = Train.txt, val = Validation.txt"


def label_studio_prefix(root: Path) -> str:
    for n in range(4):
        put(root / "images" / f"{n}.jpg")
        put(root / "labels" / f"{n}a2b3c4d-{n}.txt", ROW)
    put(root / "classes.txt", "a\nb\n")
    return "4 label files found behind the prefix that Label Studio puts before names, e.g. "


def upper_case_everything(root: Path) -> str:
    for n in range(4):
        put(root / "IMAGES" / f"IMG_{n}.JPG")
        put(root / "LABELS" / f"IMG_{n}.TXT", ROW)
    put(root / "classes.txt", "a\nb\n")
    return "train = IMAGES"


def upper_case_xml(root: Path) -> str:
    for n in range(4):
        put(root / f"IMG_{n}.JPG")
        put(root / f"IMG_{n}.XML", f"<annotation>{voc_object('ab'[n % 2])}</annotation>")
    return "2 classes of the XML files: a, b"


def kaggle_named_by_split(root: Path) -> str:
    for split in ("train", "test"):
        for n in range(2):
            put(root / f"{split}_images" / f"{split}{n}.jpg")
            put(root / f"{split}_labels" / f"{split}{n}.txt", ROW)
    for n in range(2):
        put(root / "val_images" / f"{n}.jpg")
        put(root / "val_labels" / f"{n}.txt", ROW)
    put(root / "classes.txt", "a\nb\n")
    return "train = train_images, val = val_images, test = test_images"


def coco_years(root: Path) -> str:
    labelled(root, *(f"images/{split}2017/{split}{n}.jpg" for split in ("train", "val") for n in range(2)))
    put(root / "labels" / "classes.txt", "a\nb\n")
    return "train = images/train2017, val = images/val2017"


def windows_litter(root: Path) -> str:
    for split in ("train", "val"):
        for n in range(2):
            put(root / "images" / split / f"{n} ({split}).jpg")
            put(root / "labels" / split / f"{n} ({split}).txt", b"\xef\xbb\xbf" + ROW.strip().encode() + b"  \r\n")
        for folder, name in (("images", "Thumbs.db"), ("images", "desktop.ini"), ("labels", "desktop.ini")):
            put(root / folder / split / name, "[x]")
    put(root / "classes.txt", "a \r\nb\t\r\n\r\n".encode("utf-16"))
    return "2 classes of classes.txt: a, b"


@pytest.mark.parametrize(
    "make",
    [
        roboflow_darknet,
        an_archive_in_a_folder,
        cvat_subsets,
        label_studio_prefix,
        upper_case_everything,
        upper_case_xml,
        kaggle_named_by_split,
        coco_years,
        windows_litter,
    ],
)
def test_a_folder_is_read_as_it_was_meant(tmp_path: Path, make: Callable[[Path], str]) -> None:
    words = make(tmp_path / "set")
    config, images, boxes, said = opened(tmp_path / "set")
    assert config.names == ("a", "b") and words in said
    assert (images, boxes) == (4, 4)


@pytest.mark.parametrize(
    "prefix",
    ["images\\1\\0a1b2c3d-", "/data/upload/1/", "http://localhost:8080/data/upload/1/", "../../media/upload/1/"],
)
def test_coco_of_label_studio(tmp_path: Path, prefix: str) -> None:
    """Paths of the exporter's machine: the file name counts where it is the only one in the image folder."""
    document = coco_document()
    for image in document["images"]:  # type: ignore[attr-defined]
        image["file_name"] = prefix + image["file_name"]
        put(tmp_path / "images" / image["file_name"].replace("\\", "/").rpartition("/")[2])
    put(tmp_path / "result.json", json.dumps(document).encode("utf-16"))  # as PowerShell's > writes it
    config, images, boxes, _ = opened(tmp_path)
    assert config.names == ("a", "b") and (images, boxes) == (2, 2)


def test_coco_of_a_table_with_gaps(tmp_path: Path) -> None:
    """pandas makes floats of whole numbers as soon as one is missing."""
    document = coco_document()
    for annotation in document["annotations"]:  # type: ignore[attr-defined]
        annotation |= {key: float(annotation[key]) for key in ("image_id", "category_id")}
    put(tmp_path / "one.png"), put(tmp_path / "two.png")
    put(tmp_path / "train.json", json.dumps(document))
    assert opened(tmp_path)[1:3] == (2, 2)


def test_boxes_given_by_corners_are_noticed(tmp_path: Path) -> None:
    boxes = ([6, 4, 18, 12], [30, 20, 55, 38])
    annotations = [{"image_id": 5, "category_id": 7, "bbox": box} for box in boxes]
    index = scan(coco_set(tmp_path, coco_document(annotations=annotations)), "train")
    assert index.tally.notes == {"box leads out of the image": 1} and index.tally.boxes == 2
    assert "annotations[1]: " in index.warnings[0] and "is bbox x1, y1, x2, y2?" in index.warnings[0]


def test_a_voc_box_that_leads_out_is_cut_and_counted(tmp_path: Path) -> None:
    put(tmp_path / "1.jpg"), put(tmp_path / "2.jpg")
    put(
        tmp_path / "1.xml",
        f"<annotation>{voc_object('a', (-9, 4, 18, 12))}{voc_object('a', (6, 4, 18, 42))}</annotation>",
    )
    put(tmp_path / "2.xml", "<annotation/>")
    index = scan(DatasetConfig(tmp_path / "x", tmp_path, ("a",), train=(str(tmp_path),)), "train")
    assert index.tally.boxes == 2 and index.tally.notes == {"box leads out of the image": 2}


def test_a_prefixed_label_of_another_image_is_not_taken(tmp_path: Path) -> None:
    labelled(tmp_path, "images/0a1b2c3d-a.jpg", "images/0a1b2c3d-b.jpg", "images/1a1b2c3d-b.jpg")
    put(tmp_path / "images" / "a.jpg")  # background
    put(tmp_path / "images" / "b.jpg")  # two labels could be meant
    put(tmp_path / "images" / "c.jpg")
    put(tmp_path / "labels" / "2a1b2c3d-c.txt", ROW)
    index = scan(DatasetConfig(tmp_path / "x", tmp_path, ("a",), train=(str(tmp_path / "images"),)), "train")
    found = {Path(entry.path).stem: len(entry.labels) for entry in index.entries}
    assert found == {"0a1b2c3d-a": 1, "0a1b2c3d-b": 1, "1a1b2c3d-b": 1, "a": 0, "b": 0, "c": 1}
    assert index.tally.no_label_file == 2 and any("1 label files found behind the prefix" in w for w in index.warnings)


def test_one_label_file_of_two_pictures_is_said(tmp_path: Path) -> None:
    labelled(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg")
    put(tmp_path / "images" / "a.JPG")
    index = scan(open_dataset(str(tmp_path)), "train")
    label, images = tmp_path / "labels/a.txt", tmp_path / "images"
    words = f"1 images share a label file with another, e.g. {label}: {images}/a.JPG, {images}/a.jpg"
    assert any(words in line for line in index.warnings)


# --------------------------------------------------------------------------------------- programs whose files are named
FOREIGN = [
    ("train/_annotations.txt", "1.jpg 10,10,40,40,0 50,40,90,80,1\n2.jpg 1,2,3,4,1\n", "Roboflow's 'YOLO v4 PyTorch'"),
    ("train/_annotations.csv", "1.jpg,10,10,40,40,disc\n", "a table of boxes"),
    ("boxes.csv", "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n", "a table of boxes"),
    ("annotations/default.json", '{"dm_format_version": "1.0", "items": []}', "Datumaro's json"),
    ("x.json", '[{"image": "1.jpg", "label": [{"rectanglelabels": ["a"]}]}]', "Label Studio's json"),
    ("ds0/ann/1.jpg.json", '{"objects": [{"classTitle": "a", "points": {"exterior": []}}]}', "Supervisely's json"),
    ("1.json", f'{{"imageData": "{"x" * 200000}", "shapes": [], "imagePath": "1.jpg"}}', "labelme2coco"),
    ("labels/1.txt", "Car 0.00 0 -1.58 10.0 10.0 40.0 40.0 1.65 1.67 3.64 -0.65 1.71 46.70 -1.59\n", "KITTI's labels"),
    ("labelTxt/1.txt", "imagesource:x\ngsd:0.1\n10.0 10.0 40.0 10.0 40.0 40.0 10.0 40.0 plane 0\n", "DOTA's labels"),
    ("annotations/1.txt", "10,10,30,30,1,4,0,0\n50,40,40,40,1,4,0,0\n", "VisDrone's labels"),
]


@pytest.mark.parametrize(("name", "text", "words"), FOREIGN, ids=[words for _, _, words in FOREIGN])
def test_a_program_is_named_where_its_labels_are_not_read(tmp_path: Path, name: str, text: str, words: str) -> None:
    for image in ("train/1.jpg", "train/2.jpg") if name.startswith("train/") else ("images/1.jpg", "images/2.jpg"):
        put(tmp_path / image)
    put(tmp_path / name, text)
    with pytest.raises(UserError) as caught:
        scan(open_dataset(str(tmp_path)), "train")
    assert words in str(caught.value) and Path(name).name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d.zip", "this is an archive: unpack it and give the folder"),
        ("_annotations.coco.json", ": give {folder}, or a YAML"),
        ("train.txt", ": give {folder}, or a YAML"),
        ("obj.data", ": give {folder}, or a YAML"),
        ("1.jpg", ": give {folder}, or a YAML"),
    ],
)
def test_a_file_that_is_no_description(tmp_path: Path, name: str, words: str) -> None:
    put(tmp_path / name, "x")
    with pytest.raises(UserError) as caught:
        open_dataset(str(tmp_path / name))
    assert words.format(folder=tmp_path) in str(caught.value)


# --------------------------------------------------------------------------------------- YAMLs of other machines
@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "path: C:\\Users\\me\\set\ntrain: images\\train\nval: images\\val",
            "is no folder here, its entries are those",
        ),
        ("path: ../datasets/set\ntrain: images/train\nval: images/val", "is no folder here, its entries are those"),
        ("train: /content/drive/MyDrive/set/images/train\nval: /content/x/images/val", " taken as "),
        ("train: D:\\data\\images\\train\nval: 'D:/x/images/val'", " taken as "),
        ("train: \\\\server\\share\\images\\train\nval: images/val", " taken as "),
        ("train: 'images/train '\nval: ' images/val'", " taken as "),
        (
            ROBOFLOW.replace("train/images", "images/train").replace("valid/images", "images/val"),
            "test left out: no such",
        ),
        ("path: .\ntrain: images/train\nval: images/val", ""),
        ("train: images/train\nval: images/val\nnames: {a: 0, b: 1}", ""),
    ],
)
def test_a_yaml_of_another_machine(tmp_path: Path, text: str, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    labelled(root, "images/train/1.jpg", "images/train/2.jpg", "images/val/3.jpg")
    other = tmp_path / "work"  # where a folder of the same name lies
    labelled(other, "images/train/wrong.jpg", "images/val/wrong.jpg")
    monkeypatch.chdir(other)
    yaml = put(root / "x.yaml", text + ("\n" if "names" in text else "\nnames: [a, b]\n"))
    config, images, boxes, said = opened(yaml)
    assert (images, boxes) == (3, 3) and config.names == ("a", "b")
    assert note in said and "wrong" not in said and bool(config.notes) == bool(note)
    assert all(str(root) in entry for entry in config.entries("train"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: images/train/*.jpg", "patterns are not followed: name the folder or a list file"),
        ("train: /elsewhere/images", ":1: train: no such file or folder: /elsewhere/images"),  # one name is too little
        ("path: /elsewhere\ntrain: images/none", ":1: dataset root '/elsewhere' is no folder"),
        ("path: /elsewhere\ntrain: .", ":1: dataset root '/elsewhere' is no folder"),
    ],
)
def test_what_is_not_guessed(tmp_path: Path, text: str, words: str) -> None:
    labelled(tmp_path, "images/train/1.jpg")
    with pytest.raises(UserError) as caught:
        load_dataset_config(put(tmp_path / "x.yaml", f"{text}\nnames: [a]\n"))
    assert words in str(caught.value)
