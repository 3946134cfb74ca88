"""SP's paths beside each other: dtypes, memory layouts, blocks, threads, native code, memory, CUDA."""

import pytest
import torch
from sp_training import PRUNED, network, on_every_path, train, weights
from torch import nn

from sp_yolo.optim import SP, native, update


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
    results = []
    for size in (1 << 18, 50):
        monkeypatch.setattr(update, "BLOCK", size)
        model = network()
        train(model, SP(model.parameters(), **PRUNED, **path), 12)
        results.append(weights(model))
    assert torch.allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_native_path_says_so_and_falls_back(monkeypatch):
    """Without a compiler the torch path runs, silently; bf16 and the diagonal are torch's too."""

    def path_of(dtype=torch.float32, **settings):
        model = network(dtype)
        optimizer = SP(model.parameters(), compile=True, **settings)
        assert optimizer.path == "none"
        train(model, optimizer, 2)
        return optimizer.path

    assert path_of() == path_of(damping="fisher") == "native"
    assert path_of(torch.bfloat16) == path_of(damping="diagonal") == "single-tensor"
    assert path_of(mode="paper") == "single-tensor" and path_of(foreach=True) == "multi-tensor"
    for compiler in ("/nonexistent/cc", "false"):
        monkeypatch.setenv("CC", compiler)
        native.library.cache_clear()
        assert path_of(sigma=0.5, every=1) == "single-tensor"
    native.library.cache_clear()


@pytest.mark.parametrize("damping", ["none", "fisher"])
def test_native_threads_share_out_the_work(monkeypatch, damping):
    monkeypatch.setattr(native, "SHARE", 64)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        model = network()
        train(model, SP(model.parameters(), compile=True, damping=damping, **PRUNED), 10)
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


def test_packing_small_vectors_is_invisible(monkeypatch):
    results = []
    for size in (0, 1 << 12):
        monkeypatch.setattr(update, "SMALL", size)
        model = network()
        optimizer = SP(model.parameters(), maximize=True, decoupled=True, lr=1e-2)
        train(model, optimizer, 12)
        model[0].bias.requires_grad_(False)
        train(model, optimizer, 3)
        carried = [optimizer.state[p][name] for p in model.parameters() for name in update.CARRIED]
        results.append(torch.cat([weights(model), torch.tensor(carried)]))
    assert torch.allclose(results[0], results[1], rtol=1e-5, atol=1e-7)


def state_bytes(optimizer):
    return sum(
        v.numel() * v.element_size() if isinstance(v, torch.Tensor) else 8
        for state in optimizer.state_dict()["state"].values()
        for v in state.values()
    )


@on_every_path
def test_memory(path):
    """Dense: AdamW's two floats per parameter and a few scalars per tensor. Pruning adds E[g^2] and a mask;
    the Fisher metric adds E[g^2]."""
    model = network()
    n, tensors = weights(model).numel(), len(list(model.parameters()))
    prunable = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    dense = SP(model.parameters(), **path)
    train(model, dense, 3)
    assert state_bytes(dense) <= 8 * n + 32 * tensors + 64
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, 1)
    assert state_bytes(dense) <= state_bytes(adamw) + 32 * tensors + 64
    metric = SP(model.parameters(), damping="fisher", lr=1e-3, **path)
    train(model, metric, 3)
    assert state_bytes(metric) == state_bytes(dense) + 4 * n + 8 * tensors
    for kind, extra in (("fisher", 5), ("damping", 1)):
        pruned = SP(model.parameters(), sigma=0.5, every=1, saliency=kind, **path)
        train(model, pruned, 3)
        assert state_bytes(pruned) == state_bytes(dense) + extra * prunable


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
