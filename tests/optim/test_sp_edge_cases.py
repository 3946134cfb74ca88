"""The cases in which a careless implementation divides by zero, underflows or remembers what it should not."""

import copy
import math

import pytest
import torch

from sp_yolo.optim import SP, damping

PATHS = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
    "native": {"compile": True},
}
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def make(path, *starts, dtype=torch.float32, **settings):
    params = [torch.nn.Parameter(torch.as_tensor(s, dtype=dtype).clone()) for s in starts]
    return params, SP(params, **{"weight_decay": 0.0, **settings, **path})


def feed(optimizer, params, *grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype).expand_as(p).clone()
    optimizer.step()


def model_state(optimizer):
    return {k: float(v) for k, v in optimizer.state_dict()["state"]["model"].items()}


def snapshot(optimizer):
    return copy.deepcopy([optimizer.state_dict(), [p.detach() for g in optimizer.param_groups for p in g["params"]]])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@on_every_path
def test_first_step_is_nesterov_times_gamma(path):
    (x,), optimizer = make(path, [1.0, -2.0], lr=0.1)
    feed(optimizer, [x], [3.0, 4.0])
    assert torch.allclose(x.detach(), torch.tensor([1.0, -2.0]) - 0.1 * 0.01 * 1.9 * torch.tensor([3.0, 4.0]))


@on_every_path
def test_gamma_falls_at_once_and_rises_by_growth(path):
    """On x'x * c / 2 the quotient is lr * c exactly, from the first pair on."""
    (x,), optimizer = make(path, [1.0, 1.0], lr=0.1, momentum=0.0, growth=1.5, rho=0.5)
    for _ in range(3):
        feed(optimizer, [x], 2.0 * x.detach())
    assert model_state(optimizer)["gamma"] == pytest.approx(0.01 * 1.5**2)
    for _ in range(60):
        feed(optimizer, [x], 500.0 * x.detach())
    assert model_state(optimizer)["gamma"] == pytest.approx(1.3 / (0.1 * 500.0), rel=1e-3)


@on_every_path
def test_zero_displacement_keeps_gamma(path):
    (x,), optimizer = make(path, [1.0, 2.0])
    feed(optimizer, [x], [1.0, 1.0])
    feed(optimizer, [x], [1.0, 1.1])
    optimizer.param_groups[0]["lr"] = 0.0
    feed(optimizer, [x], [1.0, 1.2])
    before = model_state(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    feed(optimizer, [x], [5.0, 5.0])
    after = model_state(optimizer)
    assert after["gamma"] == before["gamma"] and after["ess"] == before["ess"]


@on_every_path
def test_negative_curvature_never_enlarges_the_step(path):
    (x,), optimizer = make(path, [1.0, 1.0], gamma_start=1.0)
    for _ in range(20):
        feed(optimizer, [x], -x.detach())
    state = model_state(optimizer)
    assert state["esy"] < 0 and state["gamma"] == 1.0


@on_every_path
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradient_touches_nothing(path, bad):
    params, optimizer = make(path, torch.randn(4, 4), torch.randn(3), sigma=0.5, every=1, damping="diagonal")
    for _ in range(3):
        feed(optimizer, params, torch.randn(4, 4), torch.randn(3))
    before = snapshot(optimizer)
    grad = torch.randn(4, 4)
    grad[0, 0] = bad  # perhaps at a held zero, where s is 0
    params[1].grad = torch.randn(3)
    for p, g in zip(params, [grad, torch.randn(3)], strict=True):
        p.grad = g
    optimizer.step()
    after = snapshot(optimizer)
    if path.get("foreach") is False:
        assert same(before, after)
    else:  # the host cannot know: its counter of the schedule goes on, a proximal step may rank anew
        for state in (before, after):
            state[0]["state"]["model"].pop("step")
        assert torch.equal(before[1][1], after[1][1]) and bool(torch.isfinite(after[1][0]).all())
        assert same(before[0]["state"]["model"], after[0]["state"]["model"])
        assert all(same(before[0]["state"][1][name], after[0]["state"][1][name]) for name in before[0]["state"][1])


@on_every_path
def test_first_gradient_may_be_non_finite(path):
    (x,), optimizer = make(path, [1.0, 2.0])
    feed(optimizer, [x], [math.nan, 1.0])
    assert x.tolist() == [1.0, 2.0]
    feed(optimizer, [x], [1.0, 1.0])
    assert bool(torch.isfinite(x).all()) and x.tolist() != [1.0, 2.0]


@on_every_path
def test_frozen_and_absent_gradients(path):
    """A tensor without gradient keeps its last displacement, so its next pair spans the time it stood still."""
    params, optimizer = make(path, [1.0, 2.0], [3.0], [4.0])
    params[2].requires_grad_(False)
    params[2].grad = torch.ones(1)
    params[0].grad, params[1].grad = torch.ones(2), torch.ones(1)
    optimizer.step()
    assert params[2].item() == 4.0
    standing = params[1].item()
    displacement = optimizer.state[params[1]]["displacement"].clone()
    for _ in range(3):
        feed(optimizer, params[:2], [1.0, 2.0], None)
    assert params[1].item() == standing
    before = model_state(optimizer)
    feed(optimizer, params[:2], None, [7.0])
    # Only the second tensor entered: s'y = s * (7 - 1), s's = s^2.
    after = model_state(optimizer)
    s = displacement.item()
    assert after["ess"] == pytest.approx(0.9 * before["ess"] + 0.1 * s * s, rel=1e-5)
    assert after["esy"] == pytest.approx(0.9 * before["esy"] + 0.1 * s * 6.0, rel=1e-5)


@on_every_path
def test_nothing_has_a_gradient(path):
    (x,), optimizer = make(path, [1.0])
    optimizer.step()
    assert x.item() == 1.0 and not optimizer.state_dict()["state"]


@on_every_path
@pytest.mark.parametrize("start", [torch.zeros(3, 3), torch.ones(1, 1), torch.zeros(1), torch.tensor(2.0)])
@pytest.mark.parametrize("settings", [{"damping": "diagonal"}, {"damping": "fisher"}, {"mode": "paper", "sigma": 0.9}])
def test_zero_and_one_element_tensors(path, start, settings):
    (x,), optimizer = make(path, start, **{"sigma": 0.9, "every": 1, "lr": 0.01, **settings})
    for k in range(6):
        feed(optimizer, [x], torch.full_like(start, 0.0 if k < 2 else 0.1 * k))
        assert bool(torch.isfinite(x).all())
    if start.numel() == 1 and start.item():
        assert x.item() != 0.0  # one element is never pruned


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


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12])
def test_diagonal_is_scale_free(scale):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    expected = damping.parameter_damping(x.double(), torch.tensor(0.2).double(), (0.1, 10.0))
    found = damping.parameter_damping(x * scale, torch.tensor(0.2), (0.1, 10.0))
    assert torch.allclose(found.double(), expected, rtol=1e-4)


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
    assert damping.derived_cap(0.9) == pytest.approx(1.3 * damping.noise_quotient(0.9))
    assert damping.stability_limit(0.0) == damping.stability_limit(0.0, nesterov=False) == 2.0
    for beta in (0.0, 0.5, 0.9, 0.937, 0.99):
        for nesterov in (False, True):
            assert damping.derived_cap(beta, nesterov) < damping.stability_limit(beta, nesterov)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_noise_quotient_is_what_noise_gives(momentum, nesterov):
    """lr * E[s'y] / E[s's] of SP's own steps under independent gradients."""
    torch.manual_seed(0)
    (x,), optimizer = make({}, torch.zeros(200_000), dtype=torch.float64, momentum=momentum, nesterov=nesterov,
                           gamma_start=1.0, rcap=100.0, rho=0.0)  # fmt: skip
    for _ in range(60):
        x.grad = torch.randn_like(x)
        optimizer.step()
    state = model_state(optimizer)
    assert 0.1 * state["esy"] / state["ess"] == pytest.approx(damping.noise_quotient(momentum, nesterov), rel=0.02)


