"""From the results of a study's cells to its Markdown table, its CSV and its plots."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sp_yolo import __version__
from sp_yolo.experiments.compare.execute import commit
from sp_yolo.experiments.compare.practice import practice
from sp_yolo.experiments.compare.store import csv_text
from sp_yolo.experiments.compare.study import Study, Variant
from sp_yolo.experiments.compare.trials import Trial, space_text, trial_text
from sp_yolo.experiments.statistics import holm, mean_interval, paired_test
from sp_yolo.report.lines import draw_lines
from sp_yolo.runtime.folder import RunDir

Result = Mapping[str, Any]
METRIC = {"classify": "accuracy, %", "detect": "mAP@.5:.95, %"}


def choose(study: Study, tuning: Sequence[Result]) -> dict[str, Trial]:
    """What each variant is measured with: the best mean on the validation split; the smaller lr0 of equals."""
    chosen = {}
    for variant in study.variants:
        means = {trial: _mean(scores_of(tuning, variant, trial)) for trial in sorted(variant.trials)}
        chosen[variant.name] = max(means, key=lambda trial: means[trial]) if len(means) > 1 else variant.trials[0]
    return chosen


def scores_of(results: Sequence[Result], variant: Variant, trial: Trial | None = None) -> list[float]:
    """Scores of a variant's cells, in the order of the seeds."""
    own = [r for r in results if r["variant"] == variant.name and (trial is None or r["trial"] == dict(trial))]
    return [float(r["score"]) for r in sorted(own, key=lambda r: r["seed"])]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def write_report(
    study: Study, tuning: Sequence[Result], final: Sequence[Result], folder: Path, command: str
) -> list[str]:
    """Write report.md, cells.csv, curves.png, losses.png, lr.png; returns the lines of the Markdown table.

    Raises:
        EnvironmentFault: matplotlib is missing (the table and the CSV are written by then).
    """
    lines = [
        f"# {study.name}",
        "",
        _heading(study, command),
        "",
        *final_table(study, tuning, final),
        "",
    ]
    lines += ["Seeds, time and memory:", "", *practice_table(study, tuning, final), ""]
    if tuning:
        lines += [
            "Trials on the validation split "
            f"({METRIC[study.task]}, mean of {study.tuning_seeds}; * failed runs among them; the best in bold):",
            "",
            *grid_table(study, tuning),
            "",
            *(f"{variant.name}: {space_text(variant.space)}." for variant in study.variants if variant.space),
            "",
        ]
    run = RunDir(folder)
    run.write("report.md", "\n".join(lines))
    run.write("cells.csv", csv_text([*tuning, *final]))
    _draw(study, tuning, final, folder)
    return lines


def _heading(study: Study, command: str) -> str:
    settings = {**study.options, **study.overrides}
    options = ", ".join(f"{k} {'(layers)' if isinstance(v, Mapping) else v}" for k, v in settings.items())
    trials, seeds = len(study.variants[0].trials), _seeds(study.seeds)
    tuned = (
        f"Every optimizer as it comes; {seeds}" if study.tuning.how == "none" else f"Learning rates as given; {seeds}"
    )
    if trials > 1:
        tuned = (
            f"Every variant was tuned alike ({_trials(study)} x {_seeds(study.tuning_seeds)} on the validation "
            f"split); then {seeds} of their own"
        )
    return (
        f"`{command}`\n\n"
        f"{study.task}: {options}. {tuned} on the test split, the same initial weights, images and order for all "
        "variants of a seed. ± is the half-width of the 95 % confidence interval (Student's t); p is of the paired t "
        f"test against {study.baseline}, adjusted for {len(study.variants) - 1} comparisons (Holm). {provenance()}"
    )


def _trials(study: Study) -> str:
    count = len(study.variants[0].trials)
    if study.tuning.how == "grid":
        only_rates = all(key == "lr0" for variant in study.variants for trial in variant.trials for key, _ in trial)
        return f"{count} learning rates" if only_rates else f"a grid of {count} trials"
    return f"{count} trials, {study.tuning.how} from a stated space"


