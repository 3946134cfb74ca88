"""Broken images, labels, annotation files and YAML: training goes on without them, or stops with one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.datasets import ROW, coco_set, encoded, jpeg, picture, put, voc_object, voc_set, yolo_set
from support.launcher import Runs, one_error

from sp_yolo.cli import main_train


def cmyk(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    packed = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(packed, "JPEG")
    return packed.getvalue()


def test_every_kind_of_image_in_one_set(runs: Runs) -> None:
    image = picture(48, 64)
    good = {
        "gray.png": encoded(image[..., 0], ".png"),
        "sixteen.png": encoded(image.astype(np.uint16) * 257, ".png"),
        "rgba.png": encoded(np.dstack((image, image[..., 0])), ".png"),
        "cmyk.jpg": cmyk(image),
        "rotated.jpg": jpeg(image, 6),
        "wide.png": encoded(np.zeros((12, 20000, 3), np.uint8), ".png"),
        "huge.jpg": encoded(np.full((20000, 64, 3), 90, np.uint8)),
    }
    bad = {
        "truncated.jpg": (encoded(image)[:-200], "truncated"),
        "cut.png": (encoded(image, ".png")[:500], "truncated"),
        "corrupt.jpg": (b"\xff\xd8\xff" + bytes(range(256)) * 4, "truncated"),
        "zero.jpg": (b"", "empty file"),
        "text.jpg": (b"this is no image\n" * 30, "not an image"),
        "pixel.png": (encoded(picture(1, 1), ".png"), "1 x 1 px is below 10 px"),
    }
    everything = good | {name: data for name, (data, _) in bad.items()}
    labels = {name.partition(".")[0]: ROW for name in everything}
    data = yolo_set(runs.folder / "set", labels, "abcdef", everything).path
    code, output = runs.train("--epochs", "1", data=data)
    assert code == 2 and "--accept-losses trains on the rest" in output, output
    code, output = runs.train("--epochs", "1", "--accept-losses", data=data)
    assert code == 0, output
    assert "7 training images" in output
    for name, (_, reason) in bad.items():
        line = next(line for line in output.splitlines() if f"images/{name}: " in line)
        assert reason in line and line.endswith("image skipped")
    for name in good:
        assert f"images/{name}:" not in output


def test_every_kind_of_label_row_in_one_set(runs: Runs) -> None:
    rows = {
        "nan": ("0 nan 0.5 0.2 0.2", "not finite"),
        "inf": ("0 0.5 inf 0.2 0.2", "not finite"),
        "negative": ("0 -0.5 0.5 0.2 0.2", "outside the image"),
        "beyond": ("6 0.5 0.5 0.2 0.2", "class beyond nc"),
        "columns": ("0 0.5 0.5 0.2", "wrong column count"),
        "twice": (ROW.strip(), "duplicate"),
        "word": ("0 0.5 0.5 0.2 wide", "not a number"),
    }
    labels = {name: f"{ROW}{row}\n" for name, (row, _) in rows.items()} | {"empty": ""}
    data = yolo_set(runs.folder / "set", labels, "abcdef").path
    code, output = runs.train("--epochs", "1", data=data)
    assert code == 2 and "--accept-losses trains on the rest" in output, output
    code, output = runs.train("--epochs", "1", "--accept-losses", data=data)
    assert code == 0, output
    assert "8 training images" in output
    for name, (_, reason) in rows.items():
        assert f"labels/{name}.txt:2: {reason}: " in output
    assert "empty.txt" not in output
    lines = (runs.weights().parent / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["labels"] == len(rows)  # the sound row of each file


def four_images(**changes: object) -> dict[str, object]:
    document: dict[str, object] = {
        "images": [{"id": f"id{number}", "file_name": f"{number}.png"} for number in range(4)],
        "categories": [{"id": 7, "name": "a"}],
        "annotations": [{"image_id": f"id{n}", "category_id": 7, "bbox": [8, 8, 30, 20]} for n in range(4)],
    }
    return document | changes


def test_every_kind_of_coco_fault_in_one_file(runs: Runs) -> None:
    box = {"image_id": "id0", "category_id": 7, "bbox": [8, 8, 30, 20]}
    document = four_images(
        images=[{"id": f"id{n}", "file_name": f"{n}.png"} for n in range(4)] + [{"id": "x", "file_name": "gone.png"}],
        annotations=[
            *(box, box | {"image_id": "nosuch"}, box | {"category_id": 99}, box | {"image_id": "id1", "iscrowd": 1}),
            *(box | {"image_id": "id2", "bbox": [8, 8, -1, 4]}, box | {"image_id": "id3", "bbox": [float("nan")] * 4}),
        ],
    )
    data = coco_set(runs.folder / "set", document, "abcdef", "0123").path
    code, output = runs.train("--epochs", "1", data=data)
    assert code == 2 and "--accept-losses trains on the rest" in output, output
    code, output = runs.train("--epochs", "1", "--accept-losses", data=data)
    assert code == 0, output
    # the one with the sound box and the one with the crowd; the others have no usable label, or do not exist
    assert "2 training images" in output and "1 images do not exist, the first is" in output
    assert "3 unread (2 no usable label, 1 no such file)" in output
    assert "annotations[1]: unknown image" in output and "(and 1 more in this file)" in output
    assert "zero area" in output and "not finite" in output
    assert json.loads((runs.weights().parent / "metrics.jsonl").read_text())["labels"] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": []}, "not one labelled object in 4 images"),
        ({"categories": [{"id": 7, "name": "zebra"}]}, "none of its categories"),
        ({"images": [{"id": 1, "file_name": "../../secret.png"}]}, "leads out of the image folder"),
        ({"images": [{"id": 1, "file_name": "/etc/secret.png"}]}, "leads out of the image folder"),
    ],
    ids=["no annotations", "other classes", "path out", "absolute path"],
)
def test_coco_file_that_cannot_be_used(
    runs: Runs, changes: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco_set(runs.folder / "set", four_images(**changes), "abcdef", "0123").path
    assert main_train(runs.flags("--project", str(runs.folder / "runs"), data=data)) == 2
    assert words in one_error(capsys.readouterr().err)


def test_every_kind_of_voc_fault_in_one_set(runs: Runs) -> None:
    thing = voc_object()
    bomb = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    fields = "<object><name>b</name></object>\n" + thing
    config = voc_set(
        runs.folder / "set", {"good": thing, "malformed": f"{thing}<object>", "bomb": "", "fields": fields}, "abcdef"
    )
    laughs = f'<!DOCTYPE a [<!ENTITY e0 "lol">{bomb}]>\n<annotation>&e11;</annotation>'
    (config.root / "Annotations" / "bomb.xml").write_text(laughs)
    data = config.path
    code, output = runs.train("--epochs", "1", data=data)
    assert code == 2 and "--accept-losses trains on the rest" in output, output
    code, output = runs.train("--epochs", "1", "--accept-losses", data=data)
    assert code == 0, output
    assert "2 training images" in output  # those whose labels cannot be read are no background
    assert "4 images found: 2 with labels, 0 background, 0 without label file, 2 unread (2 malformed XML)" in output
    assert "malformed.xml:5: malformed XML" in output
    assert "bomb.xml:1: malformed XML: a document type or entity is not allowed" in output
    assert "fields.xml:2: missing field: 'b' without <bndbox>" in output
    assert json.loads((runs.weights().parent / "metrics.jsonl").read_text())["labels"] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "lr0: !!python/object/apply:os.system ['true']\n",
            ":1: tag 'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("lr0: 0.1\nlr0: 0.2\n", ":2: key 'lr0' appears twice"),
        ("lr0: 0.1\nlrr: 0.2\n", ":2: unknown hyperparameter 'lrr'"),
        ("lr0: '1e-3'\n", ":1: lr0 = '1e-3': must be a number"),
        ("a:\n\tlr0: 1\n", ":2: found character '\\t'"),
        ("lr0: &x 1\nlrf: *x\n", ":2: alias '*x' is not allowed"),
        (f"lr0: {10**400}\n", ":1: lr0 = "),
    ],
    ids=["tag", "duplicate", "unknown", "number as text", "tab", "alias", "huge"],
)
def test_recipe_faults(runs: Runs, text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs.folder / "mine.yaml"
    recipe.write_text(text)
    assert main_train(runs.flags("--hyp", str(recipe), "--project", str(runs.folder / "runs"))) == 2
    assert f"{recipe}{words}" in one_error(capsys.readouterr().err)
    assert not (runs.folder / "runs").exists()


def test_a_number_without_a_dot_is_a_number(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs.folder / "mine.yaml"
    recipe.write_text("lr0: 1e-3\n")  # YAML 1.1 says text, everybody means 0.001
    flags = runs.flags("--epochs", "1", "--hyp", str(recipe))
    flags = [flag for flag in flags if flag not in ("--set", "lr0=0.01")]
    training = runs.start(*flags)
    assert training.wait() == 0, training.output
    assert "lr0 0.001)" in training.output


@pytest.mark.parametrize(
    ("line", "leaves"),
    [
        ("images/0.png", False),
        ("./images/0.png", False),
        ("./lists/../images/0.png", False),
        ("../set/images/0.png", False),
        ("{root}/images/0.png", False),
        ("{outside}/0.png", False),  # an absolute path is the user's own word, as in the original's lists
        ("../outside/0.png", True),
        ("./../outside/0.png", True),
        ("images/../../outside/0.png", True),
    ],
)
def test_list_file_that_leads_out_of_the_dataset(
    runs: Runs, line: str, leaves: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, outside = runs.folder / "set", runs.folder / "outside"
    data = yolo_set(root, {"0": ROW, "1": ROW}, "abcdef").path
    put(outside / "0.png")
    (root / "list.txt").write_text("images/1.png\n" + line.format(root=root, outside=outside) + "\n")
    data.write_text(data.read_text().replace(f"train: {root}/images/", "train: list.txt"))
    monkeypatch.chdir(root)
    if not leaves:
        from sp_yolo.config import load_dataset_config
        from sp_yolo.data import DetectionDataset

        assert len(DetectionDataset(load_dataset_config(data), "train", 64)) == 2
        return
    assert main_train(runs.flags("--project", str(runs.folder / "runs"), data=data)) == 2
    words = one_error(capsys.readouterr().err)
    assert f"{root}/list.txt:2: '{line}' leads out of the dataset root" in words and not (runs.folder / "runs").exists()
