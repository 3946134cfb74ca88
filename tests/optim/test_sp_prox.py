"""The proximal operator against brute force, the exact selection against a stable argsort, the schedule by hand."""

import itertools

import numpy as np
import pytest
import torch
from sp_training import model_state

from sp_yolo.optim import SP, native, prune
from sp_yolo.optim import saliency as sal


@pytest.mark.parametrize("seed", range(6))
def test_prox_minimises_the_penalised_distance(seed):
    """The kept support is the minimiser of lambda |z|_0 + 0.5 (z - x)'B(z - x) over all 2^n supports."""
    rng = np.random.default_rng(seed)
    n = 6 + seed
    x, b = rng.normal(size=n), np.exp(rng.normal(size=n))
    scores = sal.saliency(torch.tensor(x), torch.tensor(b))
    for count in (0, 1, n // 2, n - 1):
        (keep,), threshold = sal.keep_masks([scores], count)
        lam = float(threshold) if count else 0.0
        best = min(
            itertools.product([0, 1], repeat=n),
            key=lambda support: (
                lam * sum(support) + 0.5 * (b * (x * np.array(support) - x) ** 2).sum() + 1e-12 * sum(support)
            ),
        )
        assert keep.int().tolist() == list(best)


PATHS = [{"foreach": False, "native": False}, {"foreach": True}, {"native": True}]


def by_argsort(arrays, count):
    joined = np.concatenate([a.ravel() for a in arrays])
    keep = np.ones(joined.size, dtype=bool)
    keep[np.argsort(joined, kind="stable")[:count]] = False
    return keep


@pytest.mark.parametrize("kind", ["continuous", "ties", "all equal", "held", "unlike tensors", "sorted"])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.3, 0.8, 0.999, 1.0])
def test_selection_is_exact_and_breaks_ties_by_index(monkeypatch, kind, share):
    """Small sample, so that the bracket is used, and missed, at sizes a test can afford."""
    monkeypatch.setattr(sal, "SAMPLE", 256)
    rng = np.random.default_rng(0)
    shapes = [(40, 30), (7, 3, 3, 3), (2000,)]
    arrays = [rng.random(size=s).astype(np.float32) for s in shapes]
    if kind == "ties":
        arrays = [np.round(a, 1) for a in arrays]
    elif kind == "all equal":
        arrays = [np.ones_like(a) for a in arrays]
    elif kind == "held":
        arrays = [np.where(a < 0.7, np.float32(-1), a) for a in arrays]
    elif kind == "unlike tensors":
        arrays = [a * np.float32(10.0**-i) for i, a in enumerate(arrays)]
    elif kind == "sorted":  # a strided sample is then a regular comb
        arrays = [np.sort(a.ravel()).reshape(a.shape) for a in arrays]
    count = int(share * sum(a.size for a in arrays))
    expected = by_argsort(arrays, count)
    tensors = [torch.tensor(a) for a in arrays]
    holding = sum(int((a < 0).sum()) for a in arrays)
    masks, threshold = sal.keep_masks(tensors, count, holding)
    assert np.array_equal(torch.cat([m.flatten() for m in masks]).numpy(), expected)
    assert [m.shape for m in masks] == [t.shape for t in tensors]
    by_sort, _ = sal._keep_sorted([t.flatten() for t in tensors], max(count, 1))
    if count:
        assert np.array_equal(by_sort.numpy(), expected)
        assert float(threshold) == np.sort(np.concatenate([a.ravel() for a in arrays]))[count - 1]