def provenance() -> str:
    """Commit, versions, machine, date."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return (
        f"sp-yolo {__version__}, commit {commit()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{_machine()}, {today}."
    )


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --------------------------------------------------------------------------------------------------------------- tables
def final_table(study: Study, tuning: Sequence[Result], final: Sequence[Result]) -> list[str]:
    """One row per variant: score, paired difference, gap, zeros, time, memory, failed runs."""
    header = (
        *("variant", "chosen", f"test {METRIC[study.task]}", f"minus {study.baseline}", "p", "train minus test"),
        *("zeros, %", "seconds", "optimizer MB", "failed runs, grid", "failed runs, final"),
    )
    baseline = next(variant for variant in study.variants if variant.name == study.baseline)
    others = [variant for variant in study.variants if variant is not baseline]
    tests = {v.name: paired_test(scores_of(final, v), scores_of(final, baseline)) for v in others}
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    rows = []
    for variant in study.variants:
        own = [r for r in final if r["variant"] == variant.name]
        tried = [r for r in tuning if r["variant"] == variant.name]
        compared = ("", "")
        if variant is not baseline:
            difference = tests[variant.name].difference
            compared = (difference.text(100, 2, "+"), p_text(adjusted[variant.name]))
        gaps = [r["train_score"] - r["score"] for r in own if "train_score" in r]
        rows.append(
            (
                variant.name,
                _chosen(variant, own[0]),
                mean_interval(scores_of(final, variant)).text(100, 2),
                *compared,
                mean_interval(gaps).text(100, 2, "+") if gaps else "",
                _average(own, "zeros", 100, 1),
                _average(own, "seconds", 1, 1),
                _average(own, "optimizer_bytes", 1e-6, 2),
                f"{sum(r['failed'] for r in tried)} of {len(tried)}",
                f"{sum(r['failed'] for r in own)} of {len(own)}",
            )
        )
    return markdown(header, rows)


def practice_table(study: Study, tuning: Sequence[Result], final: Sequence[Result]) -> list[str]:
    """One row per variant: what a user of it meets (:class:`sp_yolo.experiments.compare.practice.Practice`)."""
    rows = []
    for name, own in practice(study, tuning, final).items():
        rows.append(
            (
                name,
                _number(own.deviation, 100, 2),
                f"{100 * own.lowest:.1f} to {100 * own.highest:.1f}",
                _number(own.epochs, 1, 0),
                _number(own.seconds, 1, 1),
                f"{own.reached} of {own.runs}" if own.runs else "",
                _number(own.peak_bytes, 1e-6, 0),
                _number(own.robust, 100, 0),
            )
        )
    header = (
        *("variant", "standard deviation over seeds", "lowest to highest", f"epochs to {study.baseline}'s final score"),
        *("seconds to it", "runs that reach it", "peak MB", "rates over two decades that keep 90 %, %"),
    )
    return markdown(header, rows)


def _number(value: float, scale: float, digits: int) -> str:
    return "" if math.isnan(value) else "never" if math.isinf(value) else f"{scale * value:.{digits}f}"


def _chosen(variant: Variant, result: Result) -> str:
    """What a variant was measured with, "(edge)" where the rate is the smallest or largest that was tried."""
    trial = tuple(result["trial"].items()) or tuple((k, result[k]) for k in ("lr0", "weight_decay") if k in result)
    rates = [dict(each)["lr0"] for each in variant.trials if "lr0" in dict(each)]
    at_edge = len(set(rates)) > 1 and dict(trial).get("lr0") in (min(rates), max(rates))
    return trial_text(trial) + " (edge)" * at_edge


def p_text(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _average(results: Sequence[Result], key: str, scale: float, digits: int) -> str:
    values = [r[key] for r in results if key in r]
    return f"{_mean(values) * scale:.{digits}f}" if values else ""


def grid_table(study: Study, tuning: Sequence[Result]) -> list[str]:
    """One row per variant and one column per learning rate; a row per trial where other settings were tried too."""
    chosen = choose(study, tuning)
    if any(key != "lr0" for variant in study.variants for trial in variant.trials for key, _ in trial):
        rows = [
            (variant.name, trial_text(trial), _trial_score(tuning, variant, trial, chosen))
            for variant in study.variants
            for trial in variant.trials
        ]
        return markdown(("variant", "trial", METRIC[study.task]), rows)
    rates = sorted({trial for variant in study.variants for trial in variant.trials})
    return markdown(
        ("lr0", *(f"{lr0:g}" for ((_, lr0),) in rates)),
        [
            (variant.name, *(_trial_score(tuning, variant, trial, chosen) for trial in rates))
            for variant in study.variants
        ],
    )


def _trial_score(tuning: Sequence[Result], variant: Variant, trial: Trial, chosen: Mapping[str, Trial]) -> str:
    own = [r for r in tuning if r["variant"] == variant.name and r["trial"] == dict(trial)]
    if not own:
        return ""
    text = f"{_mean([r['score'] for r in own]) * 100:.2f}" + "*" * any(r["failed"] for r in own)
    return f"**{text}**" if trial == chosen[variant.name] else text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


# ---------------------------------------------------------------------------------------------------------------- plots
def _draw(study: Study, tuning: Sequence[Result], final: Sequence[Result], folder: Path) -> None:
    metric = METRIC[study.task]
    title = f"{study.name}: mean and 95 % interval over {_seeds(study.seeds)}"
    for name, key, scale, label in (
        ("curves.png", "curve", 100, f"validation {metric}"),
        ("losses.png", "losses", 1, "training loss"),
    ):
        lines = {variant.name: _curve(variant, final, key, scale) for variant in study.variants}
        draw_lines(folder / name, lines, title=title, labels=("epoch", label))
    if not tuning:
        return
    draw_lines(
        folder / "lr.png",
        {variant.name: _by_rate(variant, tuning) for variant in study.variants},
        title=f"{study.name}: mean over {_seeds(study.tuning_seeds)}",
        labels=("lr0", f"validation {metric}"),
        log_x=True,
    )


def _by_rate(variant: Variant, tuning: Sequence[Result]) -> list[tuple[float, float]]:
    """(lr0, the best mean score among the trials with it)."""
    best: dict[float, float] = {}
    for trial in variant.trials:
        lr0, score = dict(trial).get("lr0", math.nan), 100 * _mean(scores_of(tuning, variant, trial))
        best[lr0] = max(best.get(lr0, score), score)
    return sorted(best.items())


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _curve(variant: Variant, final: Sequence[Result], key: str, scale: float) -> list[tuple[float, float, float]]:
    """(epoch, mean, half-width) over the runs that reached their end; epochs that were not validated are left out."""
    whole = [r.get(key, ()) for r in final if r["variant"] == variant.name and not r.get("remark")]
    points: list[tuple[float, float, float]] = []
    for epoch, values in enumerate(zip(*whole, strict=False), 1):
        if all(value is not None and math.isfinite(value) for value in values):
            found = mean_interval([scale * value for value in values])
            points.append((epoch, found.mean, 0.0 if math.isnan(found.half_width) else found.half_width))
    return points
