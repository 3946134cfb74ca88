"""A run continues exactly where it was saved: at any step, on every path, through torch's distributed checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from sp_training import PRUNED, in_both_metrics, model_state, network, on_every_path, train, weights, wide_network
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sp_yolo.optim import SP, build_param_groups


@on_every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", [PRUNED, {"mode": "paper", "lr": 1e-3}, {}, {"metric": "none"}], ids=str)
def test_state_dict_round_trip_then_lock_step(path, dtype, settings):
    """Through a file; the settings come with it."""
    model = network(dtype)
    optimizer = SP(model.parameters(), **settings, **path)
    train(model, optimizer, 12)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network(dtype)
    other.load_state_dict(saved["model"])
    resumed = SP(other.parameters(), **path)
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, 20, first=12)
    train(other, resumed, 20, first=12)
    assert torch.equal(weights(model), weights(other))
    assert resumed.param_groups[0]["mode"] == optimizer.param_groups[0]["mode"]
    if resumed.param_groups[0]["mode"] == "robust":
        assert model_state(resumed) == model_state(optimizer)


@on_every_path
@pytest.mark.parametrize("settings", [{}, {"metric": "none"}, PRUNED], ids=str)
def test_resume_at_any_step_is_exact(path, settings):
    """The displacement's run moves on with every step, and comes back to the tensor's beginning after 16."""
    model = wide_network()
    optimizer = SP(model.parameters(), **settings, **path)
    saved = []
    for k in range(24):
        saved.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        train(model, optimizer, 1, first=k)
    for k in range(21):
        other = wide_network()
        other.load_state_dict(saved[k][0])
        resumed = SP(other.parameters(), **settings, **path)
        resumed.load_state_dict(saved[k][1])
        train(other, resumed, 3, first=k)
        assert all(torch.equal(value, saved[k + 3][0][name]) for name, value in other.state_dict().items()), k


@on_every_path
def test_resume_of_a_parameter_with_gaps_in_memory_is_exact(path):
    def parameter(x):
        return nn.Parameter(torch.zeros(2 * len(x), *x.shape[1:])[::2].copy_(x))

    def feed(p, optimizer, steps):
        for k in steps:
            p.grad = 0.5 * p.detach() + torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
            optimizer.step()

    torch.manual_seed(0)
    p = parameter(torch.randn(4, 6, 3, 3))
    assert not p.is_contiguous()
    optimizer = SP([p], **path)
    feed(p, optimizer, range(5))
    q = parameter(p.detach())
    resumed = SP([q], **path)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    feed(p, optimizer, range(5, 10))
    feed(q, resumed, range(5, 10))
    assert torch.equal(p, q) and model_state(optimizer) == model_state(resumed)


def grouped(model, **settings):
    """Four groups, with a name for each parameter."""
    return SP(build_param_groups(model, sigma_backbone=settings.pop("sigma", 0.0)), **settings)


@on_every_path
@pytest.mark.parametrize("flatten", [False, True])
@in_both_metrics
def test_distributed_checkpoint_round_trip_then_lock_step(path, flatten, metric):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = wide_network()
    optimizer = SP(model.parameters(), metric=metric, **path)
    train(model, optimizer, 18)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other = wide_network()
    other.load_state_dict(model.state_dict())
    resumed = SP(other.parameters(), metric=metric, **path)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    train(model, optimizer, 12, first=18)
    train(other, resumed, 12, first=18)
    assert torch.equal(weights(model), weights(other)) and model_state(resumed) == model_state(optimizer)


@on_every_path
def test_distributed_checkpoint_of_groups_that_are_pruned(path):
    """With groups and masks: not flattened, since torch then drops what a new optimizer's state does not have yet."""
    settings = {"sigma": 0.6, "every": 3, "total_steps": 40}
    model = network()
    optimizer = grouped(model, **settings, **path)
    train(model, optimizer, 18)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = grouped(other, **settings, **path)
    set_optimizer_state_dict(other, resumed, saved)
    train(model, optimizer, 12, first=18)
    train(other, resumed, 12, first=18)
    assert torch.equal(weights(model), weights(other)) and model_state(resumed) == model_state(optimizer)
    assert resumed.sparsity() == optimizer.sparsity() and optimizer.sparsity()["backbone"] > 0.5


