"""Plots of a comparison. matplotlib (extra `plots`) is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sp_yolo.report.plots import new_figure, save_figure

Point = tuple[float, float]


def draw_lines(
    path: Path,
    lines: Mapping[str, Sequence[Point] | Sequence[tuple[float, float, float]]],
    *,
    title: str,
    labels: tuple[str, str],
    log_x: bool = False,
) -> None:
    """A line per name through its points (x, y), or (x, y, half-width of an interval around y).

    Raises:
        EnvironmentFault: matplotlib is missing. StorageError: ``path`` cannot be written.
    """
    figure = new_figure(7, 5)
    axes = figure.add_subplot()
    for name, points in lines.items():
        x, y = [point[0] for point in points], [point[1] for point in points]
        (line,) = axes.plot(x, y, marker="o" if len(points) < 12 else None, markersize=4, label=name)
        if points and len(points[0]) == 3:
            low, high = ([p[1] + side * p[2] for p in points] for side in (-1, 1))  # type: ignore[misc]
            axes.fill_between(x, low, high, alpha=0.15, color=line.get_color())
    if log_x:
        axes.set_xscale("log")
    axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    save_figure(figure, path, dpi=120)
