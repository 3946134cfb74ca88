"""The averaged model: weights by hand, BatchNorm's statistics averaged or taken over."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sp_yolo.engine.ema import ModelEma


def test_held_zeros_are_zeros_of_the_average() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    ema = ModelEma(model, decay=0.9, ramp=1.0)
    before = ema.module[0].weight.detach().clone()
    weight = model[1].weight
    mask = torch.tensor([[True, False], [False, True]])
    with torch.no_grad():
        weight.mul_(mask)
        ema.update(model)
        assert not (ema.module[1].weight == 0).any()
        ema.update(model, {weight: mask})
    assert torch.equal(ema.module[1].weight == 0, ~mask)
    assert torch.allclose(ema.module[0].weight, before)


@pytest.mark.parametrize("average_buffers", [True, False])
def test_weights_are_averaged_and_buffers_as_asked(average_buffers: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    ema = ModelEma(model, decay=0.9, ramp=5.0, average_buffers=average_buffers)
    weight = model[0].weight.detach().double().clone()
    mean = model[1].running_mean.double().clone()
    for update in range(1, 8):
        with torch.no_grad():
            model[0].weight.add_(0.1 * torch.randn_like(model[0].weight))
        model(torch.randn(2, 3, 8, 8) + update)
        ema.update(model)
        decay = 0.9 * (1 - math.exp(-update / 5.0))
        weight = decay * weight + (1 - decay) * model[0].weight.detach().double()
        mean = decay * mean + (1 - decay) * model[1].running_mean.double()
    assert torch.allclose(ema.module[0].weight.double(), weight, atol=1e-6)
    expected = mean if average_buffers else model[1].running_mean.double()
    assert torch.allclose(ema.module[1].running_mean.double(), expected, atol=1e-6)
    assert not torch.allclose(mean, model[1].running_mean.double(), atol=1e-2)
    assert int(ema.module[1].num_batches_tracked) == 0 and not ema.module.training


def test_models_that_move_are_found_again() -> None:
    """What is averaged with what is found once; other memory, here another type, is another pairing."""
    model = nn.Linear(3, 2)
    ema = ModelEma(model, decay=0.5, ramp=1e-9)
    ema.update(model)
    before = model.weight.detach().double().clone()
    model.double(), ema.module.double()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model)
    assert torch.allclose(ema.module.weight, before + 0.5, atol=1e-6)
