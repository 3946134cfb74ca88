"""Exported files in place of a checkpoint: what each runtime gives, in `val`, `predict` and the Detector."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import mini, model_with_detections
from torch import Tensor
from torchvision.ops import batched_nms

from sp_yolo import Detector
from sp_yolo.backends import RUNTIMES, ExportedModel, runtime_of
from sp_yolo.boxes import cxcywh_to_xyxy
from sp_yolo.cli import guarded
from sp_yolo.errors import EnvironmentFault, StorageError, UserError
from sp_yolo.export import EndToEnd, export_model
from sp_yolo.models import DetectionModel, description


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    built = model_with_detections()
    built.names = ["red", "white", "plate"]
    return built


def pictures(batch: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(11))


def decoded(model: DetectionModel, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)[0]


CASES = [
    *((format, grid) for format in ("onnx", "torchscript") for grid in (False, True)),
    ("openvino", False),
    pytest.param("openvino", True, marks=pytest.mark.slow),
    *(pytest.param("pt2", grid, marks=pytest.mark.slow) for grid in (False, True)),
]


@pytest.mark.parametrize(("format", "grid"), CASES)
def test_a_file_gives_what_the_model_gives(model: DetectionModel, format: str, grid: bool, tmp_path: Path) -> None:
    for package in RUNTIMES[format].packages:
        pytest.importorskip(package)
    path = tmp_path / f"m{RUNTIMES[format].suffix}"
    varying = {} if format == "torchscript" else {"dynamic": True}
    export_model(model, format, output=path, image_size=(64, 96), grid=grid, **varying)
    file = ExportedModel(path)
    assert (file.names, file.num_classes, file.stride.tolist()) == (["red", "white", "plate"], 3, [8, 16])
    for images in (pictures(3), pictures(1, 96, 32)):
        torch.testing.assert_close(file(images)[0], decoded(model, images), rtol=1e-3, atol=1e-2)


def test_a_torch_program_of_one_size(model: DetectionModel, tmp_path: Path) -> None:
    export_model(model, "pt2", output=tmp_path / "m.pt2", image_size=(64, 64), grid=True)
    images = pictures(2, 64, 64)
    torch.testing.assert_close(
        ExportedModel(tmp_path / "m.pt2")(images)[0], decoded(model, images), rtol=1e-3, atol=1e-2
    )


@pytest.mark.slow
@pytest.mark.parametrize("format", ["litert", "ncnn"])
def test_files_of_small_boards(model: DetectionModel, format: str, tmp_path: Path) -> None:
    for package in {"litert": ("litert_torch", "ai_edge_litert"), "ncnn": ("pnnx", "ncnn")}[format]:
        pytest.importorskip(package)
    path = tmp_path / f"m{RUNTIMES[format].suffix}"
    if format == "ncnn":
        with pytest.raises(UserError, match="ReOrg, with which the P6 models begin, has no counterpart in ncnn"):
            export_model(model, format, output=path, image_size=(64, 96), grid=True)
        assert list(tmp_path.iterdir()) == []
        model = mini(3).eval()
    result = export_model(model, format, output=path, image_size=(64, 96), grid=True)
    assert result.max_difference is not None and result.max_difference < 1e-2
    images = pictures(3)
    torch.testing.assert_close(ExportedModel(path)(images)[0], decoded(model, images), rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_core_ml_is_written_where_it_cannot_run(model: DetectionModel, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    result = export_model(model, "coreml", output=tmp_path / "m.mlpackage", image_size=(64, 96), grid=True)
    assert (tmp_path / "m.mlpackage").is_dir()
    assert result.max_difference is not None or "run on macOS only" in result.note


def test_a_fixed_file_takes_other_numbers_and_smaller_images(model: DetectionModel, tmp_path: Path) -> None:
    """Three images through a file of two, 64 x 64 in 64 x 96: as the model sees them with gray on their right."""
    export_model(model, output=tmp_path / "m.onnx", image_size=(64, 96), batch_size=2, grid=True)
    file = ExportedModel(tmp_path / "m.onnx")
    images = pictures(3, 64, 64)
    bordered = torch.cat((images, torch.full((3, 3, 64, 32), 114 / 255)), 3)
    torch.testing.assert_close(file(images)[0], decoded(model, bordered), rtol=1e-3, atol=1e-2)
    with pytest.raises(UserError, match="made for images of 64 x 96 px, not 96 x 96: give a smaller --img"):
        file(pictures(1, 96, 96))
    with pytest.raises(UserError, match="--augment needs a checkpoint"):
        file(images, augment=True)


@pytest.mark.parametrize("form", ["rows", "efficient"])
def test_files_with_nms_give_their_detections(model: DetectionModel, form: str, tmp_path: Path) -> None:
    settings = EndToEnd(topk=20, iou_thres=0.5, conf_thres=0.3, form=form)
    export_model(model, output=tmp_path / "m.onnx", image_size=(64, 96), dynamic_batch=True, end2end=settings)
    images = pictures(3)
    found = ExportedModel(tmp_path / "m.onnx")(images)[0]
    whole = decoded(model, images)
    for rows, own in zip(found, whole, strict=True):
        kept = rows[rows[:, 4] > 0]
        scores = own[:, 4:5] * own[:, 5:]
        box, label = torch.nonzero(scores > 0.3 if form == "efficient" else scores == scores.amax(1, True)).unbind(1)
        passed = scores[box, label] > 0.3
        box, label = box[passed], label[passed]
        corners = cxcywh_to_xyxy(own[box, :4])
        order = batched_nms(corners, scores[box, label], label, 0.5)[:20]
        assert 3 < len(kept) == len(order)
        torch.testing.assert_close(kept[:, 4], scores[box[order], label[order]], rtol=1e-4, atol=1e-4)
        assert kept[:, 5:].argmax(1).tolist() == label[order].tolist()
        torch.testing.assert_close(kept[:, :4], own[box[order], :4], rtol=1e-3, atol=1e-2)


def test_efficient_outputs_have_the_plug_in_s_names_types_and_sizes(model: DetectionModel, tmp_path: Path) -> None:
    import onnxruntime

    settings = EndToEnd(topk=7, conf_thres=0.9999, form="efficient")
    result = export_model(model, output=tmp_path / "m.onnx", image_size=(64, 96), batch_size=2, end2end=settings)
    assert result.outputs == ("num_dets", "det_boxes", "det_scores", "det_classes")
    session = onnxruntime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    counts, boxes, scores, labels = session.run(None, {"images": pictures(2).numpy()})
    assert [each.shape for each in (counts, boxes, scores, labels)] == [(2, 1), (2, 7, 4), (2, 7), (2, 7)]
    assert counts.dtype == labels.dtype == np.int32 and counts.sum() == 0
    assert not boxes.any() and not scores.any() and (labels == -1).all()


def test_the_plug_in_s_node(model: DetectionModel, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    settings = EndToEnd(topk=50, iou_thres=0.6, conf_thres=0.2, form="tensorrt")
    result = export_model(model, output=tmp_path / "m.onnx", image_size=(64, 96), end2end=settings)
    node = onnx.load(str(result.path)).graph.node[-1]
    told = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert node.op_type == "EfficientNMS_TRT" and list(node.output) == list(result.outputs)
    assert (told["max_output_boxes"], told["background_class"], told["box_coding"]) == (50, -1, 0)
    assert told["score_threshold"] == pytest.approx(0.2) and told["iou_threshold"] == pytest.approx(0.6)
    with pytest.raises(UserError, match="max-wh 0"):
        EndToEnd(max_wh=0, form="efficient")


@pytest.mark.slow
def test_int8_is_near_and_smaller(model: DetectionModel, tmp_path: Path) -> None:
    for package in ("openvino", "nncf"):
        pytest.importorskip(package)
    images = [pictures(1).numpy() * scale for scale in np.linspace(0.2, 1, 8, dtype=np.float32)]
    told = {"image_size": (64, 96), "grid": True}
    whole = export_model(model, "openvino", output=tmp_path / "whole.xml", **told)
    small = export_model(model, "openvino", output=tmp_path / "small.xml", calibration=images, **told)
    sizes = [path.path.with_suffix(".bin").stat().st_size for path in (whole, small)]
    assert sizes[1] < 0.5 * sizes[0]
    assert whole.max_difference is not None and small.max_difference is not None
    assert whole.max_difference < 1e-2 < small.max_difference
    wanted = decoded(model, pictures(1))
    found = ExportedModel(tmp_path / "small.xml")(pictures(1))[0]
    assert float((found[..., :4] - wanted[..., :4]).abs().mean()) < 2  # px
    assert float((found[..., 4:] - wanted[..., 4:]).abs().mean()) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "litert", "dynamic": True}, "files of format litert take one size"),
        ({"format": "ncnn", "batch_size": 2}, "take one image per call"),
        ({"format": "litert", "fp16": True}, "fp16: not for format litert"),
        ({"format": "onnx", "calibration": []}, "int8: openvino only, not onnx"),
    ],
)
def test_what_a_format_cannot(model: DetectionModel, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export_model(model, output=tmp_path / "m", image_size=(64, 96), **options)


@pytest.mark.parametrize("format", ["openvino", "litert", "ncnn", "coreml", "tensorrt"])
def test_a_missing_runtime_is_one_line(model: DetectionModel, format: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=rf"exporting needs the package \w+: pip install 'sp-yolo\[{format}\]'"):
        export_model(model, format, output=tmp_path / "m", image_size=(64, 96))
    (tmp_path / f"m{RUNTIMES[format].suffix}").touch()
    with pytest.raises(EnvironmentFault, match=rf"running a \S+ file needs .*sp-yolo\[{format}\]"):
        ExportedModel(tmp_path / f"m{RUNTIMES[format].suffix}")


def test_tensorrt_without_a_gpu_is_one_line(model: DetectionModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match="built and run on an NVIDIA GPU, and this machine has none"):
        export_model(model, "tensorrt", output=tmp_path / "m.engine", image_size=(64, 96), grid=True)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_none(model: DetectionModel, tmp_path: Path) -> None:
    for name in ("m.onnx", "m.torchscript.pt", "m.torchscript", "m.pt2"):
        (tmp_path / name).write_bytes(b"not a program")
        with pytest.raises(StorageError, match=name) as fault:
            ExportedModel(tmp_path / name)
        assert "\n" not in str(fault.value)
    with pytest.raises(UserError, match="no such file"):
        ExportedModel(tmp_path / "absent.onnx")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), str(tmp_path / "other.torchscript"))
    with pytest.raises(UserError, match="does not say what it holds"):
        ExportedModel(tmp_path / "other.torchscript")
    assert runtime_of("best.pt") is None and runtime_of("best.torchscript.pt") is RUNTIMES["torchscript"]


def test_predict_and_val_take_a_file(
    model: DetectionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same detections, and the same figures, as the checkpoint's."""
    cv2 = pytest.importorskip("cv2")
    monkeypatch.chdir(tmp_path)
    torch.save({**description(model), "model": model.state_dict()}, "best.pt")
    export_model("best.pt", image_size=(64, 64), grid=True, dynamic=True)
    export_model("best.pt", output="fixed.onnx", image_size=(64, 64), grid=True)
    os.makedirs("images/val")
    os.makedirs("labels/val")
    generator = np.random.default_rng(3)
    for index in range(3):
        cv2.imwrite(f"images/val/{index}.png", generator.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        Path(f"labels/val/{index}.txt").write_text("0 0.5 0.5 0.4 0.5\n2 0.3 0.4 0.2 0.2\n")
    Path("data.yaml").write_text("train: images/val\nval: images/val\nnames: [red, white, plate]\n")
    photo = cv2.imread("images/val/0.png")
    wanted, found = (Detector(name, image_size=64)(photo) for name in ("best.pt", "best-grid.onnx"))
    assert len(wanted) == len(found) > 3
    np.testing.assert_allclose(found.xyxy, wanted.xyxy, atol=1)
    summaries = []
    for weights in ("best.pt", "best-grid.onnx"):
        flags = (
            f"--weights {weights} --data data.yaml --img 64 --batch-size 2 --device cpu --save-json --name {weights}"
        )
        assert guarded("val", flags.split()) == 0
        (records,) = Path("runs/test", weights).glob("*_predictions.json")
        summaries.append(json.loads(records.read_text()))
    assert len(summaries[0]) == len(summaries[1]) > 3
    for one, other in zip(*summaries, strict=True):
        np.testing.assert_allclose(one["bbox"], other["bbox"], atol=0.1)
    for command, rest in (("val", "--data data.yaml"), ("predict", "--source images/val --img 64")):
        assert guarded(command, f"--weights fixed.onnx {rest} --device cpu --name fixed".split()) == 0
    Path("data.yaml").write_text("train: images/val\nval: images/val\nnames: [white, red, plate]\n")
    assert guarded("val", ["--weights", "fixed.onnx", "--data", "data.yaml", "--device", "cpu"]) == 2
    assert "in another order" in capsys.readouterr().err
