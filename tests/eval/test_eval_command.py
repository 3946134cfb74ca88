"""`sp-yolo eval` from its arguments to its output."""

from __future__ import annotations

from pathlib import Path

import pytest

from sp_yolo.cli import run_command
from sp_yolo.errors import StorageError, UserError

FOLDER = Path(__file__).parent / "oracle" / "voc100_multiclass"
FILES = (str(FOLDER / "gt.json"), str(FOLDER / "dt.json"))


def call(*arguments: str) -> int:
    return run_command("eval", arguments)


def test_coco(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*FILES) == 0
    slow = capsys.readouterr().out
    lines = slow.splitlines()
    assert lines[1].split() == ["all", "100", "273", "0.665", "0.818", "0.61", "0.347"]
    assert " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0.347" in lines
    assert call(*FILES, "--fast") == 0
    assert capsys.readouterr().out == slow


def test_voc(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*FILES, "--metric", "voc07") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["person", "41", "91", "197", "78", "0.4005"]
    assert lines[-1] == " Mean average precision (VOC, 11 points) @[ IoU=0.50 | 20 classes ] = 0.5990"
    assert call(*FILES, "--metric", "voc12", "--iou", "0.75") == 0
    assert "IoU=0.75" in capsys.readouterr().out


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*FILES, "--report", str(tmp_path / "a" / "b")) == 0
    assert capsys.readouterr().out.rstrip().endswith("report.html")
    assert (tmp_path / "a" / "b" / "report.html").stat().st_size > 50_000
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"--report .*file/x: cannot be made"):
        call(*FILES, "--report", str(tmp_path / "file" / "x"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--iou", "0.5"), "--iou-thres belongs to --metric voc07 and voc12"),
        (("--metric", "voc07", "--fast"), "--fast belongs to --metric coco, not voc07"),
        (("--metric", "voc12", "--report", "x"), "--report belongs to --metric coco"),
        (("--metric", "voc12", "--iou", "1.5"), "iou 1.5 must be above 0 and at most 1"),
    ],
)
def test_flags_that_do_not_belong(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        call(*FILES, *arguments)
