"""SP behaves as an optimizer of torch.optim: settings, groups, state, copies, AMP, torch.compile."""

import copy
import pickle
import warnings

import pytest
import torch
from sp_training import PRUNED, batch, in_both_metrics, network, on_every_path, train, weights
from support.launcher import python
from torch import nn

from sp_yolo.optim import DEFAULTS, SP


def test_setstate_fills_settings_that_an_old_checkpoint_lacks():
    model = network()
    optimizer = SP(model.parameters(), lr=0.05, rho=0.8)
    train(model, optimizer, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for name in ("held", "growth", "saliency", "check_finite"):
        del old["param_groups"][0][name]
    resumed = SP(model.parameters())
    resumed.load_state_dict(old)
    group = resumed.param_groups[0]
    assert (group["held"], group["growth"], group["saliency"], group["rho"]) == (True, 1.1, "fisher", 0.8)
    train(model, resumed, 2)
    bare = pickle.loads(pickle.dumps(optimizer))
    state = bare.__getstate__()
    for name in ("held", "growth"):
        del state["param_groups"][0][name]
    bare.__setstate__(state)
    assert bare.param_groups[0]["growth"] == 1.1


def test_groups_have_their_own_settings_and_keep_unknown_keys():
    a, b, c = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = SP([{"params": [a], "lr": 0.2, "owner": "somebody"}, {"params": [b], "weight_decay": 0.1}], lr=0.01)
    optimizer.add_param_group({"params": [c]})
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.01, 0.01]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.1, 0.01]
    assert optimizer.state_dict()["param_groups"][0]["owner"] == "somebody"
    for p in (a, b, c):
        p.grad = torch.zeros(2, 2)
    optimizer.step()
    # Decoupled: x *= 1 - lr gamma decay, and gamma is a hundredth of 1 over the step's root mean square.
    gamma = 0.01 / (0.19 * ((0.2**2 + 2 * 0.01**2) / 3) ** 0.5)
    assert float(optimizer.param_groups[0]["gamma"]) == pytest.approx(gamma)
    for p, lr, decay in ((a, 0.2, 0.01), (b, 0.01, 0.1), (c, 0.01, 0.01)):
        assert p.detach() == pytest.approx(torch.full((2, 2), 1 - lr * gamma * decay), rel=1e-6)


def test_named_parameters_and_empty_groups():
    model = network()
    optimizer = SP([{"params": list(model.named_parameters())}, {"params": [], "param_names": []}])
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    train(model, optimizer, 2)
    assert optimizer.sparsity() == {"group0": 0.0, "group1": 0.0}


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = SP([x])

    def closure():
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert x.item() < 1.0


@on_every_path
@in_both_metrics
def test_maximize_mirrors_minimize(path, metric):
    up, down = network(), network()
    one = SP(up.parameters(), maximize=True, metric=metric, **path)
    two = SP(down.parameters(), metric=metric, **path)
    for k in range(5):
        train(down, two, 1, first=k)
        for p, q in zip(up.parameters(), down.parameters(), strict=True):
            p.grad = -q.grad
        one.step()
    assert torch.equal(weights(up), weights(down))


@on_every_path
def test_tensor_lr(path):
    model, reference = network(), network()
    rate = torch.tensor(0.1)
    optimizer, plain = SP(model.parameters(), lr=rate, **path), SP(reference.parameters(), lr=0.1, **path)
    for k in range(4):
        rate.fill_(0.1 / (k + 1))
        plain.param_groups[0]["lr"] = 0.1 / (k + 1)
        train(model, optimizer, 1, first=k)
        train(reference, plain, 1, first=k)
    assert torch.allclose(weights(model), weights(reference), rtol=1e-5, atol=1e-7)


@on_every_path
@in_both_metrics
def test_tensor_lr_may_start_at_zero(path, metric):
    """A warm-up from 0: nothing moves, then everything does. gamma stays what it may be."""
    model = network()
    rate, before = torch.tensor(0.0), weights(model)
    optimizer = SP(model.parameters(), lr=rate, metric=metric, **path)
    train(model, optimizer, 3)
    assert torch.equal(weights(model), before)
    rate.fill_(0.01)
    train(model, optimizer, 3, first=3)
    assert 0 < float(optimizer.param_groups[0]["gamma"]) <= 1
    assert 0 < float((weights(model) - before).abs().max()) < 0.1


