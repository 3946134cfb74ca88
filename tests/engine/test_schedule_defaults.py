"""The schedule without compat: bounded warm-up, no lag, no thrown-away gradients, settings that fit the run."""

import pytest

from sp_yolo.config import Recipe
from sp_yolo.engine.schedule import Schedule, fit_to_run

AUTO = {"nominal_batch": "auto", "warmup_epochs": 3.0, "weight_decay": 5e-4, "ema_decay": "auto", "ema_ramp": "auto"}


def schedule(**changes: object) -> Schedule:
    values = {
        "epochs": 10, "batches_per_epoch": 7, "batch_size": 16, "nominal_batch": 64, "warmup": 14, "lrf": 0.1,
        "momentum": 0.9, "warmup_momentum": 0.5, "warmup_bias_lr": 0.2,
    }  # fmt: skip
    return Schedule(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("linear", [False, True])
def test_lr_starts_at_zero_peaks_after_warmup_and_reaches_its_end(linear: bool) -> None:
    course = schedule(linear=linear)
    lr = [course.at(step, {"head": 1.0, "bias": 1.0}).lr for step in range(course.iterations)]
    assert lr[0] == {"head": 0.0, "bias": 0.2}
    assert lr[-1]["head"] == pytest.approx(0.1)
    after = [entry["head"] for entry in lr[course.warmup :]]
    assert after == sorted(after, reverse=True) and len(set(after)) == len(after)
    assert max(entry["head"] for entry in lr) == lr[course.warmup]["head"]


def test_every_batch_of_an_epoch_is_stepped_on() -> None:
    course = schedule(warmup=0)
    plans = [course.at(step, {"head": 1.0}) for step in range(course.iterations)]
    assert [plan.update for plan in plans[:7]] == [False, False, False, True, False, False, True]
    assert course.updates() == sum(plan.update for plan in plans) == 20


def test_momentum_and_accumulation_ramp_up() -> None:
    course = schedule()
    assert course.at(0, {}).momentum == 0.5 and course.at(14, {}).momentum == 0.9
    assert [course.accumulate(step) for step in (0, 7, 13, 14)] == [1, 2, 4, 4]


@pytest.mark.parametrize(
    ("epochs", "batches", "batch", "nominal", "warmup"),
    [
        (30, 13, 16, 16, 39),  # 205 images: every batch steps, three epochs of warm-up
        (5, 13, 16, 16, 13),  # a short run: a fifth of it
        (300, 7393, 16, 64, 22179),  # COCO: as in the original
        (100, 100, 16, 16, 1000),  # the floor of 1000 iterations, a tenth of the run
        (1, 4, 16, 16, 1),
    ],
)
def test_settings_fit_the_run(epochs: int, batches: int, batch: int, nominal: int, warmup: int) -> None:
    length = fit_to_run(Recipe.of(AUTO), epochs=epochs, batches_per_epoch=batches, batch_size=batch, compat=False)
    assert (length.nominal_batch, length.warmup) == (nominal, warmup)
    assert length.weight_decay == pytest.approx(5e-4)
    assert 0 <= length.ema_decay <= 0.9999 and 1 <= length.ema_ramp <= 2000


def test_long_runs_get_the_originals_ema_and_given_values_win() -> None:
    long = fit_to_run(Recipe.of(AUTO), epochs=300, batches_per_epoch=7393, batch_size=16, compat=False)
    assert (long.ema_decay, long.ema_ramp, long.average_buffers) == (0.9999, 2000, True)
    given = {**AUTO, "nominal_batch": 32, "ema_decay": 0.5, "ema_ramp": 7.0, "warmup_epochs": 0.0}
    length = fit_to_run(Recipe.of(given), epochs=30, batches_per_epoch=13, batch_size=24, compat=False)
    assert (length.nominal_batch, length.ema_decay, length.ema_ramp, length.warmup) == (32, 0.5, 7.0, 0)
    assert length.weight_decay == pytest.approx(5e-4 * 24 / 32)
    run = {"batches_per_epoch": 13, "batch_size": 16}
    for epochs, compat, averaged in ((23, False, False), (24, False, True), (1, True, True)):  # 299 and 312 steps
        assert fit_to_run(Recipe.of(AUTO), epochs=epochs, **run, compat=compat).average_buffers is averaged
