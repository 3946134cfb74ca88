"""`sp-yolo check` on data sets with one fault each."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cv2
import pytest
import torch
from support.datasets import yolo_set
from support.launcher import small

from sp_yolo import cli
from sp_yolo.cli import run_command
from sp_yolo.config import read_yaml
from sp_yolo.errors import UserError
from sp_yolo.models import build_model
from sp_yolo.models.grammar import PACKAGED
from sp_yolo.models.weights.transfer import description

GOOD = "0 0.3 0.3 0.2 0.25\n1 0.7 0.6 0.3 0.35\n"


class DataSet:
    """YOLO folders with ten different pictures for training and two for validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = [*(f"train/{number}" for number in range(10)), "val/0", "val/1"]
        self.yaml = yolo_set(folder, dict.fromkeys(names, GOOD), ("cat", "dog")).path

    def write_yaml(self, names: str, train: str = "images/train") -> None:
        self.yaml.write_text(f"root: {self.folder}\ntrain: {train}\nval: images/val\nnames: {names}\n")

    def image(self, split: str, number: int) -> Path:
        return self.folder / "images" / split / f"{number}.png"

    def label(self, split: str, number: int) -> Path:
        return self.folder / "labels" / split / f"{number}.txt"

    def check(self, *flags: str) -> int:
        given = ["--data", str(self.yaml), "--img", "320", "--output", str(self.folder / "out"), *flags]
        return run_command("check", given)


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return DataSet(tmp_path / "set")


Output = pytest.CaptureFixture[str]


def lines_of(capsys: Output, kind: str) -> list[str]:
    out = capsys.readouterr().out
    return [line.removeprefix(f"{kind}: ") for line in out.splitlines() if line.startswith(f"{kind}: ")]


def test_a_sound_set_passes_and_is_drawn(data: DataSet, capsys: Output) -> None:
    assert data.check() == 0
    out = capsys.readouterr().out
    assert "warning" not in out.replace("0 warnings", "") and "training would run" in out
    table = [line.split() for line in out.splitlines() if line.split()[:1] in (["cat"], ["dog"])]
    assert table == [["cat", "10", "10", "2", "2"], ["dog", "10", "10", "2", "2"]]
    assert "best possible recall 1.0000" in out
    for name in ("labels_train.jpg", "labels_train.png", "labels_val.jpg", "labels_val.png"):
        picture = cv2.imread(str(data.folder / "out" / name))
        assert picture is not None and picture.std() > 10


def test_label_errors_carry_file_and_line(data: DataSet, capsys: Output) -> None:
    faults = {
        "2 0.5 0.5 0.1 0.1": "class 2, but the names are 0..1",
        "0 0.5 1.2 0.1 0.1": "outside the image: 1.2",
        "0 0.5 0.5 0.1": "4 columns",
        "0 0.5 0.5 zero 0.1": "not a number",
        "0 0.5 0.5 0 0.1": "zero area",
    }
    for number, row in enumerate(faults):
        data.label("train", number).write_text(GOOD + row + "\n")
    assert data.check() == UserError.exit_code  # a fifth of the rows: training would stop
    (error,) = lines_of(capsys, "error")
    assert "train: 5 of 25 boxes would be lost" in error and "1 class beyond nc" in error
    assert data.check("--accept-losses") == 0
    warnings = [line for line in lines_of(capsys, "warning") if "would be lost" not in line]
    assert len(warnings) == len(faults)
    for number, (line, words) in enumerate(zip(warnings, faults.values(), strict=True)):
        assert line.startswith(f"{data.label('train', number)}:3:") and words in line


def test_a_picture_that_cannot_be_decoded_is_an_error(data: DataSet, capsys: Output) -> None:
    path = data.image("train", 4)
    content = path.read_bytes()
    # the header and the end are whole, so that a look at the size finds nothing
    path.write_bytes(content[:60] + b"\0" * 40 + content[-30:])
    assert data.check() == UserError.exit_code
    assert any(str(path) in line and "training would stop at it" in line for line in lines_of(capsys, "error"))