@pytest.mark.parametrize("momentum", [0.9, 0.937])
def test_noise_quotient_holds_in_the_fisher_metric(momentum):
    """lr * E[s'y] / E[s'D^{-1}s]: the same cap serves, whatever the scale of the gradients. (D contains the newest
    gradient: hence the tolerance.)"""
    torch.manual_seed(0)
    scale = torch.logspace(-3, 3, 200_000, dtype=torch.float64)
    (x,), optimizer = make({}, torch.zeros(200_000), dtype=torch.float64, momentum=momentum, damping="fisher",
                           gamma_start=1.0, rcap=100.0, rho=0.0)  # fmt: skip
    for _ in range(150):
        x.grad = torch.randn_like(x) * scale
        optimizer.step()
    state = model_state(optimizer)
    quotient = float(0.1 * state["esy"] / state["ess"])
    assert quotient == pytest.approx(damping.noise_quotient(momentum), rel=0.1)
    assert quotient < damping.derived_cap(momentum)


@pytest.mark.parametrize("momentum", [0.9, 0.937])
def test_steps_in_the_fisher_metric_are_about_lr(momentum):
    """A lasting gradient of any size moves its weight by lr in the end, by less at the start, and never by more."""
    start = torch.zeros(3, 2)
    (x,), optimizer = make({}, start, dtype=torch.float64, momentum=momentum, damping="fisher", lr=0.01,
                           gamma_start=1.0, rcap=100.0, weight_decay=0.0)  # fmt: skip
    lengths = []
    for _ in range(200):
        before = x.detach().clone()
        x.grad = torch.tensor([[1e-5, 1.0], [-1e3, -1e-2], [10.0, 1e6]], dtype=torch.float64)
        optimizer.step()
        lengths.append((x.detach() - before).abs())
    assert lengths[-1].sub(0.01).abs().max() < 2e-5
    assert torch.allclose(lengths[0], torch.full((3, 2), 0.01 * (1 - momentum**2), dtype=torch.float64), rtol=2e-3)
    assert torch.stack(lengths).max() < 0.01 + 1e-9


def test_carried_products_keep_small_changes():
    """|y| << |g|: the gradient changes by 1e-5 of itself; the quotient is still right to a percent."""
    torch.manual_seed(0)
    base = torch.randn(100_000, dtype=torch.float64)
    (x,), optimizer = make({}, torch.zeros(100_000), momentum=0.0, lr=1e-3, gamma_start=1.0, rho=0.0)
    for _ in range(4):
        x.grad = (base + 0.05 * x.detach().double()).float()
        optimizer.step()
    state = model_state(optimizer)
    assert state["esy"] / state["ess"] == pytest.approx(0.05, rel=0.02)
