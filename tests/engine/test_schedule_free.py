"""Schedule-Free optimizers: the averaged weights are measured and saved, with BatchNorm statistics of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.launcher import OPTIONS
from torch import nn

from sp_yolo.config import load_config
from sp_yolo.engine import Trainer
from sp_yolo.engine.schedule_free import is_schedule_free, recompute_statistics, trained_weights
from sp_yolo.experiments.classify import fit, load_classify_config, make_splits, open_source
from sp_yolo.runtime.checkpoint import load_checkpoint

NAME = "schedulefree:AdamWScheduleFree"


def test_statistics_are_the_means_over_the_batches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    batches = [torch.randn(5, 3, 6, 6) * (i + 1) + i for i in range(3)]
    recompute_statistics(model, batches)
    maps = [model[0](batch) for batch in batches]
    means = torch.stack([each.mean((0, 2, 3)) for each in maps]).mean(0)
    variances = torch.stack([each.transpose(0, 1).flatten(1).var(1) for each in maps]).mean(0)
    assert torch.allclose(model[1].running_mean, means, atol=1e-5)
    assert torch.allclose(model[1].running_var, variances, rtol=1e-5)
    assert model[1].momentum == 0.1 and model.training and model[2].training
    model.eval()
    recompute_statistics(model, batches)
    assert not model[1].training


def test_the_average_is_in_place_for_a_while() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = schedulefree.AdamWScheduleFree([x], lr=0.1)
    optimizer.train()
    points = []
    for _ in range(3):
        x.grad = torch.tensor([1.0])
        optimizer.step()
        points.append(optimizer.state[x]["z"].item())
    training = x.item()
    with trained_weights(optimizer):
        # Equal weights: Adam's steps of a constant gradient are all of length lr.
        assert x.item() == pytest.approx(sum(points) / 3, abs=1e-5)
    assert x.item() == training
    assert is_schedule_free(optimizer) and not is_schedule_free(torch.optim.SGD([x], 0.1))


def test_a_detector_run_goes_on_to_the_bit(toy_yaml: Path, mini_cfg: str, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    options = {**OPTIONS, "data": str(toy_yaml), "cfg": mini_cfg, "epochs": 3}
    options |= {"optimizer": NAME, "noplots": True, "project": str(tmp_path)}
    trainer = Trainer(load_config(**options, name="whole"))
    rates = set()
    step = trainer.run.step

    def watched(batch: object) -> bool:
        updated = step(batch)  # type: ignore[arg-type]
        rates.add((trainer.run.state.progress.iteration, trainer.run.state.optimizer.param_groups[0]["lr"]))
        return updated

    watched.settings, watched.watch = step.settings, step.watch  # type: ignore[attr-defined]
    trainer.run.step = watched  # type: ignore[assignment]
    summary = trainer.fit()
    assert {lr for iteration, lr in rates if iteration > 5} == {0.0025}  # no decay; the class's own rate
    whole = load_checkpoint(tmp_path / "whole" / "weights" / "last.pt")
    state = trainer.run.state
    with trained_weights(state.optimizer):
        for name, value in state.model.named_parameters():
            assert torch.equal(whole["ema"][name], value), name
    mean = next(name for name in whole["ema"] if name.endswith("running_mean"))
    assert not torch.equal(whole["ema"][mean], whole["model"][mean])
    assert summary["best"]["epoch"] == summary["final"]["epoch"] or summary["best"]["map50"] > 0
    assert not list((tmp_path / "whole").glob("*.png")) and not (tmp_path / "whole" / "report.html").exists()

    Trainer(load_config(**options, name="part", save_period=1)).fit()
    (tmp_path / "part" / "weights" / "last.pt").write_bytes(
        (tmp_path / "part" / "weights" / "epoch_000.pt").read_bytes()
    )
    (tmp_path / "part" / "summary.json").unlink()
    Trainer(load_config(resume=str(tmp_path / "part"), device="cpu", workers=0, quiet=True)).fit()
    resumed = load_checkpoint(tmp_path / "part" / "weights" / "last.pt")
    for kind in ("model", "ema"):
        for name, value in whole[kind].items():
            assert torch.equal(resumed[kind][name], value), (kind, name)


def test_a_classifier() -> None:
    pytest.importorskip("schedulefree")
    config = load_classify_config(
        dataset="toy", image_size=24, samples=200, epochs=5, model="cnn-bn", optimizer=NAME, augment=False
    )
    outcome = fit(config, make_splits(open_source("toy", image_size=24), samples=200))
    assert outcome.summary["test_accuracy"] > 0.8
    assert {record["lr"]["head"] for record in outcome.epochs} == {0.0025}
