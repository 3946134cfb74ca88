"""SP behaves as an optimizer of torch.optim: settings, state, copies, AMP, torch.compile, memory."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from sp_yolo.optim import SP

PATHS = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True},
    "native": {"compile": True},
}
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
PRUNED = {"sigma": 0.6, "every": 3, "total_steps": 40}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5)).to(
        dtype
    )


def batch(k):
    generator = torch.Generator().manual_seed(k)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(0, 5, (6,), generator=generator)


def train(model, optimizer, steps, first=0):
    dtype = next(model.parameters()).dtype
    for k in range(first, first + steps):
        images, labels = batch(k)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.to(dtype)).float(), labels).backward()
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@on_every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", [PRUNED, {"mode": "paper", "lr": 1e-3}, {"damping": "diagonal"}], ids=str)
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


@on_every_path
def test_mixed_dtypes_in_one_group_decay_once(path):
    """Zero gradients: only the decay moves x. A multi-tensor optimizer may apply it once per dtype."""
    params = [nn.Parameter(torch.ones(8, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16)]
    optimizer = SP(params, lr=0.1, weight_decay=0.5, decoupled=True, **path)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [p[0].item() for p in params] == [pytest.approx(0.95), pytest.approx(0.95), pytest.approx(0.95, rel=4e-3)]


@on_every_path
def test_memory_layouts_give_the_same_step(path):
    """channels_last, a transposed parameter, one with gaps, and gradients in another layout than the parameter."""

    def variants(x):
        transposed = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        gaps = torch.zeros(8, 6, 3, 3)[::2].copy_(x)
        return [x.clone(), x.clone(memory_format=torch.channels_last), transposed, gaps]

    torch.manual_seed(0)
    start, grads = torch.randn(4, 6, 3, 3), [torch.randn(4, 6, 3, 3) for _ in range(7)]
    results = []
    for x in variants(start):
        p = nn.Parameter(x)
        optimizer = SP([p], sigma=0.4, every=2, damping="diagonal", **path)
        for k, g in enumerate(grads):
            p.grad = variants(g)[k % 2]
            optimizer.step()
        results.append(p.detach().contiguous())
    for other in results[1:]:
        assert torch.allclose(results[0], other, rtol=1e-5, atol=1e-6)


@on_every_path
def test_model_may_change_layout_between_steps(path):
    model, reference = network(), network()
    optimizer, steady = SP(model.parameters(), **PRUNED, **path), SP(reference.parameters(), **PRUNED, **path)
    train(model, optimizer, 6)
    model.to(memory_format=torch.channels_last)
    train(model, optimizer, 6, first=6)
    train(reference, steady, 12)
    assert torch.allclose(weights(model), weights(reference), rtol=1e-4, atol=1e-5)


@on_every_path
def test_blocks_are_invisible(monkeypatch, path):
    """A tensor cut into blocks is stepped as a whole one is."""
    from sp_yolo.optim import update

    results = []
    for size in (1 << 18, 50):
        monkeypatch.setattr(update, "BLOCK", size)
        model = network()
        train(model, SP(model.parameters(), **PRUNED, **path), 12)
        results.append(weights(model))
    assert torch.allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_native_path_says_so_and_falls_back(monkeypatch):
    """Without a compiler the torch path runs, silently; bf16 and the diagonal are torch's too."""
    from sp_yolo.optim import native

    def path_of(dtype=torch.float32, **settings):
        model = network(dtype)
        optimizer = SP(model.parameters(), compile=True, **settings)
        assert optimizer.path == "none"
        train(model, optimizer, 2)
        return optimizer.path

    assert path_of() == "native"
    assert path_of(torch.bfloat16) == path_of(damping="diagonal") == "single-tensor"
    assert path_of(mode="paper") == "single-tensor" and path_of(foreach=True) == "multi-tensor"
    for compiler in ("/nonexistent/cc", "false"):
        monkeypatch.setenv("CC", compiler)
        native.library.cache_clear()
        assert path_of(sigma=0.5, every=1) == "single-tensor"
    native.library.cache_clear()


def test_native_threads_share_out_the_work(monkeypatch):
    from sp_yolo.optim import native

    monkeypatch.setattr(native, "SHARE", 64)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        model = network()
        train(model, SP(model.parameters(), compile=True, **PRUNED), 10)
        results.append(weights(model))
    torch.set_num_threads(threads)
    assert torch.allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


@on_every_path
def test_low_precision_parameters_have_float32_state(path):
    model = network(torch.bfloat16)
    optimizer = SP(model.parameters(), sigma=0.5, every=2, **path)
    train(model, optimizer, 4)
    state = optimizer.state[next(model.parameters())]
    assert {state[n].dtype for n in ("momentum_buffer", "displacement", "square_avg")} == {torch.float32}
    before = weights(model).float()
    train(model, optimizer, 1, first=4)  # s is the rounded difference of the bf16 parameters
    s = torch.cat([optimizer.state[p]["displacement"].flatten() for p in model.parameters()])
    assert float(s.abs().max()) == 0.0 or torch.equal(s, weights(model).float() - before)


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


def state_bytes(optimizer):
    return sum(
        v.numel() * v.element_size() if isinstance(v, torch.Tensor) else 8
        for state in optimizer.state_dict()["state"].values()
        for v in state.values()
    )


@on_every_path
def test_memory(path):
    """Dense: AdamW's two floats per parameter and a few scalars per tensor. Pruning adds E[g^2] and a mask of bytes."""
    model = network()
    n, tensors = weights(model).numel(), len(list(model.parameters()))
    prunable = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    dense = SP(model.parameters(), **path)
    train(model, dense, 3)
    assert state_bytes(dense) <= 8 * n + 32 * tensors + 64
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, 1)
    assert state_bytes(dense) <= state_bytes(adamw) + 32 * tensors + 64
    for kind, extra in (("fisher", 5), ("damping", 1)):
        pruned = SP(model.parameters(), sigma=0.5, every=1, saliency=kind, **path)
        train(model, pruned, 3)
        assert state_bytes(pruned) == state_bytes(dense) + extra * prunable


def test_import_needs_torch_only():
    code = (
        "import sys; from sp_yolo.optim import SP; "
        "print([m for m in ('cv2', 'pycocotools', 'torchvision', 'yaml', 'sp_yolo.models') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


if torch.cuda.is_available():

    def test_no_host_synchronisation_on_cuda():
        model = network().cuda()
        optimizer = SP(model.parameters(), sigma=0.5, every=2)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
