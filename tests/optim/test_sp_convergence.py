"""SP finds the known optimum of a quadratic and a logistic regression, at learning rates where SGD diverges."""

import pytest
import torch
from sp_training import model_state

from sp_yolo.optim import SP


def quadratic(optimizer_class, steps=2000, **settings):
    """0.5 (x - a)'H(x - a), eigenvalues 1 .. 100; returns |x - a| / |a|."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    hessian = basis @ torch.diag(torch.logspace(0, 2, 20, dtype=torch.float64)) @ basis.T
    target = torch.randn(20, dtype=torch.float64)
    x = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = optimizer_class([x], weight_decay=0.0, momentum=0.9, nesterov=True, **settings)
    for _ in range(steps):
        x.grad = hessian @ (x.detach() - target)
        optimizer.step()
    return float((x.detach() - target).norm() / target.norm())


@pytest.mark.parametrize("lr", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}])
def test_quadratic_at_any_learning_rate(lr, path):
    assert quadratic(SP, lr=lr, metric="none", **path) < 1e-6


def test_quadratic_in_the_fisher_metric():
    """Steps of about lr towards the end, so as near as lr allows, but never away."""
    for lr in (0.001, 0.01, 0.1):
        assert quadratic(SP, lr=lr, steps=4000) < 2 * lr


def test_sgd_diverges_where_sp_converges():
    assert not quadratic(torch.optim.SGD, steps=200, lr=0.1) < 1e3


def test_paper_mode_on_a_well_conditioned_quadratic():
    torch.manual_seed(0)
    target = torch.randn(12, dtype=torch.float64)
    x = torch.nn.Parameter(torch.zeros(12, dtype=torch.float64))
    optimizer = SP([x], mode="paper", lr=0.05, momentum=0.0, nesterov=False, weight_decay=0.0)
    for _ in range(500):
        x.grad = 0.9 * (x.detach() - target)
        optimizer.step()
    assert float((x.detach() - target).norm()) < 1e-6


def test_logistic_regression():
    """The optimum comes from Newton's method on the same convex loss."""
    torch.manual_seed(0)
    data = torch.randn(80, 4, dtype=torch.float64)
    labels = (data @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + torch.randn(80) > 0).double()

    def loss(w):
        return torch.nn.functional.binary_cross_entropy_with_logits(data @ w, labels) + 0.005 * w @ w

    optimum = torch.zeros(4, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.func.grad(loss)(optimum)
        optimum = optimum - torch.linalg.solve(torch.func.hessian(loss)(optimum), gradient)
    w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = SP([w], lr=1.0, metric="none", weight_decay=0.0)
    for _ in range(800):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
    assert float((w.detach() - optimum).norm()) < 1e-8
    # With L2 decay inside the optimizer the optimum is that of the decayed loss.
    v = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = SP([v], lr=1.0, metric="none", weight_decay=0.01, decoupled=False)
    for _ in range(800):
        optimizer.zero_grad()
        (loss(v) - 0.005 * v @ v).backward()
        optimizer.step()
    assert float((v.detach() - optimum).norm()) < 1e-8


def test_noise_alone_keeps_gamma_open():
    """The cap stands above the noise quotient: with flat curvature gamma is 1, although no step descends. The steps are
    small beside the weights: beyond a hundredth of them, they would have to."""
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.ones(5_000))
    optimizer = SP([x], lr=1e-3, weight_decay=0.0)
    opened = 0
    for _ in range(200):
        x.grad = torch.randn_like(x)
        optimizer.step()
        opened += model_state(optimizer)["gamma"] == 1.0
    assert opened >= 195
