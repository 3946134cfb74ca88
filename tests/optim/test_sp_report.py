"""saliency_report from an optimizer, a checkpoint file and bare weights."""

import pytest
import torch
from torch import nn

from sp_yolo.optim import SP, build_param_groups, saliency_report


def trained(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = SP(build_param_groups(model, sigma_backbone=0.5), total_steps=20, every=2, **settings)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_from_the_optimizer():
    model, optimizer = trained()
    report = saliency_report(optimizer)
    tensor = next(t for t in report.tensors if t.name == "2.weight")
    x = model[2].weight.detach()
    kept = (0.5 * optimizer.state[model[2].weight]["square_avg"] * x**2)[x != 0]
    assert (tensor.zeros, tensor.numel, tensor.group, tensor.prunable) == (32, 64, "backbone", True)
    assert tensor.quantiles == pytest.approx(torch.quantile(kept, torch.tensor([0, 0.25, 0.5, 0.75, 1.0])).tolist())
    groups = {g.name: g for g in report.groups}
    assert (groups["backbone"].zeros, groups["backbone"].numel, groups["backbone"].sigma) == (32, 64, 0.5)
    assert groups["backbone"].threshold > 0 and groups["bias"].threshold is None and groups["bias"].numel == 0
    assert "2.weight" in str(report) and "zeros 50.00% of 64" in str(report)


def test_checkpoint_file_says_the_same(tmp_path):
    model, optimizer = trained()
    path = tmp_path / "last.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    assert saliency_report(path) == saliency_report(optimizer)
    assert any(t.metric[0] < t.metric[1] for t in saliency_report(path).tensors)


def test_the_metric_is_reported():
    model, optimizer = trained(lr=1e-3, saliency="metric")
    tensor = next(t for t in saliency_report(optimizer).tensors if t.name == "2.weight")
    x, h = model[2].weight.detach(), optimizer.state[model[2].weight]["square_avg"]
    metric = (h.sqrt() + 1e-8) / 0.1
    assert tensor.metric == pytest.approx((float((1 / metric).min()), float((1 / metric).max())))
    kept = (0.5 * metric * x**2)[x != 0]
    assert tensor.quantiles == pytest.approx(torch.quantile(kept, torch.tensor([0, 0.25, 0.5, 0.75, 1.0])).tolist())


def test_without_a_metric_the_saliency_is_the_magnitude():
    model, optimizer = trained(metric="none", saliency="metric")
    tensor = next(t for t in saliency_report(optimizer).tensors if t.name == "2.weight")
    assert tensor.metric == (1.0, 1.0)
    assert tensor.quantiles[4] == pytest.approx(0.5 * model[2].weight.abs().max().item() ** 2)


def test_bare_weights_by_magnitude():
    model, _ = trained()
    report = saliency_report(model.state_dict())
    assert report == saliency_report(model)
    tensor = next(t for t in report.tensors if t.name == "2.weight")
    assert tensor.quantiles[4] == pytest.approx(0.5 * model[2].weight.abs().max().item() ** 2)
    assert tensor.zeros == 32


def test_collapsed_layers_are_named():
    model, optimizer = trained()
    with torch.no_grad():
        model[2].weight[1].zero_()
    (warning,) = [w for w in saliency_report(optimizer).warnings if "channels" in w]
    assert warning.startswith("2.weight: ") and "of 8 output channels" in warning
    with torch.no_grad():
        model[2].weight.zero_()
    assert saliency_report(optimizer).warnings == ["2.weight has collapsed: 0 of 64 weights are left"]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        saliency_report({"epoch": 3})
    model, optimizer = trained()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]
    with pytest.raises(ValueError, match="param_names"):
        saliency_report({"model": model.state_dict(), "optimizer": saved})


def test_a_file_is_not_read_by_a_torch_whose_reader_runs_code(monkeypatch, tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "weights.pt")
    assert saliency_report(tmp_path / "weights.pt").tensors
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(RuntimeError, match=r"2\.10 or newer"):
        saliency_report(tmp_path / "weights.pt")
