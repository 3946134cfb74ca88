"""The critical-difference diagram: methods on a line by their mean rank, those that do not differ joined by a bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from sp_yolo.report.plots import new_figure, save_figure


def draw_ranks(
    path: Path, names: Sequence[str], mean_ranks: Sequence[float], critical_difference: float, *, title: str
) -> None:
    """After Demšar (2006), figure 1. ``critical_difference`` NaN: neither the bar that shows it nor those that join.

    Raises:
        EnvironmentFault: matplotlib is missing. StorageError: ``path`` cannot be written.
    """
    order = sorted(range(len(names)), key=lambda index: mean_ranks[index])
    half = math.ceil(len(order) / 2)
    bars = [] if math.isnan(critical_difference) else groups_alike(mean_ranks, critical_difference)
    depth = 0.3 * (len(bars) + 1)
    figure = new_figure(9, 1.6 + 0.35 * half + 0.12 * len(bars))
    axes = figure.add_subplot()
    low, high = 1, max(len(names), 2)
    axes.plot([low, high], [0, 0], "k-", linewidth=1)
    for tick in range(low, high + 1):
        axes.plot([tick, tick], [0, 0.12], "k-", linewidth=1)
        axes.text(tick, 0.18, str(tick), ha="center", va="bottom", fontsize=9)
    for place, index in enumerate(order):
        left = place < half
        row = place if left else len(order) - 1 - place
        height, edge = -depth - 0.45 * row, low - 0.3 if left else high + 0.3
        rank = mean_ranks[index]
        axes.plot([rank, rank, edge], [0, height, height], "-", color="0.35", linewidth=1)
        words = f"{names[index]}  {rank:.2f}" if left else f"{rank:.2f}  {names[index]}"
        axes.text(edge, height, f" {words} ", ha="right" if left else "left", va="center", fontsize=9)
    for number, (first, last) in enumerate(bars):
        axes.plot([first - 0.04, last + 0.04], [-0.22 - 0.25 * number] * 2, "-", color="C0", linewidth=4)
    if not math.isnan(critical_difference):
        end = min(low + critical_difference, high)
        axes.plot([low, end], [0.75, 0.75], "-", color="C0", linewidth=2, marker="|")
        axes.text((low + end) / 2, 0.82, f"critical difference {critical_difference:.2f}", ha="center", fontsize=9)
    axes.set_xlim(low - 0.3 * high, high + 0.3 * high)
    axes.set_ylim(-depth - 0.45 * half, 1.2)
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    save_figure(figure, path, dpi=120)


def groups_alike(mean_ranks: Sequence[float], critical_difference: float) -> list[tuple[float, float]]:
    """(lowest, highest mean rank) of every group that does not differ and lies in no larger one."""
    values = sorted(mean_ranks)
    found: list[tuple[float, float]] = []
    for low in values:
        high = max(value for value in values if value - low < critical_difference)
        if high > low and not any(first <= low and high <= last for first, last in found):
            found.append((low, high))
    return found
