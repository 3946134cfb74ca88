"""The cases in which a careless implementation divides by zero, underflows or remembers what it should not."""

import copy
import math

import pytest
import torch
from sp_training import feed, in_both_metrics, make, model_state, on_every_path


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


def norm(*tensors):
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


@on_every_path
@in_both_metrics
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("lr", [1.0, 100.0])
def test_first_step_moves_the_weights_by_a_hundredth(path, metric, nesterov, lr):
    """Of the norm of all that move, whatever lr, gradient and network; the direction is that of g or its signs."""
    starts, grads = [torch.tensor([1.0, -2.0, 5.0]), torch.full((2, 2), 3.0)], [[3.0, 4.0, 1e3], [[1.0, -1.0]] * 2]
    params, optimizer = make(path, *starts, lr=lr, metric=metric, nesterov=nesterov)
    feed(optimizer, params, *grads)
    moved = [p.detach() - s for p, s in zip(params, starts, strict=True)]
    assert norm(*moved) == pytest.approx(0.01 * norm(*starts), rel=1e-4)
    for m, g in zip(moved, grads, strict=True):
        g = torch.tensor(g)
        expected = -g if metric == "none" else -g.sign()
        assert torch.allclose(m / m.norm(), expected / expected.norm(), rtol=1e-2, atol=1e-3)


@on_every_path
@in_both_metrics
def test_a_small_lr_is_taken_as_it_is(path, metric):
    """Plain Nesterov momentum, or AdamW's length of step, where gamma is 1 from the start."""
    (x,), optimizer = make(path, [10.0, -20.0], lr=1e-4, metric=metric)
    feed(optimizer, [x], [3.0, 4.0])
    step = [3.0 * 1.9, 4.0 * 1.9] if metric == "none" else [0.19, 0.19]
    assert torch.allclose(x.detach() - torch.tensor([10.0, -20.0]), -1e-4 * torch.tensor(step), rtol=2e-2)
    assert model_state(optimizer)["gamma"] == 1.0


@on_every_path
@in_both_metrics
def test_weights_of_zero_move_too(path, metric):
    """By a hundredth of what a network's smallest weights are: 1e-3 each."""
    (x,), optimizer = make(path, torch.zeros(4, 4), lr=0.1, metric=metric)
    feed(optimizer, [x], torch.full((4, 4), 7.0))
    assert norm(x) == pytest.approx(0.01 * 4 * 1e-3, rel=1e-3)


@on_every_path
def test_gamma_falls_at_once_and_rises_by_growth(path):
    """On x'x * c / 2 the quotient is lr * c exactly, from the first pair on."""
    (x,), optimizer = make(path, [1.0, 1.0], lr=0.1, momentum=0.0, growth=1.5, rho=0.5, metric="none")
    for _ in range(3):
        feed(optimizer, [x], 2.0 * x.detach())
    # The first step is a hundredth of x: 0.1 * gamma * 2 = 0.01.
    assert model_state(optimizer)["gamma"] == pytest.approx(0.05 * 1.5**2, rel=1e-5)
    for _ in range(60):
        feed(optimizer, [x], 500.0 * x.detach())
    assert model_state(optimizer)["gamma"] == pytest.approx(
        0.8 * 2.0 / (0.1 * 500.0), rel=1e-3
    )  # the cap: .8 of the stability limit


@on_every_path
@pytest.mark.parametrize(("size", "factor"), [(0.05, 0.95), (0.005, 1.0)])
def test_gamma_fades_where_long_steps_do_not_descend(path, size, factor):
    """Gradients to and fro: each step ends uphill. Steps below a hundredth of the weights may do so."""
    (x,), optimizer = make(path, [1.0, 1.0], lr=1.0, momentum=0.0, metric="none", rho=0.0, growth=1.0, rcap=1e9)
    feed(optimizer, [x], [1e-3, 1e-3])
    gammas = []
    for k in range(10):
        feed(optimizer, [x], [size * (-1) ** k] * 2)
        gammas.append(model_state(optimizer)["gamma"])
    # The first pair is that of the small step, whose end the second gradient says to be downhill.
    assert gammas == pytest.approx([factor**k for k in range(10)], rel=1e-6)


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
    (x,), optimizer = make(path, [1.0, 1.0], metric="none")
    for _ in range(60):
        feed(optimizer, [x], -x.detach())
    state = model_state(optimizer)
    assert state["esy"] < 0 and state["gamma"] == 1.0


