"""The tables of docs/results.md and docs/plugins.md from the raw rows in studies/results; between markers, the prose
around them is ours.

python docs/generate_results.py            # write them
python docs/generate_results.py --check    # exit 1 where a table and its rows disagree
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from sp_yolo.experiments.compare.cells import stored
from sp_yolo.experiments.compare.page import (
    Page,
    against_table,
    make_page,
    practice_table,
    ranks_text,
    score_table,
    spread_table,
)
from sp_yolo.experiments.compare.report import markdown
from sp_yolo.experiments.compare.store import read_rows
from sp_yolo.experiments.compare.study import load_study
from sp_yolo.experiments.rows import raw_rows
from sp_yolo.experiments.statistics import mean_interval, paired_test

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = tuple(CHECKOUT / "docs" / name for name in ("results.md", "plugins.md"))
STUDIES, RESULTS = CHECKOUT / "studies", CHECKOUT / "studies" / "results"
FEW = tuple(f"few-{name}" for name in ("microcontroller", "aquarium", "pear", "tables", "bccd-50", "bccd-205"))
_BLOCK = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Rows = list[dict[str, str]]


def main(arguments: list[str]) -> int:
    """Write or check the tables. Returns the exit code."""
    stale = False
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if arguments != ["--check"]:
            page.write_text(after, encoding="utf-8", newline="\n")
        elif after != before:
            print(f"stale: {page}; run python docs/generate_results.py", file=sys.stderr)
            stale = True
    return int(stale)


def filled(text: str) -> str:
    """``text`` with every table made anew.

    Raises:
        KeyError: a table of an unknown name.
    """
    return _BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


# -------------------------------------------------------------------------------------------------- the six studies
def few(table: Callable[[Page], list[str] | str]) -> Callable[[], str]:
    def make() -> str:
        studies, results = [], []
        for name in FEW:
            path = RESULTS / name / "cells.csv"
            if path.is_file():
                studies.append(load_study(str(STUDIES / f"{name}.yaml")))
                results.append(stored(studies[-1], read_rows(path)))
        whole = [(study, *found) for study, found in zip(studies, results, strict=True) if found[1]]
        if not whole:
            return "Not measured yet."
        made = table(make_page(*map(list, zip(*whole, strict=True))))
        return made if isinstance(made, str) else "\n".join(made)

    return make


# -------------------------------------------------------------------------------------------------- version 0.2: one SP
def _rows(name: str, study: str = "one-sp") -> Rows:
    return raw_rows(RESULTS / study / f"{name}.csv")


def _scores(rows: Rows, column: str) -> dict[int, float]:
    return {int(row["seed"]): float(row[column]) for row in rows}


def new_against_old() -> str:
    """Both versions at one rate, and the paired difference."""
    cells = [row for row in _rows("bccd-50") if (row["optimizer"], row["lr0"]) == ("sp", "0.002")]
    pairs = {
        "MNIST, 1,000, lr .01": [_scores(_rows(f"mnist-1000{which}"), "test") for which in ("", "-before")],
        "MNIST, 5,000, lr .01": [_scores(_rows(f"mnist-5000{which}"), "test") for which in ("", "-before")],
        "CIFAR-10, 9,000, lr .01": [_scores(_rows(f"cifar10-9000{which}"), "test") for which in ("", "-before")],
        "BCCD, 50 images, lr .002, mAP": [
            _scores([row for row in cells if row["version"] == version], "test_map") for version in ("0.2.0", "0.1.0")
        ],
    }
    lines = []
    for name, (new, old) in pairs.items():
        seeds = sorted(set(new) & set(old))
        values = [[each[seed] for seed in seeds] for each in (new, old)]
        difference = paired_test(*values).difference.text(100, 2, "+")
        lines.append((name, str(len(seeds)), *(mean_interval(each).text(100, 2) for each in values), difference))
    return "\n".join(markdown(("", "seeds", "new", "old", "new minus old"), lines))


def constant_rates() -> str:
    """Final training losses of each seed at constant rates."""
    data = {"MNIST, 1,000, cnn": "constant-mnist-1000", "CIFAR-10, 5,000, cnn-bn": "constant-cifar10-5000"}
    names = {"sp": "SP", "sp-none": "SP without a metric", "adamw": "AdamW", "sgd": "SGD-Nesterov"}
    lines, rates = [], ["0.01", "0.1", "1", "3", "10"]
    for title, file in data.items():
        rows = _rows(file)
        for optimizer, words in names.items():
            own = [[row for row in rows if (row["optimizer"], row["lr0"]) == (optimizer, rate)] for rate in rates]
            losses = (
                " ".join("fails" if _failed(row) else f"{float(row['train_loss']):.2g}" for row in o) for o in own
            )
            lines.append((f"{title}: {words}", *losses))
    return "\n".join(markdown(("", "lr .01", ".1", "1", "3", "10"), lines))


def _failed(row: dict[str, str]) -> bool:
    return row["failed"] == "1" or not row["train_loss"]


def default_rate() -> str:
    """The six seeds of BCCD-50, and the default rate of classifiers."""
    cells = [row for row in _rows("bccd-50") if row["version"] == "0.2.0" and int(row["seed"]) < 6]
    lines = []
    for optimizer, lr0, words in (
        ("sp", "0.002", "SP .002"),
        ("sp", "0.005", "SP .005 (default)"),
        ("sp", "0.01", "SP .01"),
        ("adamw", "0.004", "AdamW .004 (best of six rates)"),
    ):
        own = _scores([row for row in cells if (row["optimizer"], row["lr0"]) == (optimizer, lr0)], "test_map")
        values = [own[seed] for seed in sorted(own)]
        shown = ", ".join(f"{100 * value:.1f}" for value in values)
        lines.append((f"BCCD, 50 images, mAP: {words}", mean_interval(values).text(100, 2), shown))
    for title, file in (("MNIST, 1,000", "default-mnist-1000"), ("CIFAR-10, 9,000", "default-cifar10-9000")):
        found = _scores(_rows(file), "test")
        values = [found[seed] for seed in sorted(found)]
        shown = ", ".join(f"{100 * value:.1f}" for value in values)
        lines.append((f"{title}: SP .005 (default)", mean_interval(values).text(100, 2), shown))
    return "\n".join(markdown(("", "mean", "each seed"), lines))


# ---------------------------------------------------------------------------------------------------- smaller questions
def metric_decay() -> str:
    """What was chosen for each way of decay, its test scores, and the paired difference."""
    lines = []
    for title, file in (("MNIST, 1,000", "mnist-1000"), ("CIFAR-10, 5,000", "cifar10-5000")):
        rows = _rows(file, "metric-decay")
        if not rows:
            continue
        tested = {
            decay: [row for row in rows if (row["decay"], row["split"]) == (decay, "test")]
            for decay in ("uniform", "metric")
        }
        scores = {decay: _scores(own, "score") for decay, own in tested.items()}
        seeds = sorted(set(scores["uniform"]) & set(scores["metric"]))
        uniform, metric = ([scores[decay][seed] for seed in seeds] for decay in ("uniform", "metric"))
        chosen = (f"lr {own[0]['lr0']}, decay {own[0]['weight_decay']}" for own in tested.values())
        means = (mean_interval(values).text(100, 2) for values in (uniform, metric))
        columns = [f"{mean} ({choice})" for mean, choice in zip(means, chosen, strict=True)]
        lines.append((title, str(len(seeds)), *columns, paired_test(metric, uniform).difference.text(100, 2, "+")))
    return "\n".join(markdown(("", "seeds", "uniform", "in the metric", "difference"), lines))


def out_of_the_box() -> str:
    """mAP@.5 / mAP of each trainer in equal time, by data set."""
    rows = _rows("rows", "out-of-the-box")
    trainers = list(dict.fromkeys(row["trainer"] for row in rows))
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        own = {row["trainer"]: row for row in rows if row["data"] == data}
        found = (own.get(trainer) for trainer in trainers)
        lines.append((data, *(_both_maps(row) if row else "" for row in found)))
    return "\n".join(markdown(("", *trainers), lines))


def _both_maps(row: dict[str, str]) -> str:
    return f"{float(row['map50']):.3f} / {float(row['map50_95']):.3f} ({row['epochs']} epochs)"


# ----------------------------------------------------------------------------------------------- channels that go
def compact_scores() -> str:
    """Mean mAP of each variant of studies/compact.py, and its paired difference from the dense network over the seeds
    that both have."""
    lines = []
    for data, words in {"bccd": "BCCD, 205 images", "few-aquarium": "aquarium, 176 images"}.items():
        rows = _rows(data, "compact")
        dense = _scores([row for row in rows if row["variant"] == "dense"], "map")
        for variant in dict.fromkeys(row["variant"] for row in rows):
            own_rows = [row for row in rows if row["variant"] == variant]
            own = _scores(own_rows, "map")
            seeds = sorted(set(own) & set(dense))
            values = [[each[seed] for seed in seeds] for each in (own, dense)]
            if len(seeds) < 2:
                continue
            difference = paired_test(*values).difference.text(100, 1, "+") if variant != "dense" else ""
            flops = sum(float(row["gflops"]) for row in own_rows) / len(own_rows)
            mean = mean_interval(values[0]).text(100, 1)
            lines.append((f"{words}: {variant}", str(len(seeds)), f"{flops:.1f}", mean, difference))
    if not lines:
        return "Not measured yet."
    return "\n".join(markdown(("", "seeds", "GFLOPs at 640 px", "mAP", "minus dense"), lines))


def compact_speed() -> str:
    """Median time of each network of benchmarks/compact.py, and how much faster than the first one in each round."""
    rows, lines = _rows("speed", "compact"), []
    for size in dict.fromkeys(row["image_size"] for row in rows):
        times: dict[str, list[float]] = {}
        for row in rows:
            if row["image_size"] == size:
                times.setdefault(row["model"], []).append(float(row["ms"]))
        first = next(iter(times.values()))
        for model, own in times.items():
            ratios = [dense / one for dense, one in zip(first, own, strict=True)]
            lines.append((f"{size} px: {model}", str(len(own)), _median_range(own, 1), _median_range(ratios, 2)))
    if not lines:
        return "Not measured yet."
    return "\n".join(markdown(("", "rounds", "ms", "times as fast"), lines))


def _median_range(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# --------------------------------------------------------------------------------------- SP in other people's trainers
def hosts() -> str:
    """Mean mAP of each optimizer of benchmarks/hosts.py in its host, and SP's paired difference from it."""
    rows, lines = _rows("rows", "hosts"), []
    for host, arm in dict.fromkeys((row["host"], row["arm"]) for row in rows):
        of = {name: [row for row in rows if (row["host"], row["arm"]) == (host, name)] for name in (arm, "sp")}
        own, sp = (_scores(of[name], "map50_95") for name in (arm, "sp"))
        seeds = sorted(set(own) & set(sp))
        values = [[each[seed] for seed in seeds] for each in (sp, own)]
        less = paired_test(*values).difference.text(100, 2, "+") if arm != "sp" and len(seeds) > 1 else ""
        means = (mean_interval([float(row[key]) for row in of[arm]]).text(100, 2) for key in ("map50", "map50_95"))
        seconds = statistics.mean(float(row["seconds_per_epoch"]) for row in of[arm])
        lines.append((host, arm, str(len(own)), *means, less, f"{seconds:.1f}"))
    if not lines:
        return "Not measured yet."
    header = ("host", "optimizer", "seeds", "mAP@.5", "mAP", "mAP, SP less this", "s an epoch")
    return "\n".join(markdown(header, lines))


TABLES: dict[str, Callable[[], str]] = {
    "hosts": hosts,
    "compact scores": compact_scores,
    "compact speed": compact_speed,
    "few scores": few(score_table),
    "few ranks": few(ranks_text),
    "few against SP": few(against_table),
    "few in practice": few(practice_table),
    "few spread": few(spread_table),
    "one SP new against old": new_against_old,
    "one SP constant rates": constant_rates,
    "one SP default rate": default_rate,
    "decay in the metric": metric_decay,
    "out of the box": out_of_the_box,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
