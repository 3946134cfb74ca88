"""Three training steps of yolov7-tiny in float64 (groups, OTA loss, SGD, EMA) against the sums of the original."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_fill import fill_weights

from sp_yolo.config import OptimizerRecipe
from sp_yolo.engine.ema import ModelEma
from sp_yolo.engine.optimizer import build_optimizer
from sp_yolo.losses import DetectionLoss
from sp_yolo.models import build_model

ORACLE = Path(__file__).parent / "oracle"


@pytest.fixture(scope="module")
def trained() -> dict:
    oracle = np.load(ORACLE / "train_step.npz")
    given = json.loads(str(oracle["hyp_json"]))
    model = build_model("yolov7-tiny", num_classes=4).double().train()
    fill_weights(model, float(oracle["gain"]))
    # The gains of the oracle are already scaled by classes and image size; ours scales inside.
    hyp = {**given, "cls": given["cls"] / (4 / 80), "obj": given["obj"] / (64 / 640) ** 2}
    loss_function = DetectionLoss(model, hyp, 64, "ota")
    momentum, decay = float(oracle["momentum"]), float(oracle["weight_decay"])
    optimizer = build_optimizer("sgd", model, OptimizerRecipe(momentum=momentum), weight_decay=decay, total_steps=3)
    other, weights, biases = oracle["lr_groups_other_weights_biases"]
    for group in optimizer.param_groups:
        group["lr"] = {"backbone": weights, "head": weights, "bias": biases, "norm": other}[group["name"]]
    ema = ModelEma(model)
    images = torch.from_numpy(oracle["image_u8"]).double() / 255
    targets = torch.from_numpy(oracle["targets"]).float()
    result: dict = {"items": [], "oracle": oracle, "model": model, "ema": ema, "optimizer": optimizer}
    for step in range(3):
        loss, parts = loss_function(model(images), targets, (64, 64))
        loss.backward()
        if step == 0:
            result["grads"] = {name: float(p.grad.square().sum()) for name, p in model.named_parameters()}
        result["items"].append([float(value.detach()) for value in (*parts, loss)])
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    return result


def test_losses(trained: dict) -> None:
    np.testing.assert_allclose(trained["items"], trained["oracle"]["items_box_obj_cls_total_then_loss"], rtol=2e-6)


def test_gradients_of_the_first_step(trained: dict) -> None:
    oracle = trained["oracle"]
    for name, wanted in zip(oracle["grad_keys"], oracle["grad_sqnorm_step0"], strict=True):
        assert trained["grads"][str(name)] == pytest.approx(wanted, rel=1e-5, abs=1e-14), name


@pytest.mark.parametrize("which", ["model", "ema"])
def test_weights_after_three_steps(trained: dict, which: str) -> None:
    oracle = trained["oracle"]
    module = trained["model"] if which == "model" else trained["ema"].module
    state = module.state_dict()
    assert list(state) == [str(key) for key in oracle["sd_keys"]]
    for name, total, squares in zip(state, oracle[f"{which}_sum"], oracle[f"{which}_sqsum"], strict=True):
        value = state[name].double()
        # Our loss computes in float32 whatever the model: the BN biases of the first layers feel it most, by 4e-6.
        assert float(value.square().sum()) == pytest.approx(squares, rel=1e-5, abs=1e-12), name
        assert float(value.sum()) == pytest.approx(total, rel=1e-5, abs=1e-5 * float(value.abs().sum()) + 1e-12), name


def test_groups_hold_the_originals_tensors(trained: dict) -> None:
    """The original's group 0 (no decay) is our norm, its weights our backbone and head, its biases our bias."""
    oracle = trained["oracle"]
    names = {id(parameter): name for name, parameter in trained["model"].named_parameters()}
    ours = {g["name"]: {names[id(p)] for p in g["params"]} for g in trained["optimizer"].param_groups}
    assert ours["norm"] == set(map(str, oracle["group0_keys_in_order"]))
    assert ours["backbone"] | ours["head"] == set(map(str, oracle["group1_keys_in_order"]))
    assert ours["bias"] == set(map(str, oracle["group2_keys_in_order"]))
    assert [g["name"] for g in trained["optimizer"].param_groups] == ["backbone", "head", "bias", "norm"]
