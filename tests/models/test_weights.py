"""Loading weights of every origin, and what the report says about them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_original import as_original, original_modules, save_original
from safetensors.torch import save_file
from support.networks import one_layer

from sp_yolo.errors import UserError
from sp_yolo.models import (
    DetectionModel,
    build_model,
    deploy,
    description,
    load_weights,
    model_from_weights,
    read_checkpoint,
)


@pytest.fixture(scope="module")
def tiny() -> DetectionModel:
    return randomised(build_model("yolov7-tiny", 5), seed=1)


@pytest.fixture(scope="module")
def w6() -> DetectionModel:
    """yolov7-w6 in its layout, an eighth as wide: the file sizes of a test."""
    return randomised(build_model({**build_model_config("yolov7-w6"), "width_multiple": 0.125}, 4), seed=2)


def build_model_config(name: str) -> dict:
    with torch.device("meta"):
        return build_model(name).yaml


def randomised(model: DetectionModel, seed: int) -> DetectionModel:
    """Batch statistics and vectors away from their defaults, so that every transferred tensor is told apart."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if key.endswith(("running_var", "bn.weight")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif key.endswith(("running_mean", "bias", "implicit")):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1 + (1 if ".im." in key else 0))
    return model.eval()


def outputs(model: DetectionModel, size: int = 64) -> torch.Tensor:
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return copy.deepcopy(model).eval()(image)[0]


def halved(model: DetectionModel) -> DetectionModel:
    return copy.deepcopy(model).half().float()


def test_original_checkpoint_builds_the_same_model(tiny: DetectionModel, tmp_path: Path) -> None:
    tiny = copy.deepcopy(tiny)
    tiny.names = ["a", "b", "c", "d", "e"]
    save_original(tiny, tmp_path / "last.pt")
    assert "models.yolo" not in sys.modules
    loaded = model_from_weights(tmp_path / "last.pt")
    assert loaded.names == ["a", "b", "c", "d", "e"]
    assert {v.dtype for v in loaded.state_dict().values()} == {torch.float32, torch.int64}
    torch.testing.assert_close(outputs(loaded), outputs(halved(tiny)), rtol=0, atol=0)
    assert "models.yolo" not in sys.modules


def test_ema_is_preferred(tiny: DetectionModel, tmp_path: Path) -> None:
    other = randomised(build_model("yolov7-tiny", 5), seed=3)
    save_original(tiny, tmp_path / "last.pt", ema=other)
    model = build_model("yolov7-tiny", 5)
    report = load_weights(model, tmp_path / "last.pt")
    assert (report.transferred, report.total) == (344, 344)
    torch.testing.assert_close(outputs(model), outputs(halved(other)), rtol=0, atol=0)


def test_bare_pickled_model_and_other_content(tiny: DetectionModel, tmp_path: Path) -> None:
    with original_modules() as modules:
        torch.save(as_original(tiny, modules), tmp_path / "init.pt")
    torch.testing.assert_close(outputs(model_from_weights(tmp_path / "init.pt")), outputs(tiny), rtol=0, atol=0)
    optimizer = {"state": {0: {"momentum_buffer": torch.arange(3.0)}}, "param_groups": []}
    save_original(tiny, tmp_path / "last.pt", optimizer=optimizer)
    content = read_checkpoint(tmp_path / "last.pt")
    assert content["epoch"] == 3 and content["updates"] == 7 and content["training_results"] == "0/2 1.2G 0.1"
    np.testing.assert_array_equal(content["best_fitness"], np.array([0.25]))
    assert content["optimizer"]["state"][0]["momentum_buffer"].tolist() == [0.0, 1.0, 2.0]
    np.testing.assert_array_equal(content["model"].state["class_weights"], np.ones(5))


