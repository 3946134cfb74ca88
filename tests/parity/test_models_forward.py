"""Forward passes, batch statistics and gradients of all seven models against the oracle numbers (float64)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from oracle_fill import ORACLE, fill_weights, load_models, uniform

from sp_yolo.models import DetectionModel, build_model, deploy
from sp_yolo.models.heads import Detect

MODELS = load_models()
# The oracle stores float32 samples of float64 results (relative 6e-8) and float64 sums.
SAMPLE_RTOL, SUM_RTOL = 2e-7, 1e-9


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[str, DetectionModel, torch.Tensor, dict[str, np.ndarray]]:
    name = request.param
    with np.load(ORACLE / f"forward_{name}.npz") as file:
        oracle = dict(file)
    model = build_model(name).double()
    fill_weights(model, MODELS[name]["fill_gain"])
    image = torch.from_numpy(oracle["image_u8"]).double() / 255
    return name, model, image, oracle


def check(name: str, value: torch.Tensor, oracle: dict[str, np.ndarray], stride: int) -> None:
    value = value.detach()
    assert list(value.shape) == oracle[f"{name}_shape"].tolist() if f"{name}_shape" in oracle else True
    flat = value.reshape(-1).numpy()
    expected = oracle[name]
    np.testing.assert_allclose(flat[::stride], expected, rtol=SAMPLE_RTOL, atol=2e-7, err_msg=name)
    sums = [flat.sum(), np.abs(flat).sum(), (flat**2).sum()]
    np.testing.assert_allclose(sums[1:], oracle[f"{name}_sums"][1:], rtol=SUM_RTOL, err_msg=name)
    assert abs(sums[0] - oracle[f"{name}_sums"][0]) < SUM_RTOL * sums[1], name


def test_eval_train_and_gradients(case) -> None:
    _, model, image, oracle = case
    stride = int(oracle["sub_stride"])
    levels = model.head.nl
    model.eval()
    with torch.no_grad():
        decoded, raw = model(image)
    assert len(raw) == levels
    check("eval_decoded", decoded, oracle, stride)
    for level, values in enumerate(raw):
        check(f"eval_raw{level}", values, oracle, stride)

    model.train()
    maps = model(image)
    assert len(maps) == levels * (2 if model.head.auxiliary else 1)
    for level, values in enumerate(maps):
        check(f"train_raw{level}", values, oracle, stride)
    after = [float(model.state_dict()[key].sum()) for key in oracle["bn_after_keys"]]
    np.testing.assert_allclose(after, oracle["bn_after_sum"], rtol=1e-9, atol=1e-11)

    scalar = torch.zeros((), dtype=torch.float64)
    for level, values in enumerate(maps):
        weights = torch.from_numpy(2 * uniform(2000000 + level, values.numel()) - 1).view(values.shape)
        scalar = scalar + (values * weights).mean()
    assert float(scalar.detach()) == pytest.approx(float(oracle["grad_scalar"]), rel=1e-9)
    scalar.backward()
    parameters = dict(model.named_parameters())
    squared = [float(parameters[key].grad.square().sum()) for key in oracle["grad_keys"]]
    np.testing.assert_allclose(squared, oracle["grad_sqnorm"], rtol=1e-7)
    model.zero_grad(set_to_none=True)


def test_deployed_equals_training_model(case) -> None:
    name, model, image, oracle = case
    fill_weights(model, MODELS[name]["fill_gain"])  # the batch statistics moved in the test before
    model.eval()
    with torch.no_grad():
        expected, _ = model(image)
        deployed = deploy(model)
        decoded, raw = deployed(image)
    assert len(raw) == deployed.head.nl and type(deployed.head) is Detect
    check("fused_decoded", decoded, oracle, 5 * int(oracle["sub_stride"]))
    assert float((decoded - expected).abs().max()) < 1e-9
    gone = (".bn.", ".rbr_dense.", ".rbr_1x1.", ".m2.", ".ia.", ".im.")
    assert not any(part in key for key in deployed.state_dict() for part in gone)


def test_float32_stays_near_float64(case) -> None:
    """The bound is twice the rounding error that the original has, as stored with the oracle, or 1e-4."""
    name, model, image, oracle = case
    fill_weights(model, MODELS[name]["fill_gain"])
    model.eval()
    with torch.no_grad():
        exact, exact_raw = model(image)
        single = copy.deepcopy(model).float()
        decoded, raw = single(image.float())
        fused, _ = deploy(single)(image.float())
    errors = [float((a - b).abs().max()) for a, b in zip([decoded, *raw], [exact, *exact_raw], strict=True)]
    bounds = np.maximum(2 * oracle["fp32_vs_fp64_maxabs"][: len(errors)], 1e-4)
    assert all(error <= bound for error, bound in zip(errors, bounds, strict=True)), (errors, bounds)
    assert float((fused - exact).abs().max()) <= bounds[0]
