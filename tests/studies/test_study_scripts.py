"""The scripts in studies/ measure what they say: checked against SP itself, a known Hessian, the whole network."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sp_yolo.config import OptimizerRecipe
from sp_yolo.experiments.classify import build_classifier, fit, load_classify_config, make_splits, open_source

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module


def test_the_fisher_form_prunes_what_sp_prunes(script: Any) -> None:
    saliency = script("saliency")
    overrides = {"lr0": 0.1, "weight_decay": 5e-4, "sp_sigma_backbone": 0.9, "sp_sigma_head": 0.9, "sp_metric": "none"}
    config = load_classify_config(dataset="toy", image_size=24, samples=200, epochs=4, overrides=overrides)
    splits = make_splits(open_source("toy", image_size=24), samples=200)
    found = {}

    def make(model: nn.Module, recipe: OptimizerRecipe, steps: int, form: str) -> Any:
        groups = saliency.build_param_groups(model, weight_decay=5e-4, sigma_backbone=0.9, sigma_head=0.9)
        return saliency.WeighedSP(groups, form, lr=0.1, total_steps=steps, metric="none", decoupled=False)

    for form in ("E[g²], decay 0.95 (Fisher)", "magnitude, h = 1"):
        outcome = fit(config, splits, make_optimizer=lambda *given, form=form: make(*given, form))
        found[form] = torch.cat([p.detach().flatten() == 0 for p in outcome.model.parameters() if p.ndim >= 2])
    own = torch.cat([p.detach().flatten() == 0 for p in fit(config, splits).model.parameters() if p.ndim >= 2])
    fisher, magnitude = ((zeros == own).float().mean().item() for zeros in found.values())
    assert 0.85 < own.float().mean() < 0.9
    assert fisher > 0.9995 and magnitude < 0.98


def test_the_averaged_secant_is_the_hessian_of_a_quadratic(script: Any) -> None:
    saliency = script("saliency")
    hessian = torch.rand(4, 5) + 0.5
    x = nn.Parameter(torch.randn(4, 5))
    group = {"params": [x], "sigma": 0.5, "name": "w"}
    optimizer = saliency.WeighedSP(
        [group], "abs E[sy] / E[s²] (averaged secant)", lr=0.05, weight_decay=0.0, end=1.0, metric="none"
    )
    optimizer.param_groups[0].update(start=1.0, total_steps=1000)  # no proximal step in what follows
    for _ in range(30):
        optimizer.zero_grad()
        (0.5 * hessian * x * x).sum().backward()
        optimizer.step()
    assert torch.allclose(optimizer.form(x, optimizer.averages[x]), hessian, rtol=1e-3)


def test_cutting_dead_channels_changes_nothing(script: Any) -> None:
    channels = script("channels")
    model = build_classifier("cnn", 6, (3, 16, 16)).eval()
    kept = [torch.arange(0, 16, 2), torch.arange(5, 32), torch.arange(10)]
    with torch.no_grad():
        for layer, alive in zip(channels.layers_of(model), kept, strict=False):
            dead = torch.ones(len(layer.weight), dtype=torch.bool).index_fill_(0, alive, False)
            layer.weight[dead], layer.bias[dead] = 0.0, 0.0
    small = channels.cut(model, kept)
    assert [tuple(layer.weight.shape[:2]) for layer in channels.layers_of(small)] == [
        (8, 3),
        (27, 8),
        (10, 432),
        (6, 10),
    ]
    images = torch.randn(5, 3, 16, 16)
    assert torch.allclose(small(images), model(images), atol=1e-5)
    kept[0] = torch.arange(1, 16, 2)
    assert not torch.allclose(channels.cut(model, kept)(images), model(images), atol=1e-2)


def test_pairs_of_one_batch(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    same_batch = script("same_batch")
    monkeypatch.setattr(same_batch, "EPOCHS", 3)
    splits = make_splits(open_source("toy", image_size=24), samples=200)
    seen = []
    real = same_batch.newton_damping
    monkeypatch.setattr(same_batch, "newton_damping", lambda s, sy: seen.append((s, sy)) or real(s, sy))
    plain = same_batch.train(splits, "D = 1 (SGD-Nesterov)", 0.03, 0)
    assert not seen and same_batch.accuracy(plain, splits, "train") > 0.4
    same_batch.train(splits, "pair every 10 steps, sigma 0", 0.003, 0)
    assert len(seen) == 2 * len(list(plain.parameters()))  # 12 steps
    r = sum(float(sy) for _, sy in seen) / sum(float((s * s).sum()) for s, _ in seen)
    assert abs(r) < 20  # curvature; of batches that differ, noise alone gives 0.27 / lr = 90
    assert same_batch.accuracy(None, splits, "test") == pytest.approx(1 / 6)


def test_the_table(script: Any, capsys: Any) -> None:
    script("paired").paired_table(_number, ["a", "b"], 3, 1)
    out = capsys.readouterr().out.splitlines()
    # a: 10, 11, 12; b - a: 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(2) = 4.30265
    assert out[2] == "| a | 11.00 ± 2.48 |  | 1.000 |" and out[3].startswith("| b | 13.00 ± 4.97 | +2.00 ± 2.48 | 0.07")


def _number(row: str, seed: int) -> float:
    return (10 + seed) / 100 if row == "a" else (11 + 2 * seed) / 100


def test_every_part_trains(script: Any) -> None:
    parts = script("parts")
    options = {"dataset": "toy", "samples": 200, "image_size": 24, "epochs": 12}
    scores = [parts.accuracy(options, "val", 0, row, 0.01) for row in parts.ROWS]
    assert min(scores) > 0.4 and len(set(scores)) > 1  # chance is 1/6