def test_fine_tuning_with_another_class_count(tiny: DetectionModel, tmp_path: Path) -> None:
    save_original(tiny, tmp_path / "w.pt")
    model = build_model("yolov7-tiny", 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_weights(model, tmp_path / "w.pt")
    # 3 levels x (m.weight, m.bias, im) have another shape; ia has not.
    assert (report.transferred, report.total, len(report.mismatched)) == (335, 344, 9)
    assert report.mismatched[0] == ("model.77.m.0.weight", (30, 128, 1, 1), (21, 128, 1, 1))
    assert "Transferred 335/344 items from" in str(report) and "5 classes and the model 2" in str(report)
    after = model.state_dict()
    for key, value in tiny.state_dict().items():
        fresh = key.startswith(("model.77.m.", "model.77.im."))
        expected = before[key] if fresh else (value.half().float() if value.is_floating_point() else value)
        torch.testing.assert_close(after[key], expected, rtol=0, atol=0, msg=key)


def test_own_anchors_stay_when_asked(tiny: DetectionModel, tmp_path: Path) -> None:
    save_original(tiny, tmp_path / "w.pt")
    own = [[8, 9, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25], [80, 81, 82, 83, 84, 85]]
    model = build_model("yolov7-tiny", 5, anchors=own)
    report = load_weights(model, tmp_path / "w.pt", keep_anchors=True)
    assert report.transferred == 342
    assert model.head.anchor_grid.flatten().tolist() == [float(v) for level in own for v in level]
    load_weights(model, tmp_path / "w.pt")
    assert model.head.anchor_grid.flatten().tolist() == tiny.head.anchor_grid.flatten().tolist()


def test_state_dict_safetensors_and_own_format(tiny: DetectionModel, tmp_path: Path) -> None:
    state = tiny.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "ddp.pt")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "plain.safetensors")
    other = randomised(build_model("yolov7-tiny", 5), seed=4)
    torch.save({**description(tiny), "model": other.state_dict(), "ema": state}, tmp_path / "own.pt")
    for name in ("plain.pt", "ddp.pt", "plain.safetensors", "own.pt"):
        model = model_from_weights(tmp_path / name)
        assert model.num_classes == 5, name
        torch.testing.assert_close(outputs(model), outputs(tiny), rtol=0, atol=0, msg=name)


def test_training_weights_in_a_deploy_model(w6: DetectionModel, tmp_path: Path) -> None:
    torch.save({**description(w6), "model": w6.state_dict()}, tmp_path / "training.pt")
    deployed = deploy(w6)
    model = build_model(deployed.yaml)
    report = load_weights(model, tmp_path / "training.pt")
    assert report.transferred == report.total and "training weights in a deploy model" in str(report)
    torch.testing.assert_close(outputs(model, 128), outputs(w6, 128), rtol=1e-4, atol=1e-3)


def test_deploy_weights_in_a_training_model(w6: DetectionModel, tmp_path: Path) -> None:
    source = randomised(build_model(deploy(w6).yaml), seed=5)
    torch.save({**description(source), "model": source.state_dict()}, tmp_path / "deploy.pt")
    model = build_model(w6.yaml)
    report = load_weights(model, tmp_path / "deploy.pt")
    assert "deploy weights in a training model" in str(report) and "auxiliary heads start fresh" in str(report)
    assert all(key.startswith(tuple(f"model.{i}." for i in range(118, 123))) for key in report.missing)
    torch.testing.assert_close(outputs(model, 128), outputs(source, 128), rtol=0, atol=0)


def test_fused_weights_run_but_do_not_train(w6: DetectionModel, tmp_path: Path) -> None:
    deployed = deploy(w6)
    torch.save({**description(deployed), "model": deployed.state_dict()}, tmp_path / "fused.pt")
    loaded = model_from_weights(tmp_path / "fused.pt")
    torch.testing.assert_close(outputs(loaded, 128), outputs(deployed, 128), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"fused\.pt: holds fused weights"):
        load_weights(w6, tmp_path / "fused.pt")
    torch.save(w6.state_dict(), tmp_path / "training.pt")
    with pytest.raises(UserError, match="load them first, then deploy"):
        load_weights(deployed, tmp_path / "training.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(2)}, "no detection head"),
        ({"epoch": 3}, "no model in it"),
        ([1, 2], "no model in it"),
        ({"model.7.anchor_grid": torch.ones(3, 1, 3, 1, 1, 2)}, "detection head is not one of YOLOv7"),
    ],
)
def test_files_without_a_model(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        model_from_weights(tmp_path / "x.pt")


def test_another_architecture_is_named(tiny: DetectionModel, tmp_path: Path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "tiny.pt")
    assert "looks like another architecture" in str(load_weights(build_model("yolov7", 5), tmp_path / "tiny.pt"))
    with pytest.raises(UserError, match=r"tiny\.pt: not one of its 344 tensors fits"):
        load_weights(one_layer(5, "Detect"), tmp_path / "tiny.pt")
    unknown = build_model({**tiny.yaml, "width_multiple": 0.5})
    torch.save(unknown.state_dict(), tmp_path / "unknown.pt")
    with pytest.raises(UserError, match="none of the packaged models"):
        model_from_weights(tmp_path / "unknown.pt")
