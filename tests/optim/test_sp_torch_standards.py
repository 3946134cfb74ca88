"""SP behaves as an optimizer of torch.optim: settings, groups, state, copies, AMP, torch.compile."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from sp_training import PRUNED, batch, network, on_every_path, train, weights
from torch import nn

from sp_yolo.optim import SP


@on_every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "settings", [PRUNED, {"mode": "paper", "lr": 1e-3}, {"damping": "diagonal"}, {"damping": "fisher"}], ids=str
)
def test_state_dict_round_trip_then_lock_step(path, dtype, settings):
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
    again = resumed.state_dict()["state"]["model"]
    assert {k: float(v) for k, v in again.items()} == {
        k: float(v) for k, v in optimizer.state_dict()["state"]["model"].items()
    }


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
    assert float(saved["state"]["model"]["gamma"]) == float(kept["state"]["model"]["gamma"])
    assert torch.equal(saved["state"][0]["displacement"], kept["state"][0]["displacement"])


def test_state_is_tensors_and_numbers():
    model = network()
    optimizer = SP(model.parameters(), **PRUNED)
    train(model, optimizer, 8)
    for state in optimizer.state_dict()["state"].values():
        assert all(isinstance(v, (torch.Tensor, int, float)) for v in state.values())


def test_a_state_may_change_paths():
    """Saved by the single-tensor path, continued by the multi-tensor path, and back."""
    model, reference = network(), network()
    optimizer, steady = SP(model.parameters(), **PRUNED), SP(reference.parameters(), **PRUNED)
    for k, foreach in enumerate([False, True, False, True]):
        optimizer.param_groups[0]["foreach"] = foreach
        train(model, optimizer, 5, first=5 * k)
    train(reference, steady, 20)
    assert torch.allclose(weights(model), weights(reference), rtol=1e-4, atol=1e-5)


@on_every_path
@pytest.mark.parametrize("clone", ["deepcopy", "pickle"])
def test_deepcopy_and_pickle(path, clone):
    model = network()
    optimizer = SP(model.parameters(), **PRUNED, **path)
    train(model, optimizer, 8)
    pair = (model, optimizer)
    other, twin = copy.deepcopy(pair) if clone == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(model, optimizer, 10, first=8)
    train(other, twin, 10, first=8)
    assert torch.equal(weights(model), weights(other))


def test_setstate_fills_settings_that_an_old_checkpoint_lacks():
    model = network()
    optimizer = SP(model.parameters(), lr=0.05, rho=0.8)
    train(model, optimizer, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for name in ("held", "growth", "saliency", "damping_bounds"):
        del old["param_groups"][0][name]
    resumed = SP(model.parameters())
    resumed.load_state_dict(old)
    group = resumed.param_groups[0]
    assert (group["held"], group["growth"], group["saliency"], group["rho"]) == (True, 1.5, "fisher", 0.8)
    train(model, resumed, 2)
    bare = pickle.loads(pickle.dumps(optimizer))
    state = bare.__getstate__()
    for name in ("held", "growth"):
        del state["param_groups"][0][name]
    bare.__setstate__(state)
    assert bare.param_groups[0]["growth"] == 1.5


def test_groups_have_their_own_settings_and_keep_unknown_keys():
    a, b, c = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = SP([{"params": [a], "lr": 0.2, "owner": "somebody"}, {"params": [b], "weight_decay": 0.1}], lr=0.01)
    optimizer.add_param_group({"params": [c]})
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.01, 0.01]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [5e-4, 0.1, 5e-4]
    assert optimizer.state_dict()["param_groups"][0]["owner"] == "somebody"
    for p in (a, b, c):
        p.grad = torch.zeros(2, 2)
    optimizer.step()
    assert not torch.equal(b, c) and torch.allclose(b.detach(), torch.tensor(1 - 0.01 * 0.01 * 1.9 * 0.1))


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
def test_maximize_mirrors_minimize(path):
    up, down = network(), network()
    one = SP(up.parameters(), maximize=True, weight_decay=0.0, **path)
    two = SP(down.parameters(), weight_decay=0.0, **path)
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


@pytest.mark.parametrize("bad", [torch.tensor([0.1, 0.2]), -0.1])
def test_bad_lr(bad):
    with pytest.raises(ValueError, match="lr"):
        SP([nn.Parameter(torch.ones(1))], lr=bad)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("momentum", 1.0), ("momentum", -0.1), ("weight_decay", -1.0), ("mode", "released"), ("damping", "full"),
        ("damping_bounds", (0.0, 10.0)), ("damping_bounds", (0.1, 0.9)), ("sigma", 1.0), ("sigma", -0.1),
        ("saliency", "taylor"), ("every", 0), ("start", -0.1), ("end", 0.05), ("end", 1.1), ("total_steps", 0),
        ("rho", 1.0), ("rcap", -1.0), ("growth", 0.9), ("gamma_start", 0.0), ("gamma_start", 1.5), ("compile", "yes"),
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
    for k in range(8):
        images, labels = batch(k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        step()
    train(reference, plain, 8)
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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
