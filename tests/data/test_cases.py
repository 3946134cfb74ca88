"""People's inputs, each as its expected.md says: what is read, and in which words the rest is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.cases import BLOCK, DISC, go, load

from sp_yolo import cli
from sp_yolo.config import load_dataset_config
from sp_yolo.data.images import read_image
from sp_yolo.data.index import scan
from sp_yolo.errors import UserError

Output = pytest.CaptureFixture[str]


def sizes(yaml: str, split: str) -> tuple[int, int]:
    """Images and boxes of a split."""
    index = load(yaml, split)[1]
    return len(index.entries), index.counts["boxes"]


@pytest.mark.parametrize("yaml", ["data.yaml", "noblock.yaml"])
@pytest.mark.parametrize("inside", [False, True])
def test_01_roboflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str, inside: bool) -> None:
    folder = go(1, tmp_path, monkeypatch)
    if inside:
        monkeypatch.chdir(folder / "ds")
    path = yaml if inside else f"ds/{yaml}"
    assert [sizes(path, split) for split in ("train", "val", "test")] == [(4, 8), (2, 4), (1, 2)]
    notes = "\n".join(load_dataset_config(path).notes)
    assert f"../train/images taken as {folder}/ds/train/images" in notes
    assert ("'roboflow'" in notes) == (yaml == "data.yaml")


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("numbered", "numbered.yaml:4: names are numbered 1..2, but class ids count from 0"),
        ("yesno", "yesno.yaml:4: class name True is not a word (quote it)"),
        ("onestring", "onestring.yaml:4: names must be a list"),
        ("ncmismatch", "ncmismatch.yaml:3: nc = 80, but 2 names"),
        ("nonames", "nonames.yaml:1: names must be a list of class names (there is none)"),
        ("tab", "tab.yaml:3: found character '\\t'"),
        ("gbk", "gbk.yaml: cannot be read as text: not UTF-8 text (byte 0xb7 in line 4): save it as UTF-8"),
        ("twice", "twice.yaml:4: class name 'disc' appears twice"),
    ],
)
def test_03_yaml_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str, words: str) -> None:
    go(3, tmp_path, monkeypatch)
    with pytest.raises(UserError) as caught:
        load_dataset_config(f"ds/{yaml}.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("yaml", "names"),
    [(yaml, "disc block") for yaml in ("data", "utf8bom", "quoted", "extnames")],
)
def test_03_yaml_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yaml: str, names: str) -> None:
    go(3, tmp_path, monkeypatch)
    config = load_dataset_config(f"ds/{yaml}.yaml")
    assert config.names == tuple(names.split()) and sizes(f"ds/{yaml}.yaml", "train") == (4, 8)
    assert any("'author', 'colors'" in note for note in config.notes) == (yaml == "data")


def test_03_numbers_as_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(3, tmp_path, monkeypatch)
    assert load_dataset_config("ds/numbers.yaml").names == ("0", "1") and sizes("ds/numbers.yaml", "train") == (4, 8)


def test_05_windows_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(5, tmp_path, monkeypatch)
    assert sizes("ds/a.yaml", "train") == (4, 8) and sizes("ds/a.yaml", "val") == (2, 4)
    with pytest.raises(UserError, match=r"b\.yaml:1: train: .*D:\\datasets\\data\\images \(a path of a Windows"):
        load_dataset_config("ds/b.yaml")
    with pytest.raises(UserError, match=r"c\.yaml:1: found unknown escape character 'd'"):
        load_dataset_config("ds/c.yaml")


def test_06_capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = go(6, tmp_path, monkeypatch)
    assert sizes("ds/data.yaml", "train") == (4, 8) and sizes("ds/data.yaml", "val") == (2, 4)
    (folder / "ds/Train/Labels").rename(folder / "ds/Train/Etiketten")
    with pytest.raises(UserError, match=r"no label file was found, the first looked for is .*/ds/Train/Images/p0.txt"):
        load("ds/data.yaml")
    (folder / "ds/Train/Etiketten").rename(folder / "ds/Train/annotations")
    (folder / "ds/Train/Images").rename(folder / "ds/Train/imgs")
    (folder / "ds/data.yaml").write_text("train: ds/Train/imgs\nnames: [disc, block]\n")
    assert sizes("ds/data.yaml", "train") == (4, 8)


def test_07_flat_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(7, tmp_path, monkeypatch)
    _, index, _ = load("ds/data.yaml")
    assert index.counts == {"images": 4, "boxes": 8} and not index.warnings


def test_09_text_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = go(9, tmp_path, monkeypatch)
    _, index, boxes = load("ds/data.yaml")
    assert len(boxes) == 10 and "comma" not in boxes and all(found == [DISC, BLOCK] for found in boxes.values())
    (line,) = index.warnings
    assert line.startswith(f"{folder}/ds/labels/comma.txt:1: not a number:")


def test_10_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = go(10, tmp_path, monkeypatch)
    _, index, boxes = load("ds/data.yaml")
    one_class_on = ("block", *DISC[1:])
    both, disc = [DISC, BLOCK], [DISC]
    expected = {"conf": both, "mixed": both, "obb": disc, "onebased": [one_class_on], "pose01x2": disc, "pose3": disc}
    assert boxes == expected
    for name in ("minus1", "name", "pixels", "pose2x4"):
        assert any(line.startswith(f"{folder}/ds/labels/{name}.txt:1: ") for line in index.warnings), name
    for yaml in ("data", "kpt"):
        _, index, boxes = load(f"pose/{yaml}.yaml")
        assert boxes == {f"k{n}": disc for n in range(4)} and index.counts["keypoints behind the box not used"] == 4


def test_13_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = go(13, tmp_path, monkeypatch)
    at = {"disc": (25, 25), "block": (40, 70)}
    colours = {"disc": (40, 40, 220), "block": (40, 200, 40)}
    pictures = {path.name: read_image(path) for path in (folder / "ds/images").iterdir()}
    coloured = "palette.png alpha.png cmyk.jpg progressive.jpg bits16.png bits16.tif transparent.png multipage.tif"
    for name in [*coloured.split(), "bits12in16.png", "float01.tif"]:
        for thing, place in at.items():
            assert np.abs(pictures[name][place].astype(int) - colours[thing]).max() <= 3, name
    for name in ("gray.png", "grayalpha.png", "gray12.tif"):
        assert (pictures[name][..., :1] == pictures[name]).all() and pictures[name].max() > 90, name
    index = load("ds/data.yaml")[1]
    assert len(index.entries) == len(pictures) == 14


def test_18_junk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(18, tmp_path, monkeypatch)
    _, index, _ = load("ds/data.yaml")
    assert index.counts == {"images": 4, "boxes": 8}
    assert "5 pictures in hidden or system folders left out" in index.warnings[0]


def test_21_roboflow_coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(21, tmp_path, monkeypatch)
    for yaml in ("ds/data.yaml", "ds/folder.yaml"):
        assert (sizes(yaml, "train"), sizes(yaml, "val")) == ((3, 6), (2, 4))
        assert load(yaml)[1].category_ids == [1, 2]
    _, index, boxes = load("same/data.yaml")
    assert {name for found in boxes.values() for name, *_ in found} == {"disc"}
    assert index.counts["boxes"] == 6 and index.category_ids == [1]


def test_22_cvat_coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    go(22, tmp_path, monkeypatch)
    assert sizes("ds/data.yaml", "train") == sizes("ds/noimages.yaml", "train") == (3, 6)
    with pytest.raises(UserError, match=r"all 6 objects are crowds \(iscrowd = 1\)"):
        load("ds/masks.yaml")
    assert cli.main(["check", "--data", "ds/partly.yaml", "--img", "64", "--output", "out"]) == 0
    words = "train: all 3 objects of block are crowds (iscrowd = 1): the class is not trained on"
    assert f"warning: {words}" in capsys.readouterr().out.splitlines()


def test_24_voc_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = go(24, tmp_path, monkeypatch)
    config, index, boxes = load("ds/data.yaml")
    special = {"empty": [], "difficult": [BLOCK], "case": [BLOCK], "onebased": [("disc", 1, 1, 96, 64), BLOCK]}
    for name, found in boxes.items():
        assert found == special.get(name, [DISC, BLOCK]), name
    assert len(boxes) == 24 and index.tally.ignored == 1 and index.tally.background == 1
    assert [line.startswith(f"{folder}/ds/Annotations/case.xml:6: unknown class") for line in index.warnings] == [True]
    for name, text in (("plain", "<annotation><object>"), ("part", "<annotation>&what;</annotation>")):
        (folder / f"ds/Annotations/{name}.xml").write_text(text)
    index = scan(config, "train")  # labels that cannot be read make no background
    assert index.tally.unread == {"malformed XML": 2} and index.tally.found == 24 and len(index.entries) == 22
    assert index.tally.dropped == {"malformed XML": 1, "unknown class": 1}
