"""A table of paired runs for the scripts beside it: one number per (row, seed), differences from the first row."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from sp_yolo.experiments.classify import Splits
from sp_yolo.experiments.compare.report import markdown, provenance
from sp_yolo.experiments.statistics import holm, mean_interval, paired_test


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that all of them have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--jobs", type=int, default=1, help="processes with one thread each")
    return made


def options_parser(description: str | None) -> argparse.ArgumentParser:
    """The same, and what is trained on what: options of a ClassifyConfig."""
    made = parser(description)
    for name, default in (("dataset", "mnist"), ("samples", 1000), ("model", "cnn"), ("epochs", 20)):
        made.add_argument(f"--{name}", type=type(default), default=default)
    return made


def pixels(splits: Splits, images: Tensor) -> Tensor:
    """uint8 [B, C, H, W] as the networks are fed them."""
    return (images.float() / 255 - splits.mean[:, None, None]) / splits.std[:, None, None]


def in_parallel(run: Callable[..., float], cells: Sequence[tuple[Any, ...]], jobs: int) -> dict[tuple[Any, ...], float]:
    """``run(*cell)`` of every cell, in ``jobs`` processes with one thread each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return dict(zip(cells, pool.map(run, *zip(*cells, strict=True)), strict=True))


def tuned(
    score: Callable[[str, float], float], rows: Sequence[str], rates: Sequence[float], jobs: int
) -> dict[str, float]:
    """The learning rate of each row whose ``score(row, lr0)`` is best; prints all of them."""
    scores = in_parallel(score, [(row, lr0) for row in rows for lr0 in rates], jobs)
    print(
        "\n".join(
            markdown(
                ("validation accuracy, %, at lr0", *map(str, rates)),
                [(row, *(f"{100 * scores[row, lr0]:.2f}" for lr0 in rates)) for row in rows],
            )
        ),
        "\n",
        flush=True,
    )
    return {row: max(rates, key=lambda lr0: scores[row, lr0]) for row in rows}


def paired_table(run: Callable[[str, int], float], rows: Sequence[str], seeds: int, jobs: int) -> None:
    """Print mean and 95 % interval of ``run(row, seed)`` per row, and the paired difference from the first row."""
    cells = [(row, seed) for row in rows for seed in range(seeds)]
    values = in_parallel(run, cells, jobs)
    scores = {row: [values[row, seed] for seed in range(seeds)] for row in rows}
    tests = {row: paired_test(scores[row], scores[rows[0]]) for row in rows[1:]}
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    lines = []
    for row in rows:
        difference = tests[row].difference.text(100, 2, "+") if row in tests else ""
        lines.append((row, mean_interval(scores[row]).text(100, 2), difference, f"{adjusted.get(row, 1):.3f}"))
    print("\n".join(markdown(("", "test accuracy, %", f"minus {rows[0]}", "p (Holm)"), lines)))
    print(f"\n{seeds} seeds, ± half-width of the 95 % interval. {provenance()}")
