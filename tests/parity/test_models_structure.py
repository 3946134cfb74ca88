"""Names, shapes, counts and strides of all seven models against models.json, training and deployed."""

from __future__ import annotations

import pytest
import torch
from oracle_fill import load_models

from sp_yolo.models import build_model, deploy
from sp_yolo.models.deploy import fuse

MODELS = load_models()
# Deploy layout of the P6 models, whose auxiliary rows are gone: head row, and the first and last lead convolution.
DEPLOY_HEADS = {"yolov7-w6": 118, "yolov7-e6": 140, "yolov7-d6": 162, "yolov7-e6e": 261}


def layout(model: torch.nn.Module) -> list[list[object]]:
    return [[key, list(value.shape)] for key, value in model.state_dict().items()]


@pytest.mark.parametrize("name", MODELS)
def test_training_model(name: str) -> None:
    expected = MODELS[name]
    with torch.device("meta"):
        model = build_model(name)
    assert layout(model) == expected["state_dict"]
    assert [key for key, _ in model.named_parameters()] == expected["parameters"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["params"]
    assert model.stride.tolist() == expected["stride"]
    assert model.backbone_rows == expected["backbone_rows"]
    assert type(model.head).__name__ == expected["head"]
    assert (model.head.nl, model.head.na, model.head.no, model.head.nc) == (expected["nl"], 3, 85, 80)
    assert model.head.auxiliary == (expected["head"] == "IAuxDetect")
    assert [list(map(int, level)) for level in model.yaml["anchors"]] == expected["anchors_px"]
    for layer, row in zip(expected["layers"], [*model.yaml["backbone"], *model.yaml["head"]], strict=True):
        assert [layer["from"], layer["number"], layer["module"], layer["args"]] == list(row), layer["i"]


@pytest.mark.parametrize("name", MODELS)
def test_fused_training_model(name: str) -> None:
    """The original fuses in place and keeps its unused vectors and auxiliary convolutions; the count is with those."""
    expected = MODELS[name]
    with torch.device("meta"):
        model = build_model(name)
        fuse(model)
    assert layout(model) == expected["fused_state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["fused_params"]


@pytest.mark.parametrize("name", MODELS)
def test_deployed_layout(name: str) -> None:
    """The training layout without auxiliary rows and implicit vectors, the head moved up, a Detect."""
    expected = MODELS[name]
    head = DEPLOY_HEADS.get(name, expected["rows"] - 1)
    trained_head = f"model.{expected['rows'] - 1}."
    dropped = tuple(f"model.{row}." for row in range(head, expected["rows"] - 1))
    wanted = []
    for key, shape in expected["state_dict"]:
        if key.startswith(trained_head):
            if key.removeprefix(trained_head).split(".")[0] in ("anchors", "anchor_grid", "m"):
                wanted.append([f"model.{head}." + key.removeprefix(trained_head), shape])
        elif not key.startswith(dropped):
            wanted.append([key, shape])
    with torch.device("meta"):
        model = build_model(f"cfg/deploy/{name}.yaml")
    assert layout(model) == wanted
    assert type(model.head).__name__ == "Detect" and model.stride.tolist() == expected["stride"]
    fused = layout(deploy(model))
    assert not any(".bn." in key for key, _ in fused)
    assert len(fused) == sum(
        1 for key, _ in expected["fused_state_dict"] if not key.startswith((trained_head, *dropped))
    ) + (2 + 2 * expected["nl"])