def test_a_broken_test_split_does_not_keep_anybody_from_training(data: DataSet, capsys: Output) -> None:
    (data.folder / "images" / "test").mkdir()
    data.yaml.write_text(data.yaml.read_text() + "test: images/test\n")
    assert data.check() == 0
    assert any("images/test: no image in it" in line for line in lines_of(capsys, "warning"))
    path = data.folder / "images" / "test" / "0.png"
    path.write_bytes(data.image("train", 4).read_bytes()[:60] + b"\0" * 40 + data.image("train", 4).read_bytes()[-30:])
    assert data.check() == 0
    assert any(f"{path}: " in line and "`val --task test`" in line for line in lines_of(capsys, "warning"))


def test_missing_and_empty_pictures_are_warnings(data: DataSet, capsys: Output) -> None:
    data.image("val", 0).write_bytes(b"")
    listed = "".join(f"{data.image('train', n)}\n" for n in range(12))
    (data.folder / "train.txt").write_text(listed)
    data.write_yaml("[cat, dog]", "train.txt")
    assert data.check() == UserError.exit_code
    assert len(lines_of(capsys, "error")) > 1
    assert data.check("--accept-losses") == 0
    warnings = lines_of(capsys, "warning")
    assert any("2 images do not exist" in line and str(data.image("train", 10)) in line for line in warnings)
    assert any(str(data.image("val", 0)) in line and "empty file" in line for line in warnings)


def test_the_same_picture_in_two_splits(data: DataSet, capsys: Output) -> None:
    shutil.copy(data.image("train", 0), data.image("val", 1))
    shutil.copy(data.image("train", 2), data.image("train", 3))
    assert data.check() == 0
    warnings = lines_of(capsys, "warning")
    expected = f"1 image is both in train and in val, e.g. {data.image('train', 0)} = {data.image('val', 1)}"
    assert expected in warnings
    assert any(line.startswith("1 image is twice in train") for line in warnings) and len(warnings) == 2


def test_classes_without_or_with_few_labels(data: DataSet, capsys: Output) -> None:
    data.write_yaml("[cat, dog, bird]")
    data.label("train", 0).write_text("0 0.3 0.3 0.2 0.25\n")
    assert data.check() == 0
    warnings = lines_of(capsys, "warning")
    assert "train: no label of bird" in warnings and "val: no label of bird" in warnings
    assert "train: fewer than 10 labels of dog (9)" in warnings and len(warnings) == 3


def test_tiny_boxes_and_anchors_that_do_not_fit(data: DataSet, capsys: Output) -> None:
    for number in range(10):
        data.label("train", number).write_text("0 0.3 0.3 0.005 0.5\n1 0.7 0.6 0.3 0.35\n")
    assert data.check() == 0
    warnings = lines_of(capsys, "warning")
    assert "train: 10 of 20 boxes have a side below 2 px at --img-size 320" in warnings
    assert any("anchors can answer for 50.0% of the boxes at --img-size 320" in line for line in warnings)


def test_no_usable_split_is_an_error(data: DataSet, capsys: Output) -> None:
    for number in range(10):
        data.label("train", number).write_text("")
    assert data.check() == UserError.exit_code
    assert any("not one labelled object" in line for line in lines_of(capsys, "error"))
    data.yaml.write_text(f"root: {data.folder}\nval: images/val\nnames: [cat, dog]\n")
    assert data.check() == UserError.exit_code
    assert "no 'train' split is given" in lines_of(capsys, "error")[0]
    data.yaml.write_text(f"root: {data.folder}\ntrain: images/nowhere\nnames: [cat, dog]\n")
    with pytest.raises(UserError, match=r"data\.yaml:2: train: no such file or folder"):
        data.check()


