"""Classification runs as rows of a CSV file, and a table of such files: what studies/results/ holds.

    python studies/rows.py FILE.csv --optimizers sp adamw --rates 0.01 0.1 --seeds 3 [--lrf 1.0] [--dataset cifar10 ...]
    python studies/rows.py --table FILE.csv [OTHER.csv] [--column test]

A row that the file holds already is not run again. ``--lrf 1.0`` is a constant learning rate, without warm-up. With two
files the table gives the first minus the second, paired over the seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sp_yolo.errors import NonFiniteError
from sp_yolo.experiments.classify import fit, load_classify_config, open_source
from sp_yolo.experiments.classify.splits import config_splits
from sp_yolo.experiments.compare.report import markdown
from sp_yolo.experiments.rows import append_row, raw_rows
from sp_yolo.experiments.statistics import mean_interval, paired_test

OPTIONS = {"dataset": "mnist", "root": "", "samples": 1000, "model": "cnn", "epochs": 20, "lrf": 0.01}
COLUMNS = ("version", *OPTIONS, "optimizer", "lr0", "seed", "test", "val", "train_loss", "start_loss", "failed")
KEY = ("optimizer", "lr0", "seed")
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--column", default="test", choices=("test", "val", "train_loss"))
    parser.add_argument("--optimizers", nargs="+", default=["sp"], help="names of `sp-yolo classify`, and sp-none")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01])
    parser.add_argument("--seeds", type=int, default=3)
    for name, value in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = parser.parse_args()
    if given.table:
        files = [raw_rows(path) for path in given.files]
        print(paired(*files) if len(files) == 2 else by_rate(files[0], given.column))
        return
    torch.set_num_threads(1)
    done = {tuple(row[key] for key in KEY) for row in raw_rows(given.files[0])}
    options = {name: getattr(given, name) for name in OPTIONS}
    for seed in range(given.seeds):
        for lr0 in given.rates:
            for optimizer in given.optimizers:
                if (optimizer, f"{lr0:g}", str(seed)) not in done:
                    append_row(given.files[0], COLUMNS, run(options, optimizer, lr0, seed))


def run(options: dict[str, Any], optimizer: str, lr0: float, seed: int) -> dict[str, Any]:
    """One row. ``train_loss``: the mean over the training images at the end; ``start_loss``: before the first step."""
    import sp_yolo

    overrides: dict[str, Any] = {"lr0": lr0, "lrf": options["lrf"]}
    if optimizer == "sp-none":
        overrides |= {"sp_metric": "none", "weight_decay": 5e-4}
    own = {name: value for name, value in options.items() if name != "lrf"}
    config = load_classify_config(
        **own, optimizer=optimizer.removesuffix("-none"), batch_size=50, seed=seed, overrides=overrides
    )
    source = open_source(config.dataset, config.root or None, download=False, image_size=config.image_size)
    about = {
        **options,
        "root": "",
        "version": sp_yolo.__version__,
        "optimizer": optimizer,
        "lr0": f"{lr0:g}",
        "seed": seed,
    }
    start = math.log(len(source.names))  # of a network that knows nothing
    try:
        found = fit(config, config_splits(config, source)).summary
    except NonFiniteError:
        return {**about, "test": 1 / len(source.names), "start_loss": start, "failed": 1}
    kept = {"test": "test_accuracy", "val": "val_accuracy", "train_loss": "train_loss"}
    return {
        **about,
        **{name: f"{found[key]:.6g}" for name, key in kept.items()},
        "start_loss": f"{start:.6g}",
        "failed": 0,
    }


def by_rate(rows: list[Row], column: str) -> str:
    """A line per optimizer, a column per rate: every seed's value (%, or the loss), "fails" where it is not finite."""
    rates = sorted({row["lr0"] for row in rows}, key=float)
    lines = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        own = {rate: [row for row in rows if (row["optimizer"], row["lr0"]) == (name, rate)] for rate in rates}
        lines.append((name, *(" ".join(_shown(row, column) for row in own[rate]) for rate in rates)))
    return "\n".join(markdown(("", *(f"lr {rate}" for rate in rates)), lines))


def _shown(row: Row, column: str) -> str:
    if row["failed"] == "1" or not row[column]:
        return "fails"
    return f"{float(row[column]):.2g}" if column == "train_loss" else f"{100 * float(row[column]):.1f}"


def paired(rows: list[Row], others: list[Row]) -> str:
    """Mean and 95 % interval of the test scores of both files, and of their paired difference, in %."""
    scores, theirs = (_by_seed(each) for each in (rows, others))
    seeds = sorted(set(scores) & set(theirs))
    first, second = ([each[seed] for seed in seeds] for each in (scores, theirs))
    difference = paired_test(first, second)
    return (
        f"{len(seeds)} seeds: {mean_interval(first).text(100, 2)} and {mean_interval(second).text(100, 2)}, "
        f"difference {difference.difference.text(100, 2, '+')}, p {difference.p:.2f}"
    )


def _by_seed(rows: Iterable[Row]) -> dict[int, float]:
    return {int(row["seed"]): float(row["test"]) for row in rows}


if __name__ == "__main__":
    main()
