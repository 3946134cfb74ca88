"""Batch normalisation has no variance of one value: said before training starts, with a size that works."""

import re
from pathlib import Path

import pytest
import torch
from support.launcher import one_error, small

from sp_yolo.cli import main_train
from sp_yolo.engine.inputs import rescale


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--img 32 --batch 19", "--img-size 32 and --batch-size 19: .* stride 32.* give --img-size 64 or another"),
        ("--img 64 --batch 1 --multi-scale", "--img-size 64 .*down to 32. and --batch-size 1: .* --img-size 128"),
        ("--img 32 --batch 18", ""),  # the last batch of the 20 images has two
        ("--img 64 --batch 19", ""),  # one image, of four cells
    ],
)
def test_one_image_of_one_cell(
    flags: str,
    words: str,
    toy_yaml: Path,
    mini_cfg: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main_train([*small(toy_yaml, "--cfg", mini_cfg), "--epochs", "1", *flags.split(" ")])
    error = capsys.readouterr().err
    if words:
        assert code == 2 and re.search(words, one_error(error)) and not (tmp_path / "runs").exists()
    else:
        assert code == 0, error


def test_no_scale_is_below_the_grid() -> None:
    """Half of 32 px was rounded down to nothing."""
    images = torch.rand(1, 3, 32, 32)
    sides = {rescale(images, 32, 32, seed=0, iteration=number).shape[2] for number in range(40)}
    assert sides == {32, 64}
