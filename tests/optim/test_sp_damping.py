"""The numbers behind the cap, measured on SP's own steps; the published damping where float32 underflows."""

import pytest
import torch
from sp_training import feed, make, model_state, on_every_path

from sp_yolo.optim import damping


@on_every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_paper_mode_where_s4_underflows(path, dtype):
    """s = 1e-12: s^4 is 0 in float32. In float64, where it is not, the same D comes out."""
    s = torch.tensor([1e-12, -2e-12, 3e-12, 0.5e-12])
    sy = torch.dot(s.double(), 0.25 * s.double())
    d, r = damping.newton_damping(s, sy)
    ss = (s.double() ** 2).sum()
    w = (ss - sy) / (s.double() ** 4).sum()
    assert torch.allclose(d.double(), 1 + w * s.double() ** 2, rtol=1e-5)
    assert float(r) == pytest.approx(0.25, rel=1e-5) and float((s**4).sum()) == 0.0
    (x,), optimizer = make(path, torch.randn(5, 5) * 1e-3, dtype=dtype, mode="paper", lr=1e-4)
    for _ in range(10):
        feed(optimizer, [x], 1e-3 * x.detach())
    assert bool(torch.isfinite(x).all())


def test_paper_mode_branches():
    s = torch.tensor([1.0, 2.0], dtype=torch.float64)
    newton, r = damping.newton_damping(s, torch.tensor(-5.0, dtype=torch.float64))  # s'y <= 0
    assert float(r) == -1.0
    assert torch.allclose(newton, 1 + (5 + 5) / 17 * s**2)
    scalar, r = damping.newton_damping(s, torch.tensor(10.0, dtype=torch.float64))
    assert float(r) == 2.0 and torch.allclose(scalar, torch.full_like(s, 0.5))
    still, r = damping.newton_damping(torch.zeros(3), torch.tensor(0.0, dtype=torch.float64))
    assert float(r) == 0.0 and torch.equal(still, torch.ones(3))


def test_caps_by_hand():
    assert damping.noise_quotient(0.9) == pytest.approx(0.269, abs=5e-4)
    assert damping.noise_quotient(0.937) == pytest.approx(0.192, abs=5e-4)
    assert damping.derived_cap(0.9) == pytest.approx(3 * damping.noise_quotient(0.9))
    assert damping.derived_cap(0.5) == pytest.approx(0.8 * 3 / 2)
    assert damping.stability_limit(0.0) == damping.stability_limit(0.0, nesterov=False) == 2.0
    for beta in (0.0, 0.5, 0.9, 0.937, 0.99):
        for nesterov in (False, True):
            assert damping.noise_quotient(beta, nesterov) < damping.derived_cap(beta, nesterov)
            assert damping.derived_cap(beta, nesterov) < damping.stability_limit(beta, nesterov)


def noisy(momentum, steps, scale=1.0, **settings):
    """SP under independent gradients, on weights that are large beside its steps."""
    torch.manual_seed(0)
    settings = {"momentum": momentum, "lr": 1e-3, "rcap": 100.0, "rho": 0.0, **settings}
    (x,), optimizer = make({"native": False}, torch.full((20_000,), 1e3), dtype=torch.float64, **settings)
    quotients = []
    for _ in range(steps):
        x.grad = torch.randn_like(x) * scale
        optimizer.step()
        state = model_state(optimizer)
        quotients.append(1e-3 * state["esy"] / state["ess"] if state["ess"] else 0.0)
    assert model_state(optimizer)["gamma"] == 1.0
    return sum(quotients[-40:]) / 40


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_noise_quotient_is_what_noise_gives(momentum, nesterov):
    """lr * E[s'y] / E[s's] of SP's own steps under independent gradients, from runs of a sixteenth of them."""
    found = noisy(momentum, 100, nesterov=nesterov, metric="none")
    assert found == pytest.approx(damping.noise_quotient(momentum, nesterov), rel=0.02)


@pytest.mark.parametrize("momentum", [0.9, 0.937])
def test_noise_quotient_holds_in_the_fisher_metric(momentum):
    """lr * E[s'y] / E[s'D^{-1}s]: the same cap serves, whatever the scale of the gradients. (D contains the newest
    gradient: hence the tolerance.)"""
    found = noisy(momentum, 150, torch.logspace(-3, 3, 20_000, dtype=torch.float64))
    assert found == pytest.approx(damping.noise_quotient(momentum), rel=0.1)
    assert found < damping.derived_cap(momentum)


@pytest.mark.parametrize("momentum", [0.9, 0.937])
def test_steps_in_the_fisher_metric_are_about_lr(momentum):
    """A lasting gradient of any size moves its weight by lr in the end, by less at the start, and never by more."""
    (x,), optimizer = make({}, torch.full((3, 2), 1e3), dtype=torch.float64, momentum=momentum, lr=0.01, rcap=100.0)
    lengths = []
    for _ in range(200):
        before = x.detach().clone()
        x.grad = torch.tensor([[1e-5, 1.0], [-1e3, -1e-2], [10.0, 1e6]], dtype=torch.float64)
        optimizer.step()
        lengths.append((x.detach() - before).abs())
    assert lengths[-1].sub(0.01).abs().max() < 2e-5
    assert torch.allclose(lengths[0], torch.full((3, 2), 0.01 * (1 - momentum**2), dtype=torch.float64), rtol=2e-3)
    assert torch.stack(lengths).max() < 0.01 + 1e-9


@on_every_path
def test_carried_products_keep_small_changes(path):
    """|y| << |g|: the gradient changes by 1e-5 of itself; the quotient is still right to a percent or two. Native
    sums are of float32 lanes."""
    torch.manual_seed(0)
    base = torch.randn(100_000, dtype=torch.float64)
    (x,), optimizer = make(path, torch.ones(100_000), momentum=0.0, lr=1e-3, rho=0.0, metric="none")
    for _ in range(4):
        x.grad = (base + 0.05 * x.detach().double()).float()
        optimizer.step()
    state = model_state(optimizer)
    assert state["esy"] / state["ess"] == pytest.approx(0.05, rel=0.05)
