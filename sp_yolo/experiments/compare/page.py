"""Several studies on one page: means, ranks and tests over the data sets, in Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sp_yolo.errors import UserError
from sp_yolo.experiments.compare.practice import Practice, mean, practice
from sp_yolo.experiments.compare.report import METRIC, Result, markdown, p_text, provenance, scores_of
from sp_yolo.experiments.compare.study import Study
from sp_yolo.experiments.ranks import RankTest, rank_test, wilcoxon
from sp_yolo.experiments.statistics import Interval, PairedTest, holm, mean_interval, paired_test
from sp_yolo.report.ranks import draw_ranks
from sp_yolo.runtime.folder import RunDir

LEVEL = 0.05  # of every test here
_LEGEND = """± is the half-width of the 95 % confidence interval of the mean over the seeds (Student's t); the best mean
of a data set in bold. A variant wins or loses on a data set where the paired t test against {baseline} over the seeds
has p at most 0.05 after Holm's correction for {others} comparisons; else the two are level."""


@dataclass(frozen=True)
class Entry:
    """A variant on one data set. ``test``, ``p``: against the baseline, Holm-adjusted; None for the baseline itself."""

    interval: Interval
    practice: Practice
    rank: float
    test: PairedTest | None
    p: float

    @property
    def outcome(self) -> str:
        if self.test is None or math.isnan(self.p) or self.p > LEVEL:
            return "" if self.test is None else "level"
        return "win" if self.test.difference.mean > 0 else "loss"


@dataclass(frozen=True)
class Page:
    """``entries[study][variant]``, for the studies and variants of these ``names``, in their order."""

    names: tuple[str, ...]
    variants: tuple[str, ...]
    baseline: str
    metric: str
    seeds: int
    entries: tuple[tuple[Entry, ...], ...]
    ranks: RankTest


def make_page(studies: Sequence[Study], tuning: Sequence[Sequence[Result]], final: Sequence[Sequence[Result]]) -> Page:
    """The page about ``studies`` with the results of each.

    Raises:
        UserError: their variants, baselines or tasks differ.
    """
    first = studies[0]
    variants = tuple(variant.name for variant in first.variants)
    for study in studies[1:]:
        own = {variant.name for variant in study.variants}
        if own != set(variants) or (study.baseline, study.task) != (first.baseline, first.task):
            different = sorted(own ^ set(variants)) or [study.baseline, study.task]
            raise UserError(f"{study.name} and {first.name} cannot share a page: {', '.join(different)} differ")
    entries = [_entries(*given, variants) for given in zip(studies, tuning, final, strict=True)]
    return Page(
        names=tuple(study.name for study in studies),
        variants=variants,
        baseline=first.baseline,
        metric=METRIC[first.task],
        seeds=min(study.seeds for study in studies),
        entries=tuple(entries),
        ranks=rank_test([[entry.interval.mean for entry in row] for row in entries]),
    )


def _entries(
    study: Study, tuning: Sequence[Result], final: Sequence[Result], variants: tuple[str, ...]
) -> tuple[Entry, ...]:
    by_name = {variant.name: variant for variant in study.variants}
    scores = {name: scores_of(final, by_name[name]) for name in variants}
    tests = {name: paired_test(scores[name], scores[study.baseline]) for name in variants if name != study.baseline}
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    intervals = {name: mean_interval(scores[name]) for name in variants}
    figures = practice(study, tuning, final)
    own_ranks = rank_test([[intervals[name].mean for name in variants]]).mean_ranks
    return tuple(
        Entry(intervals[name], figures[name], rank, tests.get(name), adjusted.get(name, math.nan))
        for name, rank in zip(variants, own_ranks, strict=True)
    )


def write_page(page: Page, folder: Path, command: str) -> list[str]:
    """Write page.md, page.csv and ranks.png into ``folder``; returns the lines of the first.

    Raises:
        EnvironmentFault: matplotlib is missing (the others are written by then).
    """
    lines = [
        f"# {len(page.names)} data sets, {len(page.variants)} variants, {page.seeds} seeds",
        "",
        f"`{command}`",
        "",
    ]
    lines += [_LEGEND.format(baseline=page.baseline, others=len(page.variants) - 1), "", provenance(), ""]
    lines += [*score_table(page), "", ranks_text(page), "", "![mean ranks](ranks.png)", ""]
    lines += [f"Against {page.baseline}:", "", *against_table(page), ""]
    lines += ["In practice (means over the data sets):", "", *practice_table(page), ""]
    lines += [
        "Standard deviation over the seeds, in points (lowest to highest score of a seed):",
        "",
        *spread_table(page),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    run = RunDir(folder)
    run.write("page.md", "\n".join([*lines, ""]))
    run.write("page.csv", _csv(page))
    if len(page.names) > 1:
        title = f"mean rank over {len(page.names)} data sets (1 is the best)"
        draw_ranks(
            folder / "ranks.png", page.variants, page.ranks.mean_ranks, page.ranks.critical_difference, title=title
        )
    return lines


# --------------------------------------------------------------------------------------------------------------- tables
def score_table(page: Page) -> list[str]:
    """A row per variant, best mean rank first: its score on each data set, and its mean rank."""
    best = [max(entry.interval.mean for entry in row) for row in page.entries]
    rows = []
    for index in _by_rank(page):
        cells = [page.variants[index]]
        for row, highest in zip(page.entries, best, strict=True):
            text = row[index].interval.text(100, 2)
            cells.append(f"**{text}**" if row[index].interval.mean == highest else text)
        rows.append((*cells, f"{page.ranks.mean_ranks[index]:.2f}"))
    return markdown((page.metric, *page.names, "mean rank"), rows)


def _by_rank(page: Page) -> list[int]:
    return sorted(range(len(page.variants)), key=lambda index: page.ranks.mean_ranks[index])


def ranks_text(page: Page) -> str:
    test = page.ranks
    if math.isnan(test.p):
        return "One data set: no test of ranks."
    words = "differ" if test.p <= LEVEL else "cannot be told apart"
    return (
        f"Friedman's test over {len(page.names)} data sets: chi² = {test.chi2:.2f}, {p_words(test.p)}: the variants "
        f"{words}. Two of them differ where their mean ranks are at least {test.critical_difference:.2f} apart "
        "(Nemenyi, 0.05)."
    )


def p_words(p: float) -> str:
    text = p_text(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def against_table(page: Page) -> list[str]:
    """A row per variant but the baseline: wins, level, losses, the mean difference, Wilcoxon's p over the data sets."""
    others = [index for index in _by_rank(page) if page.variants[index] != page.baseline]
    differences = {
        index: [test.difference.mean for row in page.entries if (test := row[index].test)] for index in others
    }
    adjusted = dict(zip(others, holm([wilcoxon(differences[index]) for index in others]), strict=True))
    rows = []
    for index in others:
        outcomes = [row[index].outcome for row in page.entries]
        each = [test.difference.text(100, 2, "+") for row in page.entries if (test := row[index].test)]
        marks = {"win": " (win)", "loss": " (loss)", "level": ""}
        rows.append(
            (
                page.variants[index],
                *(text + marks[outcome] for text, outcome in zip(each, outcomes, strict=True)),
                " / ".join(str(outcomes.count(word)) for word in ("win", "level", "loss")),
                f"{100 * mean(differences[index]):+.2f}",
                p_text(adjusted[index]),
            )
        )
    return markdown(
        (f"minus {page.baseline}", *page.names, "wins / level / losses", "mean", "p (Wilcoxon, Holm)"), rows
    )


def practice_table(page: Page) -> list[str]:
    """A row per variant: time to the baseline's final score, time and memory of a run, how robust its rate is."""
    rows = []
    for index in _by_rank(page):
        own = [row[index].practice for row in page.entries]
        runs = sum(each.runs for each in own)
        rows.append(
            (
                page.variants[index],
                _shown([each.epochs for each in own], 1, 1),
                _shown([each.seconds for each in own], 1, 0),
                f"{sum(each.reached for each in own)} of {runs}" if runs else "",
                _shown([each.run_seconds for each in own], 1, 1),
                _shown([each.peak_bytes for each in own], 1e-6, 0),
                _shown([each.optimizer_bytes for each in own], 1e-6, 1),
                _shown([100 * each.robust for each in own], 1, 0),
            )
        )
    header = (
        *("variant", f"epochs to {page.baseline}'s final score", "seconds to it", "runs that reach it"),
        *("seconds a run", "peak MB", "optimizer MB", "rates over two decades that keep 90 %, %"),
    )
    return markdown(header, rows)


def _shown(values: Sequence[float], scale: float, digits: int) -> str:
    """The mean of what was measured, "never" where one is infinite, "" where nothing was."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    return "never" if math.inf in known else f"{scale * mean(known):.{digits}f}"


def spread_table(page: Page) -> list[str]:
    rows = []
    for index in _by_rank(page):
        own = [row[index].practice for row in page.entries]
        each = [
            f"{100 * p.deviation:.2f} ({100 * p.lowest:.1f} to {100 * p.highest:.1f})"
            if not math.isnan(p.deviation)
            else f"({100 * p.lowest:.1f})"
            for p in own
        ]
        rows.append((page.variants[index], *each))
    return markdown(("variant", *page.names), rows)


def _csv(page: Page) -> str:
    text = io.StringIO()
    columns = (
        *("data_set", "variant", "n", "mean", "half_width", "rank", "mean_rank", "difference", "difference_half_width"),
        *("p_holm", "outcome", "deviation", "lowest", "highest", "epochs_to_target", "seconds_to_target", "robust"),
        *("seconds", "peak_bytes", "optimizer_bytes"),
    )
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    for name, row in zip(page.names, page.entries, strict=True):
        for variant, entry, mean_rank in zip(page.variants, row, page.ranks.mean_ranks, strict=True):
            own, difference = entry.practice, entry.test.difference if entry.test else None
            numbers: list[Any] = [
                entry.interval.n,
                entry.interval.mean,
                entry.interval.half_width,
                entry.rank,
                mean_rank,
            ]
            numbers += [difference.mean, difference.half_width, entry.p] if difference else ["", "", ""]
            numbers += [entry.outcome, own.deviation, own.lowest, own.highest, own.epochs, own.seconds, own.robust]
            numbers += [own.run_seconds, own.peak_bytes, own.optimizer_bytes]
            table.writerow([name, variant, *(f"{v:.6g}" if isinstance(v, float) else v for v in numbers)])
    return text.getvalue()
