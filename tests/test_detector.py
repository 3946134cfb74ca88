"""Weights -> a Detector: what it takes as an image, and that all forms of one image give the same."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from support.datasets import jpeg, picture
from support.networks import MINI

from sp_yolo import Detector
from sp_yolo.detections import Detection, Detections
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
    wanted = detector(pixels).to_tensor()
    assert wanted.shape[1] == 6 and len(wanted) > 1
    other = detector(np.ascontiguousarray(pixels[..., ::-1])).to_tensor()
    assert not torch.equal(wanted, other)  # the order of colours counts
    for image in (path, str(path), PIL.Image.open(path), PIL.Image.fromarray(pixels[..., ::-1]).convert("RGBA")):
        assert torch.equal(detector(image).to_tensor(), wanted)
    several = detector([path, pixels])
    assert len(several) == 2 and detector([]) == []
    for each in several:
        assert torch.allclose(each.to_tensor(), wanted, atol=1e-4)


def test_a_pil_image_is_turned_upright(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    path.write_bytes(jpeg(picture(48, 64), orientation=6))
    assert torch.equal(detector(PIL.Image.open(path)).to_tensor()[:, :4], detector(path).to_tensor()[:, :4])


def test_images_of_all_shapes_in_batches_give_what_each_gives_alone(detector: Detector, counted: list[int]) -> None:
    generator = np.random.default_rng(1)
    shapes = [(48, 64), (64, 64), (48, 64), (64, 32), (48, 64), (24, 32), (64, 64)]
    images = [generator.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in shapes]
    alone = [detector(image) for image in images]
    del counted[:]
    together = detector(images)
    # The first four: 64 x 64 and what is padded to it, then 64 x 32; the last three are padded to 64 x 64.
    assert counted == [3, 1, 3]
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other) > 0 and list(one.class_ids) == list(other.class_ids)
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-4)
        np.testing.assert_allclose(other.xyxy, one.xyxy, atol=1)


def test_threads_may_share_it(detector: Detector) -> None:
    images = [np.random.default_rng(n).integers(0, 255, (48, 64, 3), dtype=np.uint8) for n in range(8)]
    alone = [detector(image).to_tensor() for image in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(map(torch.equal, [each.to_tensor() for each in pool.map(detector, images)], alone))


@pytest.fixture
def counted(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in each call of the network; a batch is four at most."""
    calls: list[int] = []

    def forward(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return before.forward(images)

    before = detector._network
    monkeypatch.setattr(detector, "_network", dataclasses.replace(before, forward=forward))
    monkeypatch.setattr(detector, "batch_size", 4)
    return calls


def found() -> Detections:
    boxes = np.array([[1, 2, 11, 22], [5, 5, 8, 9]], np.float32)
    return Detections(boxes, np.array([0.75, 0.5], np.float32), np.array([2, 0]), ("RBC", "WBC", "Platelets"))


def test_detections_as_values_and_coco_dicts() -> None:
    both = found()
    assert list(both) == [both[0], Detection((5, 5, 8, 9), 0.5, 0, "RBC")] and len(both) == 2
    assert both[0] == Detection(xyxy=(1, 2, 11, 22), score=0.75, class_id=2, name="Platelets")
    assert str(both) == "1 RBC, 1 Platelets" and both.to_tensor().tolist()[1] == [5, 5, 8, 9, 0.5, 0]
    assert both.moved(100, 10)[1].xyxy == (105, 15, 108, 19)
    box = {"image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 20], "score": 0.75}
    assert both.to_coco(7)[0] == box and both.to_coco(7, [11, 12, 13])[1]["category_id"] == 11


def test_detections_for_supervision() -> None:
    supervision = pytest.importorskip("supervision")
    theirs = found().to_supervision()
    assert isinstance(theirs, supervision.Detections) and list(theirs.class_id) == [2, 0]
    assert list(theirs.data["class_name"]) == ["Platelets", "RBC"] and theirs.area.tolist() == [200, 12]
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), ("a",))
    assert len(nothing.to_supervision()) == 0 and str(nothing) == "nothing" and nothing.to_coco(1) == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("nosuch.jpg", "nosuch.jpg: no such file"),
        (np.zeros((8, 8), np.uint8), r"must be uint8 \[H, W, 3\] \(BGR\), not uint8 \[8, 8\]"),
        (np.zeros((8, 8, 3), np.float32), "not float32"),
        (np.zeros((3, 8, 8), np.uint8), r"not uint8 \[3, 8, 8\]"),
        (5, "must be a path, an array or a PIL image, not int"),
        ([np.zeros((8, 8, 4), np.uint8)], r"\[8, 8, 4\]"),
    ],
)
def test_what_is_no_image(detector: Detector, image: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        detector(image)  # type: ignore[call-overload]
