"""The life of a model: two training steps, saved, loaded, deployed, exported."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sp_yolo.export import export_model
from sp_yolo.losses import DetectionLoss
from sp_yolo.models import build_model, deploy, description, load_weights, model_from_weights
from sp_yolo.models.grammar import packaged_models

HYP = {
    "box": 0.05,
    "cls": 0.3,
    "cls_pw": 1.0,
    "obj": 0.7,
    "obj_pw": 1.0,
    "iou_t": 0.2,
    "anchor_t": 4.0,
    "fl_gamma": 0.0,
    "label_smoothing": 0.0,
}


def one_life(name: str, width: float, folder: Path) -> None:
    with torch.device("meta"):
        config = build_model(name).yaml
    torch.manual_seed(0)
    model = build_model({**config, "width_multiple": width}, num_classes=4)
    side = 2 * int(max(model.stride))
    images = torch.rand(2, 3, side, side)
    targets = torch.tensor([[0, 1, 0.4, 0.5, 0.3, 0.4], [1, 3, 0.6, 0.5, 0.5, 0.5], [1, 0, 0.3, 0.3, 0.2, 0.3]])
    loss_function = DetectionLoss(model, HYP, side, assigner="ota")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(2):
        loss, _ = loss_function(model(images), targets, (side, side))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)

    torch.save({**description(model), "model": model.state_dict()}, folder / "last.pt")
    loaded = model_from_weights(folder / "last.pt").eval()
    report = load_weights(build_model(model.yaml), folder / "last.pt")
    assert report.transferred == report.total and not report.notes
    model.eval()
    with torch.no_grad():
        expected, _ = model(images)
        torch.testing.assert_close(loaded(images)[0], expected, rtol=0, atol=0)
        # Two steps on noise leave activations so large that float32 itself is 0.3 px away from float64 (yolov7-d6).
        model, images = model.double(), images.double()
        deployed = deploy(model)
        torch.testing.assert_close(deployed(images)[0], model(images)[0], rtol=0, atol=1e-6)
    assert deployed.head.auxiliary is False

    for form in ("onnx", "torchscript"):
        result = export_model(folder / "last.pt", form, image_size=(side, side), grid=True)
        assert result.max_difference < 5e-3 and result.path.parent == folder


@pytest.mark.parametrize("name", ["yolov7", "yolov7-w6"])
def test_life_of_a_narrow_model(name: str, tmp_path: Path) -> None:
    one_life(name, 0.125, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged_models())
def test_life_of_a_model_in_full_width(name: str, tmp_path: Path) -> None:
    one_life(name, 1.0, tmp_path)