def test_loading_does_not_share_memory_with_the_state_dict():
    model = network()
    optimizer = SP(model.parameters())
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other = network()
    resumed = SP(other.parameters())
    resumed.load_state_dict(saved)
    train(other, resumed, 3)
    one, two = saved["param_groups"][0], kept["param_groups"][0]
    assert one["k"] == two["k"] == 3 and torch.equal(one["gamma"], two["gamma"])
    assert torch.equal(one["averages"], two["averages"])
    for key, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(saved["state"][key][name]), torch.as_tensor(value)), name


def test_state_is_tensors_and_numbers_by_parameter():
    """torch's wrappers (FSDP, distributed checkpoints) expect no other keys and values."""
    model = network()
    optimizer = SP(model.parameters(), **PRUNED)
    train(model, optimizer, 8)
    assert set(optimizer.state) == set(model.parameters())
    assert set(optimizer.state_dict()["state"]) == set(range(len(list(model.parameters()))))
    for state in optimizer.state_dict()["state"].values():
        assert all(isinstance(v, (torch.Tensor, int, float)) for v in state.values())


def test_a_state_of_an_earlier_version_is_refused_in_one_line():
    model = network()
    optimizer = SP(model.parameters())
    train(model, optimizer, 2)
    for change in (
        lambda saved: saved["state"].update(model={"gamma": torch.tensor(0.5), "ess": torch.tensor(1.0)}),
        lambda saved: saved["param_groups"][0].update(gamma_start=0.01),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved)
        before = weights(model).clone(), model_state(optimizer)
        with pytest.raises(ValueError, match="load the weights alone") as error:
            optimizer.load_state_dict(saved)
        assert "\n" not in str(error.value)
        assert torch.equal(before[0], weights(model)) and before[1] == model_state(optimizer)


@pytest.mark.parametrize("other", [{"foreach": True}, {"native": False}], ids=str)
@pytest.mark.parametrize("settings", [PRUNED, {"lr": 0.3}], ids=str)
def test_a_state_may_change_paths(other, settings):
    """Saved by one path, continued by another, and back. (A captured step has another run: the test below.)"""
    model, reference = network(), network()
    optimizer, steady = SP(model.parameters(), **settings), SP(reference.parameters(), **settings)
    usual = {name: optimizer.param_groups[0][name] for name in other}
    for k, path in enumerate([usual, other, usual, other]):
        optimizer.param_groups[0].update(path)
        train(model, optimizer, 5, first=5 * k)
    train(reference, steady, 20)
    assert torch.allclose(weights(model), weights(reference), rtol=1e-4, atol=1e-5)
    assert model_state(optimizer)["gamma"] == pytest.approx(model_state(steady)["gamma"], rel=1e-3)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("foreach", [None, True])
def test_a_captured_run_and_another_do_not_share_a_pair(first, foreach):
    """Their runs lie elsewhere: a pair of both would be the product of unrelated numbers. On a quadratic of curvature
    2 the averages say 2 at every step."""
    torch.manual_seed(0)
    x = nn.Parameter(torch.randn(200, 200, dtype=torch.float64))
    optimizer = SP([x], metric="none", momentum=0.0, lr=0.01, weight_decay=0.0, rho=0.0, foreach=foreach)
    for k in range(12):
        captured = optimizer.param_groups[0]["capturable"] = first ^ (k >= 6)
        x.grad = 2.0 * x.detach()
        optimizer.step()
        assert isinstance(optimizer.state[x]["step"], torch.Tensor) == captured
        state = model_state(optimizer)
        assert k == 0 or state["esy"] / state["ess"] == pytest.approx(2.0, rel=1e-6)


@on_every_path
@pytest.mark.parametrize("settings", [PRUNED, {"metric": "none"}], ids=str)
@pytest.mark.parametrize("clone", ["deepcopy", "pickle"])
def test_deepcopy_and_pickle(path, clone, settings):
    model = wide_network()
    optimizer = SP(model.parameters(), **settings, **path)
    train(model, optimizer, 8)
    pair = (model, optimizer)
    other, twin = copy.deepcopy(pair) if clone == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(model, optimizer, 10, first=8)
    train(other, twin, 10, first=8)
    assert torch.equal(weights(model), weights(other))