@pytest.mark.parametrize("bad", [torch.tensor([0.1, 0.2]), -0.1])
def test_bad_lr(bad):
    with pytest.raises(ValueError, match="lr"):
        SP([nn.Parameter(torch.ones(1))], lr=bad)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("momentum", 1.0), ("momentum", -0.1), ("weight_decay", -1.0), ("mode", "released"), ("metric", "full"),
        ("sigma", 1.0), ("sigma", -0.1),
        ("saliency", "taylor"), ("every", 0), ("start", -0.1), ("end", 0.05), ("end", 1.1), ("total_steps", 0),
        ("rho", 1.0), ("rcap", -1.0), ("growth", 0.9), ("native", "yes"),
    ],
)  # fmt: skip
def test_settings_out_of_bounds_are_refused_with_the_value(name, value):
    with pytest.raises(ValueError, match=name) as error:
        SP([nn.Parameter(torch.ones(1))], **{name: value})
    assert str(value) in str(error.value)
    optimizer = SP([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], name: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "value", "successor"),
    [
        ("damping", "fisher", "metric"), ("compile", True, "native"), ("gamma_start", 0.1, "by itself"),
        ("damping_bounds", (0.1, 10.0), "no diagonal damping"), ("dampening", 0.1, "no setting of SP"),
    ],
)  # fmt: skip
def test_a_former_setting_names_its_successor(name, value, successor):
    with pytest.raises(TypeError, match=name) as error:
        SP([nn.Parameter(torch.ones(1))], **{name: value})
    assert successor in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="damping"):  # an old name of the present settings' value
        SP([nn.Parameter(torch.ones(1))], saliency="damping")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("betas", "momentum is the first of them"),
        ("eps", "fixed at 1e-8"),
        ("wd", "weight_decay"),
        ("learning_rate", "called lr"),
        ("decoupled_weight_decay", "called decoupled"),
        ("fused", "native"),
        ("amsgrad", "leave it out"),
        ("sigma_head", "build_param_groups"),
        ("weight_dacay", "did you mean weight_decay?"),
        ("nestrov", "did you mean nesterov?"),
        ("total_step", "did you mean total_steps?"),
        ("foo", "foo is no setting of SP"),
    ],
)
def test_a_setting_of_another_optimizer_is_answered_by_its_counterpart(name, words):
    with pytest.raises(TypeError) as error:
        SP([nn.Parameter(torch.ones(1))], **{name: 0.9})
    assert str(error.value).startswith(f"{name} is no setting of SP") and words in str(error.value)


def test_zeros_that_are_chosen_after_one_step_are_warned_of():
    """Without a ramp the first ranking, by one gradient, holds: the zeros of step 1 are those of step 50."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8))
    with pytest.warns(UserWarning, match="sigma=0.5 without total_steps: all zeros are chosen after the first step"):
        optimizer = SP([weight], sigma=0.5, every=5)
    zeros = []
    for _ in range(50):
        weight.grad = torch.randn(8, 8)
        optimizer.step()
        zeros.append(weight.detach() == 0)
    assert int(zeros[0].sum()) == 32 and all(torch.equal(each, zeros[0]) for each in zeros)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in ({"total_steps": 9}, {"held": False}, {"mode": "paper"}):
            SP([weight], sigma=0.5, **settings)
        SP([weight])


def test_defaults_are_those_of_the_signature():
    group = SP([nn.Parameter(torch.ones(1))]).param_groups[0]
    assert {name: group[name] for name in DEFAULTS} == DEFAULTS
    expected = {"lr": 0.005, "momentum": 0.9, "weight_decay": 0.01, "decoupled": True, "metric": "fisher"}
    assert {name: DEFAULTS[name] for name in expected} == expected


def test_unsupported_parameters_are_refused():
    with pytest.raises(ValueError, match="complex"):
        SP([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="differentiable"):
        SP([nn.Parameter(torch.ones(2))], differentiable=True)
    with pytest.raises(ValueError, match="prunable has 1 flags for 2"):
        SP([{"params": [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))], "prunable": [True]}])
    with pytest.raises(ValueError, match="rho must be the same"):
        SP([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))], "rho": 0.5}])
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = SP(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_grad_scaler_skips_and_unscales():
    model, reference = network(), network()
    optimizer, plain = SP(model.parameters(), **PRUNED), SP(reference.parameters(), **PRUNED)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for k in range(8):
        images, labels = batch(k)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
        if k == 3:
            before = copy.deepcopy(optimizer.state_dict())
            model[0].weight.grad[0, 0, 0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            assert str(before) == str(optimizer.state_dict())
            continue
        scaler.step(optimizer)
        scaler.update()
        train(reference, plain, 1, first=k)
    assert scaler.get_scale() == 512.0
    assert torch.allclose(weights(model), weights(reference), rtol=1e-5, atol=1e-6)


def test_under_torch_compile():
    model, reference = network(), network()
    optimizer, plain = SP(model.parameters(), **PRUNED), SP(reference.parameters(), **PRUNED)
    step = torch.compile(optimizer.step, backend="eager")
    for k in range(5):  # proximal steps at 0 and 3
        images, labels = batch(k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        step()
    train(reference, plain, 5)
    assert torch.allclose(weights(model), weights(reference), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lr_scheduler", [torch.optim.lr_scheduler.LambdaLR])
def test_lr_scheduler(lr_scheduler):
    optimizer = SP([nn.Parameter(torch.ones(1))], lr=0.2)
    scheduler = lr_scheduler(optimizer, lambda k: 0.5**k)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_import_needs_torch_only():
    code = (
        "import sys; from sp_yolo.optim import SP; "
        "print([m for m in ('cv2', 'pycocotools', 'torchvision', 'yaml', 'sp_yolo.models') if m in sys.modules])"
    )
    assert python(code) == "[]"
