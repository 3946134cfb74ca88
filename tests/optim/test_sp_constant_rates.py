"""Constant learning rates over three decades, no schedule and no warm-up, on few data: the regime in which the
curvature along the path vanishes as the points are fitted, and a step that trusts it leaps out."""

import pytest
import torch
from sp_training import in_both_metrics
from torch import nn
from torch.nn.functional import cross_entropy

from sp_yolo.optim import SP

RATES = (0.01, 0.1, 1.0, 3.0, 10.0)


def few_points(seed, make, steps):
    """A 20-64-5 ReLU network on 512 points of a linear teacher, batches of 32. Returns the loss of all points before
    and after, and the weights after each step."""
    torch.manual_seed(seed)
    points, teacher = torch.randn(512, 20), torch.randn(20, 5)
    labels = (points @ teacher).argmax(1)
    network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = make(network.parameters())
    path = []

    def loss():
        with torch.no_grad():
            return cross_entropy(network(points), labels).item()

    start = loss()
    for _ in range(steps):
        rows = torch.randint(0, 512, (32,))
        optimizer.zero_grad()
        cross_entropy(network(points[rows]), labels[rows]).backward()
        optimizer.step()
        path.append(nn.utils.parameters_to_vector(network.parameters()).detach().clone())
    return start, loss(), path


@in_both_metrics
@pytest.mark.parametrize("lr", RATES)
def test_no_constant_rate_ends_above_its_start(lr, metric):
    for seed in (1, 2, 3):
        start, end, _ = few_points(seed, lambda params: SP(params, lr=lr, metric=metric), 400)
        assert end < start, f"seed {seed}"


def test_adamw_fails_at_the_rates_that_sp_stands():
    start, end, _ = few_points(1, lambda params: torch.optim.AdamW(params, lr=1.0), 400)
    assert not end < start


@in_both_metrics
def test_above_the_useful_rates_the_rate_does_not_matter(metric):
    """gamma is found by the curvature then, in units of 1 / lr: the same weights after each of 50 steps."""
    hundredth, one, ten = (
        few_points(1, lambda params, lr=lr: SP(params, lr=lr, metric=metric), 50)[2] for lr in (0.01, 1.0, 10.0)
    )
    assert not torch.allclose(hundredth[-1], one[-1], rtol=0.1, atol=0.01)
    for k, (a, b) in enumerate(zip(one, ten, strict=True)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), f"step {k}: {float((a - b).abs().max())}"
