"""What a validation does differently on a GPU: weights rounded once, no search for convolutions of every shape."""

from __future__ import annotations

import pytest
import torch
from support.pretend_cuda import CUDA, PretendCuda
from training_rig import make_model, move

from sp_yolo.engine.inference import for_inference
from sp_yolo.runtime.device import Compute, searched_convolutions

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_weights_rounded_once_give_what_autocast_gives(kind: torch.dtype) -> None:
    model, images = make_model("yolov7-tiny").eval(), torch.rand(2, 3, 64, 64)
    rounded = for_inference(model, Compute(CUDA, kind, ""))
    assert rounded is not model and {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.dtype is kind for p in rounded.parameters()) > 50
    with torch.no_grad(), torch.autocast("cpu", dtype=kind):
        (wanted, _), (found, _) = model(images), rounded(images)
    assert wanted.dtype is torch.float32 and torch.equal(found, wanted)


def test_a_forward_pass_rounds_no_weight() -> None:
    with PretendCuda() as gpu, torch.no_grad():
        compute = Compute(CUDA, torch.bfloat16, "")
        model, images = move(make_model("yolov7-tiny"), CUDA).eval(), torch.rand(1, 3, 64, 64, device=CUDA)
        casts = []
        for each in (model, for_inference(model, compute)):
            record = gpu.start()
            with compute.autocast():
                each(images)
            casts.append(record.calls["_to_copy"])
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert casts[0] - casts[1] >= convolutions - 3 and casts[1] < 20


@pytest.mark.parametrize(("device", "kind"), [(CPU, torch.bfloat16), (CPU, None), (CUDA, None)])
def test_elsewhere_the_model_is_used_as_it_is(device: torch.device, kind: torch.dtype | None) -> None:
    model = make_model("yolov7-tiny")
    assert for_inference(model, Compute(device, kind, "")) is model


@pytest.mark.parametrize(
    ("before", "repeat", "within"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_convolutions_are_searched_for_shapes_that_repeat(
    monkeypatch: pytest.MonkeyPatch, before: bool, repeat: bool, within: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    with pytest.raises(KeyError), searched_convolutions(repeat):
        assert torch.backends.cudnn.benchmark is within
        raise KeyError
    assert torch.backends.cudnn.benchmark is before
