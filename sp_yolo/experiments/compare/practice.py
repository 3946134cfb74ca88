"""What a user of an optimizer meets: how long it takes, what the seed decides, how well its rate has to be chosen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sp_yolo.experiments.compare.study import Study, Variant

Result = Mapping[str, Any]
NEAR, DECADES = 0.9, 1.0  # share of the best score; from the best rate to each side


@dataclass(frozen=True)
class Practice:
    """Of one variant. NaN: was not measured.

    ``deviation``: standard deviation over the seeds; ``lowest``, ``highest``: of their scores. ``epochs``, ``seconds``:
    medians until the target, infinite where fewer than half of the runs reach it; ``reached`` of ``runs`` do.
    ``robust``: share of the trials within a decade to each side of the best rate that keep 90 % of the best score.
    """

    deviation: float
    lowest: float
    highest: float
    epochs: float
    seconds: float
    reached: int
    runs: int
    robust: float
    run_seconds: float
    peak_bytes: float
    optimizer_bytes: float


def practice(study: Study, tuning: Sequence[Result], final: Sequence[Result]) -> dict[str, Practice]:
    """The figures of each variant, from the results of a study's cells."""
    aim = target(study, final)
    return {variant.name: _of_variant(variant, tuning, final, aim) for variant in study.variants}


def target(study: Study, final: Sequence[Result]) -> float:
    """The mean score on the validation split of the baseline's finished runs."""
    return mean([r["val_score"] for r in final if r["variant"] == study.baseline])


def _of_variant(variant: Variant, tuning: Sequence[Result], final: Sequence[Result], aim: float) -> Practice:
    own = [r for r in final if r["variant"] == variant.name]
    scores = [float(r["score"]) for r in own]
    times = [epochs_to(r.get("curve") or (), aim) for r in own]
    seconds = [
        r.get("seconds", math.nan) * epochs / max(len(r.get("curve") or ()), 1)
        for r, epochs in zip(own, times, strict=True)
    ]
    followed = [time for time in times if not math.isnan(time)]
    return Practice(
        deviation=statistics.stdev(scores) if len(scores) > 1 else math.nan,
        lowest=min(scores, default=math.nan),
        highest=max(scores, default=math.nan),
        epochs=statistics.median(followed) if followed else math.nan,
        seconds=statistics.median(time for time in seconds if not math.isnan(time)) if followed else math.nan,
        reached=sum(time < math.inf for time in followed),
        runs=len(followed),
        robust=robustness(variant, tuning),
        run_seconds=mean([r["seconds"] for r in own if "seconds" in r]),
        peak_bytes=mean([r["peak_bytes"] for r in own if "peak_bytes" in r]),
        optimizer_bytes=mean([r["optimizer_bytes"] for r in own if "optimizer_bytes" in r]),
    )


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def epochs_to(curve: Sequence[float | None], aim: float) -> float:
    """The first epoch, from 1 on, whose score is ``aim`` or better; infinite where none is; NaN of a run that was
    measured once, after its last epoch."""
    measured = [(epoch, score) for epoch, score in enumerate(curve, 1) if score is not None and not math.isnan(score)]
    if len(measured) < 2:
        return math.nan
    return next((float(epoch) for epoch, score in measured if score >= aim), math.inf)


def robustness(variant: Variant, tuning: Sequence[Result]) -> float:
    """See :class:`Practice`; NaN where fewer than two rates were tried."""
    scores: dict[float, list[float]] = {}
    for trial in variant.trials:
        own = [float(r["score"]) for r in tuning if r["variant"] == variant.name and r["trial"] == dict(trial)]
        if own and "lr0" in dict(trial):
            scores.setdefault(dict(trial)["lr0"], []).append(mean(own))
    if len(scores) < 2:
        return math.nan
    best = max(score for each in scores.values() for score in each)
    rate = max(scores, key=lambda lr0: max(scores[lr0]))
    near = [score for lr0, each in scores.items() if abs(math.log10(lr0 / rate)) <= DECADES + 1e-9 for score in each]
    return sum(score >= NEAR * best for score in near) / len(near)
