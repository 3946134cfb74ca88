"""Weights -> a Detector: what it takes as an image, and that all forms of one image give the same."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from support.networks import MINI

from sp_yolo import Detector
from sp_yolo.errors import UserError
from sp_yolo.models import build_model, description
from sp_yolo.runtime.device import select_compute


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """A network that finds something everywhere."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "mini.yaml").write_text(MINI)
    torch.manual_seed(0)
    model = build_model(str(folder / "mini.yaml"))
    for level in model.head.m:
        torch.nn.init.normal_(level.weight, 0, 0.5)
        torch.nn.init.constant_(level.bias, 0.5)
    torch.save({**description(model), "model": model.state_dict()}, folder / "best.pt")
    return Detector(str(folder / "best.pt"), select_compute("cpu", "off"), image_size=64)


def test_a_path_an_array_and_a_list_are_the_same_image(detector: Detector, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    assert cv2.imwrite(str(path), pixels)
    wanted = detector(pixels)
    assert wanted.shape[1] == 6 and len(wanted) > 1
    assert not torch.equal(wanted, detector(np.ascontiguousarray(pixels[..., ::-1])))  # the order of colours counts
    assert torch.equal(detector(path), wanted) and torch.equal(detector(str(path)), wanted)
    several = detector([path, pixels])
    assert isinstance(several, list) and all(torch.equal(rows, wanted) for rows in several) and len(several) == 2
    assert detector([]) == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("nosuch.jpg", "nosuch.jpg: no such file"),
        (np.zeros((8, 8), np.uint8), r"must be uint8 \[H, W, 3\] \(BGR\), not uint8 \[8, 8\]"),
        (np.zeros((8, 8, 3), np.float32), "not float32"),
        (np.zeros((3, 8, 8), np.uint8), r"not uint8 \[3, 8, 8\]"),
        (5, "must be a path or an array, not int"),
        ([np.zeros((8, 8, 4), np.uint8)], r"\[8, 8, 4\]"),
    ],
)
def test_what_is_no_image(detector: Detector, image: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        detector(image)  # type: ignore[call-overload]