def test_a_bracket_that_misses_still_selects_exactly(monkeypatch):
    values = torch.arange(100.0)
    for count in (10, 70):
        assert sal.keep_blocks(values.split(30), 100, count, 50.0, 60.0) is None
    keep, threshold = sal.keep_blocks(values.split(30), 100, 55, 50.0, 60.0)
    assert keep.nonzero().flatten().tolist() == list(range(55, 100)) and float(threshold) == 54.0
    monkeypatch.setattr(sal, "SAMPLE", 50)
    monkeypatch.setattr(sal, "bracket", lambda sample, share: (50.0, 60.0))
    (mask,), threshold = sal.keep_masks([values], 10)
    assert mask.nonzero().flatten().tolist() == list(range(10, 100)) and float(threshold) == 9.0


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8, 0.99])
def test_bracket_holds_the_quantile_and_little_else(share):
    """Over 50 random samples of 2000 of 200,000; the bracket holds eight standard deviations of the sample's rank."""
    rng = np.random.default_rng(0)
    values = np.sort(rng.normal(size=200_000))
    for _ in range(50):
        low, high = sal.bracket(torch.tensor(rng.choice(values, 2000)), share)
        assert low < values[int(share * values.size)] <= high
        assert ((values > low) & (values <= high)).mean() < 1.5 * (8 * np.sqrt(share * (1 - share) * 2000) + 10) / 2000


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("held", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("saliency", ["fisher", "magnitude", "metric"])
@pytest.mark.parametrize("kind", ["continuous", "rounded", "dead"])
@pytest.mark.parametrize("sample", [256, 1 << 16])
def test_ranking_of_a_group_is_exact(monkeypatch, compiled, held, saliency, kind, sample):
    """From x, h and masks, in torch and in C; rounded weights give many ties. Needs the C compiler of the machine."""
    monkeypatch.setattr(prune, "SAMPLE", sample)
    monkeypatch.setattr(prune, "BLOCK", 1000)
    generator = torch.Generator().manual_seed(0)
    shapes = [(17, 33), (5, 4, 3, 3), (1000, 3), (10_001, 2)]
    params = [torch.randn(s, generator=generator) * 0.1**i for i, s in enumerate(shapes)]
    params = [p.round(decimals=1) if kind == "rounded" else p for p in params]
    if kind == "dead":
        params[2][100:900] = 0.0
    states = [{"momentum_buffer": p, "square_avg": torch.rand(p.shape, generator=generator)} for p in params]
    for p, state in zip(params, states, strict=True):
        if held:
            state["mask"] = torch.rand(p.shape, generator=generator) > held
            p.mul_(state["mask"])
    # In the order of the multiplications that the ranking has, to the last bit: ties are ties.
    scales = {
        "fisher": lambda s: s["square_avg"],
        "magnitude": lambda s: torch.ones(()),
        "metric": lambda s: 1.0 / ((1.0 - 0.9) / (s["square_avg"].sqrt() + 1e-8)),
    }
    scores = [0.5 * (p * p * scales[saliency](s)) for p, s in zip(params, states, strict=True)]
    scores = [
        torch.where(s["mask"], c, -1.0).numpy() if held else c.numpy() for c, s in zip(scores, states, strict=True)
    ]
    zeros, n = sum(int((c < 0).sum()) for c in scores), sum(p.numel() for p in params)
    group = {
        "saliency": "fisher" if saliency == "fisher" else "metric",
        "metric": "fisher" if saliency == "metric" else "none",
        "momentum": 0.9,
    }
    kernels = native.library() if compiled else None
    for count in (zeros - 5, zeros + 1, zeros + 40, n // 2, int(0.95 * n), n - 1, n):
        if count <= 0:
            continue
        rows, threshold = prune._rank(group, params, states, count, zeros, kernels)
        assert np.array_equal(torch.cat([r.flatten() for r in rows]).numpy(), by_argsort(scores, count))
        assert float(threshold) == np.sort(np.concatenate([c.ravel() for c in scores]))[count - 1]


def test_group_of_more_weights_than_the_sample_on_every_path(monkeypatch):
    """A run with held zeros, through the bracket, the sort (foreach) and C: the same weights are zero."""
    monkeypatch.setattr(prune, "SAMPLE", 64)
    zeros = []
    for path in PATHS:
        params, optimizer = one_group(shape=(16, 16), sigma=0.7, total_steps=40, every=4, lr=1e-2, **path)
        run(params, optimizer, 30)
        zeros.append([p == 0 for p in params])
        assert optimizer.sparsity()["weights"] == int(0.7 * 768) / 768
    assert all(torch.equal(a, b) for other in zeros[1:] for a, b in zip(zeros[0], other, strict=True))


def test_nan_ranks_last():
    (keep,), _ = sal.keep_masks([torch.tensor([float("nan"), 1.0, 2.0])], 2)
    assert keep.tolist() == [True, False, False]


def test_schedule_by_hand():
    """T = 100, from 10 to 65 by tens: p = 0, 10/55, ...; then sigma itself, once, at the end."""
    due = [k for k in range(100) if sal.prox_due(k, 10, 0.1, 0.65, 100)]
    assert due == [10, 20, 30, 40, 50, 60, 65]
    assert sal.sigma_at(10, 0.8, 0.1, 0.65, 100) == 0.0
    assert sal.sigma_at(20, 0.8, 0.1, 0.65, 100) == pytest.approx(0.8 * (1 - (45 / 55) ** 3))
    assert sal.sigma_at(65, 0.8, 0.1, 0.65, 100) == 0.8
    assert sal.sigma_at(5, 0.8, 0.1, 0.65, 100) == 0.0
    # A ramp to the very end of the run still arrives: at its last step.
    assert [k for k in range(25) if sal.prox_due(k, 10, 0.0, 1.0, 25)] == [0, 10, 20, 24]
    assert sal.sigma_at(24, 0.8, 0.0, 1.0, 25) == 0.8
    # start == end is a jump, no run length is a constant.
    assert [k for k in range(25) if sal.prox_due(k, 10, 0.5, 0.5, 25)] == [13]
    assert sal.sigma_at(13, 0.8, 0.5, 0.5, 25) == 0.8
    assert [k for k in range(25) if sal.prox_due(k, 10, 0.1, 0.65, None)] == [0, 10, 20]


def one_group(count=3, shape=(8, 8), **settings):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(count)]
    return params, SP([{"params": params, "name": "weights"}], weight_decay=0.0, **settings)


def run(params, optimizer, steps, scale=1.0):
    for _ in range(steps):
        for p in params:
            p.grad = scale * torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_group_is_ranked_as_one(path):
    """One threshold per group: a tensor of small weights loses more than its share, the total is exact."""
    params, optimizer = one_group(sigma=0.5, total_steps=100, saliency="metric", metric="none", **path, lr=1e-3)
    with torch.no_grad():
        params[0].mul_(0.01)
    run(params, optimizer, 70)
    zeros = [int((p == 0).sum()) for p in params]
    assert sum(zeros) == 96 and zeros[0] > 60
    assert optimizer.sparsity() == {"weights": 0.5}


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_held_zeros_stay_and_released_ones_grow(path):
    params, optimizer = one_group(sigma=0.5, total_steps=100, **path)
    run(params, optimizer, 66)
    held = [p == 0 for p in params]
    run(params, optimizer, 30)
    assert all(bool((p[h] == 0).all()) for p, h in zip(params, held, strict=True))
    for group in optimizer.param_groups:
        group["held"] = False
    run(params, optimizer, 2)
    assert optimizer.sparsity()["weights"] < 0.01


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_held_zeros_survive_other_weights_being_loaded(path):
    params, optimizer = one_group(sigma=0.5, total_steps=100, **path)
    run(params, optimizer, 66)
    held = [p == 0 for p in params]
    with torch.no_grad():
        for p in params:
            p.add_(1.0)
    run(params, optimizer, 1)
    assert all(bool((p[h] == 0).all()) for p, h in zip(params, held, strict=True))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("how", ["held", "sigma"])
def test_what_gathered_behind_a_mask_moves_nothing(path, how):
    """Gradients reach held zeros and gather in v; without a gradient, weights set free stay where they are: at 0."""
    params, optimizer = one_group(sigma=0.5, every=5, **path)
    run(params, optimizer, 9)  # the proximal steps were at 0 and 5, the next is at 10
    held = [p == 0 for p in params]
    optimizer.param_groups[0].update({"held": False, "sigma": 0.0} if how == "held" else {"sigma": 0.25})
    before = [p.detach().clone() for p in params]
    for _ in range(4):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(bool((p[h] == 0).all()) for p, h in zip(params, held, strict=True))
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_all_equal_tensor_is_not_wiped():
    params, optimizer = one_group(count=1, sigma=0.25, every=1, saliency="metric", metric="none")
    with torch.no_grad():
        params[0].fill_(1.0)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    assert params[0].flatten().nonzero().flatten().tolist() == list(range(16, 64))


def test_dead_weights_do_not_free_held_ones():
    """Weights without gradient have Fisher saliency 0, like held zeros; the held ones stay the zeros."""
    params, optimizer = one_group(count=1, sigma=0.5, every=1, lr=1e-3)
    run(params, optimizer, 1)
    held = params[0] == 0
    for _ in range(3):
        params[0].grad = torch.zeros_like(params[0])
        optimizer.state[params[0]]["square_avg"].zero_()
        optimizer.step()
    assert torch.equal(params[0] == 0, held)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_pair_after_the_jump_is_skipped(path):
    params, optimizer = one_group(sigma=0.9, every=5, lr=0.05, shape=(40, 50), **path)
    run(params, optimizer, 6)  # the proximal step was at 5
    before = model_state(optimizer)
    run(params, optimizer, 1)
    assert {**model_state(optimizer), "k": 6} == before
    run(params, optimizer, 1)
    assert model_state(optimizer)["ess"] != before["ess"]


def test_metric_saliency_ranks_by_the_root_of_the_squares():
    """Weights of one size: those of the smallest gradients go."""
    params, optimizer = one_group(count=1, sigma=0.25, every=1, saliency="metric", lr=1e-6)
    with torch.no_grad():
        params[0].fill_(1.0)
    params[0].grad = torch.arange(1.0, 65.0).flip(0).view(8, 8)
    optimizer.step()
    assert params[0].flatten().nonzero().flatten().tolist() == list(range(48))


def test_a_step_of_rate_zero_prunes_nothing() -> None:
    """What torch.distributed.checkpoint does to a fresh optimizer so that it has state to load into."""
    weight = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    optimizer = SP([weight], lr=0.0, sigma=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)
    optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert int((weight == 0).sum()) == 32