@on_every_path
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradient_touches_nothing(path, bad):
    params, optimizer = make(path, torch.randn(4, 4), torch.randn(3), sigma=0.5, every=1)
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
    if optimizer.path != "multi-tensor":
        assert same(before, after)
        return
    # The host cannot know: its counters go on, a proximal step may rank anew, and s is 0.
    for state in (before, after):
        assert state[0]["param_groups"][0].pop("k") and state[0]["param_groups"][0].pop("threshold") is not None
        for own in state[0]["state"].values():
            own.pop("step")
    assert torch.equal(before[1][1], after[1][1]) and bool(torch.isfinite(after[1][0]).all())
    assert same(before[0]["param_groups"], after[0]["param_groups"])
    one, two = before[0]["state"][1], after[0]["state"][1]
    assert all(same(one[name], two[name]) for name in ("momentum_buffer", "square_avg"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("path", [{"foreach": True}, {"capturable": True}], ids=str)
@in_both_metrics
def test_on_the_device_weights_momentum_and_gamma_survive_a_bad_step(path, bad, metric):
    """As if the step had not been, but for its count: the next pair is void, the run goes on."""
    torch.manual_seed(0)
    grads = [torch.randn(4, 4) for _ in range(8)]
    weight_decay = {"weight_decay": 0.1, "decoupled": False}
    (x,), optimizer = make(path, torch.ones(4, 4), metric=metric, **weight_decay)
    for g in grads[:4]:
        feed(optimizer, [x], g)
    before = x.detach().clone(), model_state(optimizer), copy.deepcopy(dict(optimizer.state[x]))
    feed(optimizer, [x], torch.full((4, 4), bad))
    after = model_state(optimizer)
    assert torch.equal(x, before[0]) and {**after, "k": 0} == {**before[1], "k": 0}
    assert torch.equal(optimizer.state[x]["momentum_buffer"], before[2]["momentum_buffer"])
    assert "square_avg" not in before[2] or torch.equal(optimizer.state[x]["square_avg"], before[2]["square_avg"])
    for g in grads[4:]:
        feed(optimizer, [x], g)
    assert bool(torch.isfinite(x).all()) and not torch.equal(x, before[0])


@on_every_path
def test_gradients_that_the_caller_has_looked_at(path):
    """check_finite=False takes the same step."""
    results = []
    for check in (True, False):
        torch.manual_seed(0)
        params, optimizer = make(path, torch.randn(30, 40), torch.randn(7), check_finite=check)
        for _ in range(5):
            feed(optimizer, params, torch.randn(30, 40), torch.randn(7))
        results.append(params)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(*results, strict=True))


@on_every_path
def test_first_gradient_may_be_non_finite(path):
    (x,), optimizer = make(path, [1.0, 2.0])
    feed(optimizer, [x], [math.nan, 1.0])
    assert x.tolist() == [1.0, 2.0]
    feed(optimizer, [x], [1.0, 1.0])
    assert bool(torch.isfinite(x).all()) and x.tolist() != [1.0, 2.0]


@on_every_path
@pytest.mark.parametrize("bad", [1, 2])
def test_the_first_finite_gradient_is_the_whole_mean_of_squares(path, bad):
    """Whatever came before. Then the mean goes on as a mean: its weights add up to 1."""
    (x,), optimizer = make(path, [1.0, 2.0])
    for _ in range(bad):
        feed(optimizer, [x], [math.nan, 1.0])
    feed(optimizer, [x], [3.0, 1.0])
    assert optimizer.state[x]["square_avg"].tolist() == pytest.approx([9.0, 1.0], rel=1e-6)
    feed(optimizer, [x], [3.0, 1.0])
    assert optimizer.state[x]["square_avg"].tolist() == pytest.approx([9.0, 1.0], rel=1e-6)


@on_every_path
def test_frozen_and_absent_gradients(path):
    """A tensor without gradient keeps its last displacement, so its next pair spans the time it stood still."""
    params, optimizer = make(path, [1.0, 2.0], [3.0], [4.0], metric="none")
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
@pytest.mark.parametrize("settings", [{"metric": "none"}, {}, {"mode": "paper", "sigma": 0.9}], ids=str)
def test_zero_and_one_element_tensors(path, start, settings):
    (x,), optimizer = make(path, start, **{"sigma": 0.9, "every": 1, "lr": 0.01, **settings})
    for k in range(6):
        feed(optimizer, [x], torch.full_like(start, 0.0 if k < 2 else 0.1 * k))
        assert bool(torch.isfinite(x).all())
    if start.numel() == 1 and start.item():
        assert x.item() != 0.0  # one element is never pruned


@on_every_path
@in_both_metrics
def test_a_tensor_without_elements_disturbs_nothing(path, metric):
    results = []
    for shapes in (([2.0, 3.0], torch.zeros(0, 4)), ([2.0, 3.0],)):
        params, optimizer = make(path, *shapes, metric=metric)
        for k in range(4):
            feed(optimizer, params, [1.0 + k, -1.0], *[torch.zeros(0, 4)][: len(params) - 1])
        results.append(params[0])
    assert torch.allclose(*results, rtol=1e-6)
