"""Exported files: what they compute, what their own check refuses, and the flags of sp-yolo export."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.networks import model_with_detections
from torch import Tensor

from sp_yolo.boxes import non_max_suppression
from sp_yolo.cli import run_command
from sp_yolo.errors import EnvironmentFault, SPYoloError, UserError
from sp_yolo.export import EndToEnd, end2end, export_model, files
from sp_yolo.models import DetectionModel, description


def pictures(batch: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(11))


def run_onnx(path: Path, images: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    return model_with_detections()


def test_onnx_maps_with_a_free_batch(model: DetectionModel, tmp_path: Path) -> None:
    result = export_model(model, output=tmp_path / "m.onnx", image_size=(64, 96), dynamic_batch=True)
    assert result.outputs == ("map0", "map1") and result.max_difference < 1e-3
    with torch.no_grad():
        _, expected = model(pictures(3))
    for values, wanted in zip(run_onnx(result.path, pictures(3)), expected, strict=True):
        np.testing.assert_allclose(values, wanted.numpy(), rtol=1e-4, atol=1e-4)
    properties = {p.key: p.value for p in onnx.load(str(result.path)).metadata_props}
    assert json.loads(properties["names"]) == ["0", "1", "2"] and properties["stride"] == "16"


@pytest.mark.parametrize("simplify", [False, True])
def test_onnx_boxes_at_any_size(model: DetectionModel, tmp_path: Path, simplify: bool) -> None:
    result = export_model(
        model, output=tmp_path / "m.onnx", image_size=(64, 64), grid=True, dynamic=True, simplify=simplify
    )
    assert result.outputs == ("output",)
    for images in (pictures(1, 32, 160), pictures(4, 96, 48)):
        with torch.no_grad():
            expected, _ = model(images)
        np.testing.assert_allclose(run_onnx(result.path, images)[0], expected.numpy(), rtol=1e-4, atol=1e-3)


def test_a_fixed_file_is_fixed(model: DetectionModel, tmp_path: Path) -> None:
    result = export_model(model, output=tmp_path / "m.onnx", image_size=(64, 96), batch_size=2, grid=True)
    assert run_onnx(result.path, pictures(2))[0].shape == (2, 2 * (8 * 12 + 4 * 6), 8)
    with pytest.raises(Exception, match=r"[Gg]ot invalid dimensions"):
        run_onnx(result.path, pictures(3))


@pytest.mark.parametrize(("max_wh", "classes"), [(4096, 3), (0, 3), (4096, 1)])
def test_end_to_end_equals_nms_outside(max_wh: float, classes: int, tmp_path: Path) -> None:
    model = model_with_detections(classes)
    settings = EndToEnd(topk=20, iou_thres=0.5, conf_thres=0.3, max_wh=max_wh)
    result = export_model(model, output=tmp_path / "m.onnx", image_size=(64, 96), dynamic_batch=True, end2end=settings)
    (rows,) = run_onnx(result.path, pictures(3))
    with torch.no_grad():
        decoded, _ = model(pictures(3))
    wanted = non_max_suppression(decoded, 0.3, 0.5, multi_label=False, agnostic=max_wh == 0, max_det=20)
    assert sum(len(detections) for detections in wanted) > 15
    for index, detections in enumerate(wanted):
        own = rows[rows[:, 0] == index][:, 1:]
        assert len(own) == len(detections)
        expected = torch.cat((detections[:, :4], detections[:, 5:], detections[:, 4:5]), 1)
        np.testing.assert_allclose(own, expected.numpy(), rtol=1e-4, atol=1e-3)


def test_end_to_end_without_detections(model: DetectionModel, tmp_path: Path) -> None:
    settings = EndToEnd(conf_thres=1.0)
    result = export_model(model, output=tmp_path / "m.onnx", image_size=(64, 96), end2end=settings)
    assert run_onnx(result.path, pictures(1))[0].shape == (0, 7)


@pytest.mark.parametrize("grid", [False, True])
def test_torchscript(model: DetectionModel, tmp_path: Path, grid: bool) -> None:
    result = export_model(model, "torchscript", output=tmp_path / "m.pt", image_size=(64, 96), grid=grid, dynamic=True)
    results = torch.jit.load(str(result.path))(pictures(3, 32, 48))
    with torch.no_grad():
        decoded, maps = model(pictures(3, 32, 48))
    for values, wanted in zip(results, [decoded] if grid else maps, strict=True):
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-3)


def test_half_precision(model: DetectionModel, tmp_path: Path) -> None:
    whole = export_model(model, output=tmp_path / "whole.onnx", image_size=(64, 96), grid=True)
    half = export_model(model, output=tmp_path / "half.onnx", image_size=(64, 96), grid=True, fp16=True)
    assert half.path.stat().st_size < 0.7 * whole.path.stat().st_size
    assert whole.max_difference < half.max_difference < 4
    (boxes,) = run_onnx(half.path, pictures(1).half())
    assert boxes.dtype == np.float32


def test_the_check_finds_a_wrong_file(model: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that computes something else is removed: here the deployed copy is damaged on its way."""

    def damaged(source: DetectionModel) -> DetectionModel:
        copy = deploy(source)
        with torch.no_grad():
            copy.head.m[1].bias[3] += 0.5
        return copy

    deploy = files.deploy
    monkeypatch.setattr(files, "deploy", damaged)
    for format in ("onnx", "torchscript"):
        with pytest.raises(SPYoloError, match=r"differs from the model's by 0\.5"):
            export_model(model, format, output=tmp_path / "m", image_size=(64, 96))
        assert not (tmp_path / "m").exists()


