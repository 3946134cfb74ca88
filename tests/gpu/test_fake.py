"""The iteration under torch's own FakeTensorMode on "cuda": it refuses mixed devices and questions about values.

Targets are real and on the CPU, as a loader's: what the host works out of them it may look at. Without a driver
autograd cannot run backward on "cuda" (torch 2.14): then the gradients are given, and test_pretended.py has that pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import training_rig
from support.pretend_cuda import amp_without_driver
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from training_rig import PRECISIONS, SIZES, Rig, make_batch, make_model

from sp_yolo.losses import DetectionLoss, assign, detection
from sp_yolo.suppression import Scored, suppress_batch

GPU = torch.device("cuda", 0)


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with real numbers."""

    def real(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return real


def copied(tensor: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
    made = tensor.detach().clone()
    memo[id(tensor)] = made = torch.nn.Parameter(made) if isinstance(tensor, torch.nn.Parameter) else made
    return made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: self.untyped_storage()._cdata, raising=False)
    monkeypatch.setattr(FakeTensor, "__deepcopy__", copied, raising=False)
    monkeypatch.setattr(copy, "deepcopy", on_host(copy.deepcopy))  # for what is no FakeTensor
    monkeypatch.setattr(training_rig, "DetectionLoss", on_host(DetectionLoss))  # asks for strides when it is made
    for name in ("pad_targets", "find_candidates"):
        monkeypatch.setattr(detection, name, on_host(getattr(assign, name)))
    monkeypatch.setattr(assign, "_send", lambda tensor, device: tensor.to(device, non_blocking=True))
    amp_without_driver(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def make_rig(name: str) -> Rig:
    with unset_fake_temporarily():
        model = make_model(name)
        anchors = model.head.anchors.clone()
    rig = Rig(model, SIZES[name], GPU, "fp32")
    rig.loss._host_anchors = lambda: anchors  # type: ignore[method-assign]  # fetched once, before
    return rig


@pytest.mark.parametrize("name", list(SIZES))
def test_an_iteration_mixes_no_devices_and_asks_for_no_value(fake: FakeTensorMode, name: str) -> None:
    with unset_fake_temporarily():
        batch = make_batch(SIZES[name])
    rig = make_rig(name)
    images = batch.images.to(GPU).float() / 255
    for precision in PRECISIONS:
        rig.set_precision(precision)
        with rig.compute.autocast():
            loss, parts = rig.loss(rig.model(images), batch.targets, (rig.size, rig.size))
        assert loss.device == GPU and all(part.device == GPU for part in parts)
        if torch.cuda.is_available():
            rig.state.scaler.scale(loss).backward()
        rig.state.losses.add(parts)
    for param in rig.model.parameters():
        param.grad = torch.empty_like(param) if param.grad is None else param.grad
    rig.optimizer.step()
    rig.ema.update(rig.model)
    with torch.no_grad(), rig.compute.autocast():
        decoded, _ = rig.ema.module(images)
    scores = decoded[..., 5:] * decoded[..., 4:5]
    found = suppress_batch(Scored(decoded[..., :4], scores, None), 0.001, 0.65, False, 300)
    assert found.device == GPU and found.shape == (len(images), 301, 6)


def test_an_injected_mismatch_is_refused(fake: FakeTensorMode) -> None:
    rig = make_rig("yolov7-tiny")
    rig.ema.module.head.anchor_grid = torch.zeros(rig.model.head.anchor_grid.shape)
    with pytest.raises(RuntimeError, match="device"), torch.no_grad():
        rig.ema.module(torch.rand(1, 3, 64, 64, device=GPU))


def test_an_injected_question_about_gamma_is_refused(fake: FakeTensorMode) -> None:
    gamma = torch.zeros((), device=GPU)
    with pytest.raises(DataDependentOutputException):
        float(gamma)
