"""Tensors whose gradients come and go, that start later or freeze: every path beside the plain lines of ReferenceSP."""

import copy

import pytest
import torch
from sp_training import model_state, on_every_path
from torch import nn

from sp_yolo.optim import SP
from sp_yolo.optim.reference import ReferenceSP

# The first has three runs, the second sixteen; the others one.
SHAPES = ((50, 60), (130, 140), (30,), (4, 5, 3), (1,))
STEPS = 40


def comes_and_goes(k, i):
    return (k + i) % (i + 2) != 0


def starts_later(k, i):
    """The first from step 17 on, the third from step 5."""
    return k >= {0: 17, 2: 5}.get(i, 0)


def freezes(k, i):
    return k < {1: 12, 3: 20}.get(i, STEPS)


def alone_at_times(k, i):
    return (k // 6) % len(SHAPES) == i or k % 6 == 0


def parameters(shapes):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).float()) for shape in shapes]


def gradients(params, k, present):
    """Of a noisy quadratic."""
    generator = torch.Generator().manual_seed(k)
    noise = [torch.randn(p.shape, generator=generator) for p in params]
    return [0.7 * p.detach() + 0.5 * n if present(k, i) else None for i, (p, n) in enumerate(zip(params, noise))]  # noqa: B905


def step(params, optimizer, k, present):
    for p, g in zip(params, gradients(params, k, present), strict=True):
        p.grad = g
    optimizer.step()


@on_every_path
@pytest.mark.parametrize("present", [comes_and_goes, starts_later, freezes, alone_at_times])
def test_as_the_reference(path, present):
    """A captured step measures the first run only; so there the tensors are of one run."""
    shapes = SHAPES[2:] if "capturable" in path else SHAPES
    ours, theirs = parameters(shapes), parameters(shapes)
    optimizer, reference = SP(ours, lr=0.05, **path), ReferenceSP(theirs, lr=0.05)
    for k in range(STEPS):
        untouched = [p.detach().clone() for p in ours]
        step(ours, optimizer, k, present)
        step(theirs, reference, k, present)
        for i, (p, q, before) in enumerate(zip(ours, theirs, untouched, strict=True)):
            assert torch.allclose(p, q, rtol=1e-3, atol=1e-4), f"tensor {i} at step {k}"
            assert present(k, i) or torch.equal(p, before)
    assert model_state(optimizer)["gamma"] == pytest.approx(reference.gamma, rel=1e-3)
    assert [int(optimizer.state[p]["step"]) for p in ours] == [reference.state[q]["step"] for q in theirs]


@on_every_path
@pytest.mark.parametrize("present", [comes_and_goes, starts_later])
def test_resume_is_exact_while_some_are_absent(path, present):
    params = parameters(SHAPES)
    optimizer = SP(params, lr=0.05, **path)
    for k in range(19):
        step(params, optimizer, k, present)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = SP(others, **path)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for k in range(19, 30):
        step(params, optimizer, k, present)
        step(others, resumed, k, present)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert model_state(optimizer) == model_state(resumed)


@on_every_path
def test_a_group_added_during_the_run_starts_from_nothing(path):
    """Fine-tuning that thaws a layer: the run of the others is undisturbed by a tensor that has no gradient yet."""
    first, second = parameters(SHAPES[2:]), parameters(SHAPES[2:])
    optimizer, steady = SP(first, lr=0.05, **path), SP(second, lr=0.05, **path)
    always = lambda k, i: True  # noqa: E731
    for k in range(10):
        step(first, optimizer, k, always)
        step(second, steady, k, always)
    late = nn.Parameter(torch.ones(20, 20))
    optimizer.add_param_group({"params": [late], "lr": 0.01})
    for k in range(10, 15):
        step(first, optimizer, k, always)
        step(second, steady, k, always)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True)) and late not in optimizer.state
    late.grad = torch.full((20, 20), 3.0)
    gamma = model_state(optimizer)["gamma"]
    step(first, optimizer, 15, always)
    assert int(optimizer.state[late]["step"]) == 1
    # Its first step is that of its first gradient: lr gamma (1 - beta^2) of its sign, and the decay.
    moved = float(1.0 - late.detach()[0, 0])
    gamma = model_state(optimizer)["gamma"] if gamma else 0.0
    assert moved == pytest.approx(0.01 * gamma * (0.19 + 0.01), rel=1e-3)