def test_the_check_finds_wrong_nms(model: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(graph: Any, settings: EndToEnd) -> Any:
        return end2end.with_nms(graph, EndToEnd(settings.topk, 0.9, settings.conf_thres))

    monkeypatch.setattr(files, "with_nms", other)
    with pytest.raises(SPYoloError, match="NMS in the file keeps other boxes"):
        export_model(model, output=tmp_path / "m.onnx", image_size=(64, 96), end2end=EndToEnd())
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "paper"}, "format must be one of onnx, torchscript, .*, got 'paper'"),
        ({"format": "torchscript", "end2end": EndToEnd()}, "are for format onnx"),
        ({"image_size": (64, 100)}, r"img-size must be two multiples of 16 \(height, width\), got \[64, 100\]"),
        ({"image_size": (0, 64)}, "img-size must be two multiples"),
        ({"batch_size": 0}, "batch-size must be at least 1, got 0"),
        ({"output": None}, "output must be given"),
    ],
)
def test_impossible_wishes(model: DetectionModel, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_model(model, **{"output": tmp_path / "m.onnx", "image_size": (64, 96), **options})
    assert list(tmp_path.iterdir()) == []


def test_impossible_nms_settings() -> None:
    for settings in ({"topk": 0}, {"iou_thres": 1.5}, {"conf_thres": -0.1}, {"max_wh": -1}):
        with pytest.raises(UserError, match="end2end: topk from 1"):
            EndToEnd(**settings)


def test_missing_package_is_named(model: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"needs the package onnx: pip install 'sp-yolo\[export\]'"):
        export_model(model, output=tmp_path / "m.onnx", image_size=(64, 96))


def test_command(model: DetectionModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**description(model), "model": model.state_dict()}, tmp_path / "best.pt")
    flags = f"--weights {tmp_path / 'best.pt'} --img 64 --batch 2 --grid --end2end --conf 0.3 --iou 0.5 --topk-all 7"
    assert run_command("export", flags.split()) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "best-end2end.onnx" in line and "largest difference from the model: " in line
    (rows,) = run_onnx(tmp_path / "best-end2end.onnx", pictures(2, 64, 64))
    assert rows.shape[1] == 7 and 0 < len(rows) <= 14
    assert (
        run_command(
            "export", ["--weights", str(tmp_path / "best.pt"), "--img-size", "64", "96", "--format", "torchscript"]
        )
        == 0
    )
    assert (tmp_path / "best.torchscript.pt").is_file()


def test_files_that_return_other_things_do_not_overwrite_each_other(model: DetectionModel, tmp_path: Path) -> None:
    torch.save({**description(model), "model": model.state_dict()}, tmp_path / "best.pt")
    for kind in ({}, {"grid": True}, {"end2end": EndToEnd()}):
        export_model(tmp_path / "best.pt", image_size=(64, 64), **kind)
    sizes = {
        name: [output.shape[-1] for output in run_onnx(tmp_path / f"{name}.onnx", pictures(1, 64, 64))]
        for name in ("best", "best-grid", "best-end2end")
    }
    columns = 5 + model.num_classes
    assert sizes == {"best": [columns] * 2, "best-grid": [columns], "best-end2end": [7]}


@pytest.mark.parametrize("grid", [False, True])
def test_torchscript_names_no_device(model: DetectionModel, tmp_path: Path, grid: bool) -> None:
    """A file made on one device runs on another: what it makes anew it makes where its images are."""
    result = export_model(model, "torchscript", output=tmp_path / "m.pt", image_size=(64, 96), grid=grid)
    file = torch.jit.load(str(result.path))
    graph = file.inlined_graph
    constants = graph.findAllNodes("prim::Constant")
    assert len(constants) > 5
    assert not [str(node) for node in constants if node.output().type().kind() == "DeviceObjType"]
    # What follows the weights moves with them: in float64 the same boxes come out.
    with torch.no_grad():
        wanted = model(pictures(3, 32, 160))[0] if grid else model(pictures(3, 32, 160))[1][0]
        found = file.to(torch.float64)(pictures(3, 32, 160).double())[0]
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-2)
