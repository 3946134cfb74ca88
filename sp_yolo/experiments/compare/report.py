"""From the results of a study's cells to its Markdown table, its CSV and its plots."""

from __future__ import annotations

import csv
import datetime
import io
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sp_yolo import __version__
from sp_yolo.config import CHECKOUT
from sp_yolo.experiments.compare.study import Study, Variant
from sp_yolo.experiments.statistics import holm, mean_interval, paired_test
from sp_yolo.report.lines import draw_lines
from sp_yolo.runtime.folder import RunDir

Result = Mapping[str, Any]
METRIC = {"classify": "accuracy, %", "detect": "mAP@.5:.95, %"}
CSV_COLUMNS = (
    *("variant", "optimizer", "measure", "lr0", "seed", "score", "val_score", "train_score", "failed", "zeros"),
    *("seconds", "optimizer_bytes", "remark"),
)


def choose(study: Study, tuning: Sequence[Result]) -> dict[str, float]:
    """The learning rate of each variant: the best mean on the validation split; the smaller one of equals."""
    chosen = {}
    for variant in study.variants:
        means = {lr0: _mean(_scores(tuning, variant, lr0)) for lr0 in variant.grid}
        chosen[variant.name] = max(means, key=lambda lr0: (means[lr0], -lr0))
    return chosen


def _scores(results: Sequence[Result], variant: Variant, lr0: float | None = None) -> list[float]:
    """Scores of a variant's cells, in the order of the seeds."""
    own = [r for r in results if r["variant"] == variant.name and (lr0 is None or r["lr0"] == lr0)]
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
    if tuning:
        lines += [
            "Learning rates on the validation split "
            f"({METRIC[study.task]}, mean of {study.tuning_seeds}; * failed runs among them; the best in bold):",
            "",
            *grid_table(study, tuning),
            "",
        ]
    run = RunDir(folder)
    run.write("report.md", "\n".join(lines))
    run.write("cells.csv", _csv([*tuning, *final]))
    _draw(study, tuning, final, folder)
    return lines


def _heading(study: Study, command: str) -> str:
    options = ", ".join(f"{key} {value}" for key, value in {**study.options, **study.overrides}.items())
    rates = len(study.variants[0].grid)
    seeds = _seeds(study.seeds)
    tuned = f"Learning rates as given; {seeds}"
    if rates > 1:
        tuned = (
            f"Every variant was tuned alike ({rates} learning rates x {_seeds(study.tuning_seeds)} on the validation "
            f"split); then {seeds} of their own"
        )
    return (
        f"`{command}`\n\n"
        f"{study.task}: {options}. {tuned} on the test split, the same initial weights, images and order for all "
        "variants of a seed. ± is the half-width of the 95 % confidence interval (Student's t); p is of the paired t "
        f"test against {study.baseline}, adjusted for {len(study.variants) - 1} comparisons (Holm). {provenance()}"
    )


def provenance() -> str:
    """Commit, versions, machine, date."""
    git = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty=+changes"]
    try:
        if not (CHECKOUT / "setup.cfg").is_file():
            raise FileNotFoundError  # an installed copy: a repository around it is somebody else's
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return (
        f"sp-yolo {__version__}, commit {commit}, torch {torch.__version__}, Python {platform.python_version()}, "
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
        *("variant", "lr0", f"test {METRIC[study.task]}", f"minus {study.baseline}", "p", "train minus test"),
        *("zeros, %", "seconds", "optimizer MB", "failed runs, grid", "failed runs, final"),
    )
    baseline = next(variant for variant in study.variants if variant.name == study.baseline)
    others = [variant for variant in study.variants if variant is not baseline]
    tests = {v.name: paired_test(_scores(final, v), _scores(final, baseline)) for v in others}
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    rows = []
    for variant in study.variants:
        own = [r for r in final if r["variant"] == variant.name]
        tried = [r for r in tuning if r["variant"] == variant.name]
        lr0 = own[0]["lr0"]
        edge = " (edge)" if len(variant.grid) > 1 and lr0 in (variant.grid[0], variant.grid[-1]) else ""
        compared = ("", "")
        if variant is not baseline:
            difference = tests[variant.name].difference
            compared = (difference.text(100, 2, "+"), _p_text(adjusted[variant.name]))
        gaps = [r["train_score"] - r["score"] for r in own if "train_score" in r]
        rows.append(
            (
                variant.name,
                f"{lr0:g}{edge}",
                mean_interval(_scores(final, variant)).text(100, 2),
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


def _p_text(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _average(results: Sequence[Result], key: str, scale: float, digits: int) -> str:
    values = [r[key] for r in results if key in r]
    return f"{_mean(values) * scale:.{digits}f}" if values else ""


def grid_table(study: Study, tuning: Sequence[Result]) -> list[str]:
    """One row per variant, one column per learning rate that any of them was tried with."""
    rates = sorted({lr0 for variant in study.variants for lr0 in variant.grid})
    chosen = choose(study, tuning)
    rows = []
    for variant in study.variants:
        cells = [variant.name]
        for lr0 in rates:
            own = [r for r in tuning if r["variant"] == variant.name and r["lr0"] == lr0]
            text = f"{_mean([r['score'] for r in own]) * 100:.2f}" if own else ""
            text += "*" * any(r["failed"] for r in own)
            cells.append(f"**{text}**" if own and lr0 == chosen[variant.name] else text)
        rows.append(tuple(cells))
    return markdown(("lr0", *(f"{lr0:g}" for lr0 in rates)), rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


def _csv(results: Sequence[Result]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(results)
    return text.getvalue()


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
        {v.name: [(lr0, 100 * _mean(_scores(tuning, v, lr0))) for lr0 in v.grid] for v in study.variants},
        title=f"{study.name}: mean over {_seeds(study.tuning_seeds)}",
        labels=("lr0", f"validation {metric}"),
        log_x=True,
    )


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