def test_weights_that_do_not_belong(data: DataSet, capsys: Output, tmp_path: Path) -> None:
    weights = tmp_path / "tiny.pt"
    torch.save(build_model("yolov7-tiny", num_classes=2).state_dict(), weights)
    assert data.check("--cfg", "yolov7-tiny", "--weights", str(weights)) == 0
    done = re.search(r"^Transferred (\d+)/(\d+) items", capsys.readouterr().out, re.MULTILINE)
    assert done and int(done[2]) - int(done[1]) <= 2  # the anchors stay the configuration's
    assert data.check("--cfg", "yolov7", "--weights", str(weights)) == 0
    assert any(line.startswith("Transferred 108/566 items") for line in lines_of(capsys, "warning"))
    assert data.check("--weights", str(tmp_path / "none.pt")) == UserError.exit_code
    assert any("none.pt" in line for line in lines_of(capsys, "error"))
    assert data.check("--cfg", "yolov9") == UserError.exit_code
    assert any("yolov9" in line for line in lines_of(capsys, "error"))


@pytest.mark.parametrize(
    ("names", "channels", "code", "words"),
    [
        (["dog", "cat"], 3, 0, "the weights' classes stand in another order, dog, cat: their outputs were put into"),
        (["dog", "horse"], 3, 0, "the weights' classes are dog, horse, the data's cat, dog: taken one for one"),
        (["cat", "dog"], 3, 0, ""),
        (["cat", "dog"], 1, 2, "ch: 1: images are read with 3 channels, set ch: 3 or leave it out"),
    ],
)
@pytest.mark.parametrize("by_cfg", [False, True])
def test_what_training_says_of_weights_is_said_here(
    names: list[str], channels: int, code: int, words: str, by_cfg: bool, data: DataSet, capsys: Output, tmp_path: Path
) -> None:
    model = build_model({**read_yaml(PACKAGED / "yolov7-tiny.yaml"), "nc": 2, "ch": channels})
    model.names = names
    weights, cfg = tmp_path / "tiny.pt", tmp_path / "tiny.yaml"
    torch.save({**description(model), "model": model.state_dict()}, weights)
    cfg.write_text((PACKAGED / "yolov7-tiny.yaml").read_text() + f"ch: {channels}\n")
    flags = ["--weights", str(weights), *(["--cfg", str(cfg)] if by_cfg else [])]
    assert data.check(*flags) == code
    out = capsys.readouterr().out.splitlines()
    told = [line.partition(": ")[2] for line in out if line.startswith(("warning: ", "error: "))]
    assert len(told) == bool(words) and all(words in line for line in told)
    few = ("--epochs", "1", "--project", str(tmp_path / "runs"), "--set", "lr0=0.001")
    assert cli.main(["train", *small(data.yaml, *flags, *few)]) == code
    trained = capsys.readouterr()
    assert all(line in f"{trained.out}{trained.err}" for line in told)
    assert [line for line in trained.out.splitlines() if line.startswith("Transferred")] == [
        line for line in out if line.startswith("Transferred")
    ]


def test_all_of_it_stands_on_one_page(data: DataSet, capsys: Output) -> None:
    data.label("train", 3).write_text(GOOD + "7 0.5 0.5 0.1 0.1\n")
    data.label("train", 4).unlink()
    data.image("train", 5).write_bytes(b"<html>")
    assert data.check() == UserError.exit_code
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict == f"{data.yaml}: 2 errors, 4 warnings: training would not run"
    page = (data.folder / "out" / "check.html").read_text()
    assert verdict in page and "train: problems by kind" in page and "http" not in page
    for reason in ("1 x class beyond nc", "1 x no label file", "1 x a web page", "2 x image unread"):
        assert f"<h3>{reason}</h3>" in page
    row = "".join(f"<td>{cell}</td>" for cell in ("train", 10, 8, 0, 1, 1, 16, 3, 0))
    assert row in page
    # labels drawn and statistics of two splits, and a picture each of the bad row and the missing label file
    assert page.count("src='data:image/") == 6
