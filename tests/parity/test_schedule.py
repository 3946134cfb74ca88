"""The original trainer's own log of 1300 iterations, and of 50 EMA steps, against our pure functions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sp_yolo.config import Recipe
from sp_yolo.engine.ema import ModelEma
from sp_yolo.engine.schedule import Schedule, fit_to_run

ORACLE = Path(__file__).parent / "oracle"


@pytest.mark.parametrize("kind", ["cos", "lin"])
def test_compat_schedule_equals_the_original(kind: str) -> None:
    oracle = np.load(ORACLE / "schedule.npz")
    hyp = {"nominal_batch": "auto", "warmup_epochs": 3.0, "weight_decay": 5e-4, "ema_decay": "auto", "ema_ramp": "auto"}
    length = fit_to_run(Recipe.of(hyp), epochs=13, batches_per_epoch=100, batch_size=4, compat=True)
    assert (length.nominal_batch, length.warmup, length.weight_decay) == (64, 1000, 5e-4)
    schedule = Schedule(13, 100, 4, 64, length.warmup, 0.1, 0.937, 0.8, 0.1, linear=kind == "lin", compat=True)
    updates = 0
    for step in range(1300):
        plan = schedule.at(step, {"backbone": 0.01, "bias": 0.01, "norm": 0.01})
        assert plan.accumulate == oracle[f"{kind}_accumulate"][step]
        assert plan.lr["backbone"] == pytest.approx(oracle[f"{kind}_lr_weights"][step], rel=1e-9, abs=1e-15)
        assert plan.lr["norm"] == pytest.approx(oracle[f"{kind}_lr_other"][step], rel=1e-9, abs=1e-15)
        assert plan.lr["bias"] == pytest.approx(oracle[f"{kind}_lr_biases"][step], rel=1e-9)
        assert plan.momentum == pytest.approx(oracle[f"{kind}_momentum_weights"][step], rel=1e-9)
        assert updates == oracle[f"{kind}_ema_updates_before"][step]
        updates += plan.update


def test_ema_equals_the_original() -> None:
    oracle = np.load(ORACLE / "ema.npz")
    trace = oracle[next(name for name in oracle.files if oracle[name].shape == (50, 6))]

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))
            self.register_buffer("r", torch.ones(2))
            self.register_buffer("n", torch.zeros((), dtype=torch.int64))

    model = Toy()
    ema = ModelEma(model)
    for step in range(50):
        with torch.no_grad():
            model.w.copy_(torch.tensor([1.0, 0.1 * step, -float(step)]))
            model.r.mul_(1.01)
            model.n.add_(1)
        ema.update(model)
        state = ema.module.state_dict()
        got = np.concatenate([state["w"].numpy(), state["r"].numpy(), [float(state["n"])]])
        np.testing.assert_allclose(got, trace[step], rtol=2e-6, atol=1e-9)
