"""Plots of an evaluation and of a run. matplotlib (extra `plots`) is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sp_yolo.errors import EnvironmentFault, StorageError
from sp_yolo.eval.confusion import Confusion
from sp_yolo.eval.curves import Curves

MOST_LINES = 20  # above that many classes only their mean is drawn
PANELS = (
    (("box", "box"), ("val_box", "val box")),
    (("obj", "objectness"), ("val_obj", "val objectness")),
    (("cls", "class"), ("val_cls", "val class")),
    (("precision", "precision"), ("recall", "recall")),
    (("map50", "mAP@.5"), ("map50_95", "mAP@.5:.95")),
)


def new_figure(width: float, height: float) -> Any:
    """A figure of ``width`` x ``height`` inches: pyplot's global state and backend stay untouched.

    Raises:
        EnvironmentFault: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFault("plots need matplotlib: pip install 'sp-yolo[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw_curves(curves: Curves, directory: str | Path) -> list[Path]:
    """Write F1_curve.png, P_curve.png, R_curve.png (over the confidence) and PR_curve.png (IoU .5).

    Raises:
        EnvironmentFault: matplotlib is missing.
    """
    folder = Path(directory)
    best = f"{curves.means_at_best()[2]:.2f} at {curves.confidence[curves.best]:.3f}"
    over_confidence = (("F1", curves.f1, best), ("P", curves.precision, ""), ("R", curves.recall, ""))
    labels = {"F1": "F1", "P": "Precision", "R": "Recall"}
    paths = []
    for short, values, note in over_confidence:
        paths.append(folder / f"{short}_curve.png")
        _lines(curves, curves.confidence, values, ("Confidence", labels[short]), note, paths[-1])
    paths.append(folder / "PR_curve.png")
    counted = curves.precision_at_recall[curves.counted]
    note = f"{counted.mean():.3f} mAP@.5" if len(counted) else ""
    _lines(curves, curves.recall_points, curves.precision_at_recall, ("Recall", "Precision"), note, paths[-1])
    return paths


def _lines(curves: Curves, x: np.ndarray, values: np.ndarray, axes: tuple[str, str], note: str, path: Path) -> None:
    figure = new_figure(9, 6)
    plot = figure.subplots()
    rows = np.flatnonzero(curves.counted)
    for row in rows if 1 < len(rows) <= MOST_LINES else []:
        plot.plot(x, values[row], linewidth=1, label=curves.names[row])
    if len(rows):
        plot.plot(x, values[rows].mean(axis=0), linewidth=3, color="blue", label=f"all classes {note}".rstrip())
        figure.legend(loc="outside right upper", fontsize="small")
    plot.set(xlabel=axes[0], ylabel=axes[1], xlim=(0, max(1.0, float(x[-1]))), ylim=(0, 1.02))
    plot.grid(alpha=0.3)
    save_figure(figure, path)


def draw_confusion(confusion: Confusion, names: Sequence[str], path: str | Path) -> None:
    """Write the matrix twice in one picture: counts, and shares of each true class, without unseen classes.

    Raises:
        EnvironmentFault: matplotlib is missing.
    """
    seen = confusion.matrix.sum(axis=0) + confusion.matrix.sum(axis=1) > 0
    used = seen | (np.arange(len(seen)) == len(seen) - 1)  # the background always
    ticks = [name for name, keep in zip([*names, "background"], used, strict=True) if keep]
    counts, shares = confusion.matrix[used][:, used], confusion.normalised()[used][:, used]
    side = min(max(0.45 * len(ticks) + 2.5, 5.0), 14.0)
    figure = new_figure(2 * side, side)
    plots = figure.subplots(1, 2)
    for plot, values, title in ((plots[0], counts, "boxes"), (plots[1], shares, "share of the true class")):
        plot.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        positions = range(len(ticks)) if len(ticks) < 100 else []
        shown = ticks if len(ticks) < 100 else []
        plot.set_xticks(positions, shown, rotation=90, fontsize="small")
        plot.set_yticks(positions, shown, fontsize="small")
        plot.set(xlabel="True", ylabel="Predicted", title=title)
        for y, x in np.argwhere(counts > 0) if len(ticks) <= 31 else []:
            text = str(values[y, x]) if values is counts else f"{values[y, x]:.2f}"
            color = "white" if shares[y, x] > 0.5 else "black"
            plot.text(x, y, text, ha="center", va="center", fontsize="x-small", color=color)
    save_figure(figure, Path(path))


def draw_history(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write losses, precision, recall and mAP over the epochs; `rows` are those of metrics.jsonl.

    Raises:
        EnvironmentFault: matplotlib is missing.
    """
    figure = new_figure(3 * len(PANELS), 6)
    plots = figure.subplots(2, len(PANELS))
    epochs = [row["epoch"] for row in rows]
    for column, pair in enumerate(PANELS):
        for line, (key, title) in enumerate(pair):
            values = [np.nan if row.get(key) is None else float(row[key]) for row in rows]
            plots[line, column].plot(epochs, values, marker="." if len(rows) < 60 else None)
            plots[line, column].set(title=title, xlabel="epoch" if line else "")
            plots[line, column].grid(alpha=0.3)
            plots[line, column].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    save_figure(figure, Path(path))


def draw_channels(names: Sequence[str], bars: Mapping[str, Sequence[int]], title: str, path: str | Path) -> None:
    """Write a bar for each layer and each entry of ``bars`` (label -> channels), the later before the earlier.

    Raises:
        EnvironmentFault: matplotlib is missing.
    """
    figure = new_figure(max(6.0, 0.14 * len(names) + 2), 4.5)
    plot = figure.subplots()
    places = range(len(names))
    for number, (label, counts) in enumerate(bars.items()):
        shade = 0.85 * (1 - number / max(len(bars) - 1, 1))
        plot.bar(places, counts, color=(shade, shade * 0.7 + 0.25, 0.6 + 0.35 * shade), label=label)
    plot.set_xticks(places, [name.removeprefix("model.") for name in names], rotation=90, fontsize="xx-small")
    plot.set(xlabel="layer", ylabel="channels", xlim=(-0.7, len(names) - 0.3))
    plot.set_title(title, fontsize="small")
    plot.legend(fontsize="small")
    save_figure(figure, Path(path))


def save_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write the figure, nothing of it cut off. Raises StorageError where ``path`` cannot be written."""
    try:
        figure.savefig(path, dpi=dpi, bbox_inches="tight")
    except OSError as error:
        raise StorageError(f"{path}: picture cannot be written: {error.strerror}") from None


def draw_label_statistics(labels: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Write boxes per class, box centres and box sides of labels [n, 5] (class, normalised cx, cy, w, h).

    Raises:
        EnvironmentFault: matplotlib is missing.
    """
    figure = new_figure(15, 5)
    classes, centres, sides = figure.subplots(1, 3)
    counts = np.bincount(labels[:, 0].astype(int), minlength=len(names))
    classes.bar(range(len(names)), counts)
    if len(names) <= 31:
        classes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    classes.set(title=f"{len(labels)} boxes", ylabel="boxes")
    for plot, columns, title, axes in (
        (centres, (1, 2), "box centres", ("x / width", "y / height")),
        (sides, (3, 4), "box sides", ("width / image width", "height / image height")),
    ):
        plot.hist2d(labels[:, columns[0]], labels[:, columns[1]], bins=40, range=((0, 1), (0, 1)), cmap="Blues")
        plot.set(title=title, xlabel=axes[0], ylabel=axes[1])
    centres.invert_yaxis()
    save_figure(figure, Path(path))
