"""SP's paths beside each other: dtypes, memory layouts, blocks, threads, native code, memory, CUDA."""

import subprocess
import sys

import pytest
import torch
from sp_training import PRUNED, in_both_metrics, network, on_every_path, train, weights, wide_network
from torch import nn

from sp_yolo.optim import SP, native, update
from sp_yolo.optim.batch import like_parameter


@on_every_path
def test_mixed_dtypes_in_one_group_decay_once(path):
    """Zero gradients: only the decay moves x. A multi-tensor optimizer may apply it once per dtype."""
    params = [nn.Parameter(torch.ones(8, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16)]
    optimizer = SP(params, lr=0.1, weight_decay=5.0, **path)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = pytest.approx(1 - 0.1 * float(optimizer.param_groups[0]["gamma"]) * 5.0)
    low = pytest.approx(expected.expected, rel=4e-3)
    assert expected.expected < 0.8 and [p[0].item() for p in params] == [expected, expected, low]


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
        optimizer = SP([p], sigma=0.4, every=2, **path)
        for k, g in enumerate(grads):
            p.grad = variants(g)[k % 2]
            optimizer.step()
        results.append(p.detach().contiguous())
    for other in results[1:]:
        assert torch.allclose(results[0], other, rtol=1e-5, atol=1e-6)


def test_a_dimension_of_one_element_is_no_reason_to_copy():
    """Of a 1 x 1 convolution in channels_last autograd may leave a gradient that names the same order otherwise."""
    param = torch.randn(4, 6, 1, 1).to(memory_format=torch.channels_last)
    grad = torch.randn(4, 6, 1, 1)
    assert grad.stride() != param.stride()
    same = like_parameter(grad, param)
    assert same.data_ptr() == grad.data_ptr() and same.stride() == param.stride() and torch.equal(same, grad)
    other = torch.randn(6, 4, 1, 1).transpose(0, 1)
    assert like_parameter(other, param).data_ptr() != other.data_ptr()
    assert torch.equal(like_parameter(other, param), other)


def test_triton_is_left_alone_on_a_cpu():
    code = (
        "import sys, torch; from sp_yolo.optim import SP; p = torch.nn.Parameter(torch.ones(3)); p.grad = p.detach()\n"
        "for how in ({}, {'foreach': True}, {'capturable': True}): SP([p], **how).step()\n"
        "print([name for name in sys.modules if name.startswith('sp_yolo.optim.triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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


def test_the_path_of_the_last_step_has_a_name():
    def path_of(dtype=torch.float32, **settings):
        model = network(dtype)
        optimizer = SP(model.parameters(), **settings)
        assert optimizer.path == "none"
        train(model, optimizer, 2)
        return optimizer.path

    assert {path_of(), path_of(native=True), path_of(metric="none"), path_of(sigma=0.5, every=1)} == {"native"}
    assert {path_of(native=False), path_of(torch.bfloat16), path_of(torch.float64)} == {"single-tensor"}
    assert path_of(mode="paper") == "single-tensor"
    assert {path_of(foreach=True), path_of(capturable=True)} == {"multi-tensor"}


@pytest.mark.parametrize("model", [network, wide_network])
@in_both_metrics
def test_native_threads_share_out_the_work(monkeypatch, metric, model):
    monkeypatch.setattr(native, "SHARE", 64)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        trained = model()
        train(trained, SP(trained.parameters(), native=True, metric=metric, **PRUNED), 10)
        results.append(weights(trained))
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


@in_both_metrics
def test_stepping_tensors_together_is_invisible(monkeypatch, metric):
    """All at once, or a few elements of each by themselves."""
    results = []
    for size in (1 << 18, 7):
        monkeypatch.setattr(update, "BLOCK", size)
        model = network()
        groups = [{"params": [p], "weight_decay": 0.01 * i} for i, p in enumerate(model.parameters())]
        optimizer = SP(groups, maximize=True, metric=metric, native=False)
        train(model, optimizer, 12)
        model[0].bias.requires_grad_(False)
        train(model, optimizer, 3)
        secants = torch.cat([optimizer.state[p]["secant"] for p in model.parameters()])
        results.append((weights(model), secants))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-7)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("torch_has", ["none", "another signature", "another meaning"])
def test_without_adamw_s_private_kernel_the_step_is_the_same(monkeypatch, torch_has):
    def other(*args, **settings):
        if torch_has == "another signature":
            raise TypeError("unexpected keyword")

    results = []
    for missing in (False, True):
        if missing:
            monkeypatch.setattr(torch, "_fused_adamw_", other)
            if torch_has == "none":
                monkeypatch.delattr(torch, "_fused_adamw_")
        update.has_fused_adamw.cache_clear()
        model = network()
        train(model, SP(model.parameters(), native=False), 8)
        assert update.has_fused_adamw() is not missing
        results.append(weights(model))
    update.has_fused_adamw.cache_clear()
    assert torch.allclose(*results, rtol=1e-5, atol=1e-7)
