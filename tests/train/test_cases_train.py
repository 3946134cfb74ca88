"""People's inputs that are about a whole run: what is said before it starts, and that it stops where it should."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.cases import go
from support.launcher import one_error, small

from sp_yolo import cli

Output = pytest.CaptureFixture[str]


def train(mini_cfg: str, yaml: str, *flags: str) -> int:
    few = "--batch 2 --epochs 1 --project runs --exist-ok"
    return cli.main(["train", *small(yaml, "--cfg", mini_cfg, *few.split(), *flags)])


def check(yaml: str) -> int:
    return cli.main(["check", "--data", yaml, "--img", "64", "--output", "out"])


def test_19_half_the_labels_missing(
    mini_cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    folder = go(19, tmp_path, monkeypatch)
    said = []
    for run in (check, lambda yaml: train(mini_cfg, yaml)):
        assert run("ds/data.yaml") == 2
        said.append(capsys.readouterr().out)
    for out in said:
        line = "train: 6 images found: 2 with labels, 1 background, 3 without label file, 0 unread; 4 boxes"
        assert line in out and "3 label files without image" in out
        assert f"3 of 6 images have no label file: {folder}/ds/labels/train/p1.txt does not exist" in out
        assert f"3 label files have no image, e.g. {folder}/ds/labels/train/P1.txt" in out
    assert not Path("runs").exists()
    assert train(mini_cfg, "ds/data.yaml", "--accept-losses") == 0


def test_26_classes_counted_from_one(
    mini_cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    go(26, tmp_path, monkeypatch)
    for run in (check, lambda yaml: train(mini_cfg, yaml)):
        assert run("ds/data.yaml") == 2
        words = "".join(capsys.readouterr())
        assert "train: 6 of 12 boxes would be lost (6 class beyond nc), first: " in words
        assert "p0.txt:2: class beyond nc: class 2, but the names are 0..1" in words and "count from 1?" in words
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("yaml", "code", "words"),
    [
        ("missing", 0, "no 'val' split is given, validating on the training images"),
        ("blank", 0, "no 'val' split is given, validating on the training images"),
        ("emptylist", 0, "no 'val' split is given, validating on the training images"),
        ("emptyfolder", 2, "ds/images/empty: no image in it (2 other files)"),
        ("emptytxt", 2, "ds/empty.txt: no image in it (the list is empty)"),
        ("nofolder", 2, "nofolder.yaml:2: val: no such file or folder:"),
        ("background", 0, "warning: val: not one label in 2 images: its mAP will say nothing"),
        ("same", 0, "warning: val: all 4 images are training images too"),
    ],
)
def test_27_forms_of_a_validation_split(
    yaml: str, code: int, words: str, mini_cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    go(27, tmp_path, monkeypatch)
    assert train(mini_cfg, f"ds/{yaml}.yaml") == code
    out, err = capsys.readouterr()
    assert words in out + err
    assert (one_error(err) if code else "error: " not in err) and Path("runs").exists() == (code == 0)


def test_39_best_weights_when_the_map_stays_zero(
    mini_cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    folder = go(39, tmp_path, monkeypatch)
    assert train(mini_cfg, "ds/data.yaml", "--epochs", "3") == 0
    looked_for = f"{folder}/ds/labels/val/v0.txt does not exist"
    out = capsys.readouterr().out
    assert f"val: not one label in 2 images: its mAP will say nothing (first: {looked_for})" in out
    assert "best epoch 2: mAP@.5 0.000, mAP@.5:.95 0.000 (not one label to measure by: it says nothing)" in out
    best, last = (torch.load(f"runs/exp/weights/{name}.pt", weights_only=True) for name in ("best", "last"))
    assert all(torch.equal(best["ema"][key], value) for key, value in last["ema"].items())


def test_a_folder_is_trained_on_and_measured(
    mini_cfg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    folder = go(7, tmp_path, monkeypatch)
    (folder / "ds/data.yaml").unlink()
    for name in ("day", "night"):  # two pictures of one name, their labels beside them
        for suffix in ("jpg", "txt"):
            (folder / "ds" / name).mkdir(exist_ok=True)
            shutil.copy(folder / f"ds/p1.{suffix}", folder / f"ds/{name}/q.{suffix}")
    assert check("ds") == 0 and train(mini_cfg, "ds") == 0
    weights = ["--weights", "runs/exp/weights/best.pt", "--device", "cpu", "--workers", "0", "--img", "64"]
    measure = ["val", *weights, "--task", "train", "--project", "runs", "--name", "val", "--save-txt", "--conf", "0"]
    capsys.readouterr()
    assert cli.main(measure) == 0  # the data are those of the run
    out = capsys.readouterr().out
    assert "no validation split: one image in ten, by a hash of its name, is held out for it" in out
    count = int(out.split("train: ")[1].split(" images found")[0])
    assert f"train: {count} images found: {count} with labels, 0 background, 0 without label file, 0 unread" in out
    assert len(list((folder / "runs/val/labels").glob("*.txt"))) == count
