"""`train_sp.py --evolve`: better hyperparameters by mutation and selection, a training run for each candidate.

After the original's description: a parent is drawn from the best five by
fitness, its values are multiplied by random factors, and only the last epoch of a run is validated.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sp_yolo.config import HYP_RULES, Config, read_yaml
from sp_yolo.engine import Trainer
from sp_yolo.engine.progress import fitness
from sp_yolo.errors import EnvironmentFault, NonFiniteError, StorageError, UserError
from sp_yolo.report.plots import new_figure, save_figure
from sp_yolo.runtime.folder import RunDir
from sp_yolo.trackers import Callback, Record

GENERATIONS = 300
PARENTS = 5
MUTATED, SPREAD, FACTORS = 0.8, 0.2, (0.3, 3.0)  # share of the keys, standard deviation, bounds of a factor
# The distance to 1 is what is multiplied: .9 and .99 are as far apart as .99 and .999.
_NEAR_ONE = ("momentum", "warmup_momentum", "ema_decay", "sp_rho")
# Without an effect, or bound to one another.
_KEPT = ("iou_t", "sp_start", "sp_end")
_COLUMNS = ("generation", "fitness", "map50", "map50_95")
_OPTIONS = "evolve.yaml"


def evolve(config: Config, *, generations: int = GENERATIONS, minutes: float = 0.0) -> Path:
    """Train ``generations`` candidates, or until ``minutes`` (0: no limit) are over; returns hyp_evolved.yaml.

    The folder (runs/evolve/exp, or project and name of ``config``) holds evolve.csv (a row for each generation),
    hyp_evolved.yaml (the best so far, a recipe for ``--hyp``), evolve.png and the run of the best generation. Called
    again with the same options it goes on after the last finished generation. Generation 0 is the recipe itself.

    Raises:
        UserError: the folder holds something else or was made with other options; several processes.
    """
    if config.resume:
        raise UserError("--evolve goes on by itself when called again; drop --resume")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--evolve runs in one process; start it without torchrun")
    project = "runs/evolve" if config.project == Config().project else config.project
    folder = Path(project) / config.name
    run = _open_folder(folder, config)
    started = time.monotonic()
    rows = _read_rows(folder)
    while len(rows) < generations:
        if minutes and rows and time.monotonic() - started > 60 * minutes:
            print(f"--evolve-minutes {minutes:g} are over")
            break
        rows.append(_generation(config, folder, rows))
        _keep_best_run(folder, rows)
        run.write("evolve.csv", _csv(rows))
        _write_best(run, folder, rows)
        last = rows[-1]
        print(f"generation {last['generation']}: fitness {last['fitness']:.4f}, best {best(rows)['fitness']:.4f}")
    try:
        draw(rows, folder / "evolve.png")
    except EnvironmentFault as fault:
        print(fault)
    found = best(rows)
    path = folder / "hyp_evolved.yaml"
    print(f"best of {len(rows)} generations: {found['generation']}, fitness {found['fitness']:.4f}; use --hyp {path}")
    return path


def _open_folder(folder: Path, config: Config) -> RunDir:
    """The folder, new or of the same options."""
    options = {key: value for key, value in config.as_dict().items() if key not in ("quiet", "workers")}
    options = json.loads(json.dumps(options))
    marker = folder / _OPTIONS
    if not marker.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds no evolution; choose another --name")
        run = RunDir.create(str(folder.parent), folder.name, exist_ok=True)
        run.write_yaml(_OPTIONS, options)
        return run
    kept = dict(read_yaml(marker))
    for key, value in options.items():
        if kept.get(key) != value:
            flag = f"--{key.replace('_', '-')}"
            raise UserError(f"{folder}: was begun with {flag} {kept.get(key)}, not {value}; choose another --name")
    return RunDir(folder)


def _generation(config: Config, folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Train one candidate; its row. A run that diverges has fitness 0."""
    number = len(rows)
    overrides = dict(config.overrides)
    if rows:
        stream = np.random.default_rng((config.seed, number))
        parent = choose_parent(rows, stream)
        overrides |= mutate({key: value for key, value in parent.items() if key not in _COLUMNS}, stream)
    name = _run_name(number)
    found = train_once(dataclasses.replace(config, overrides=overrides, project=str(folder), name=name))
    hyp = read_yaml(folder / name / "hyp.yaml")
    return {"generation": number, **found, **{key: hyp[key] for key in mutable_keys(hyp, config.optimizer)}}


class _Watch(Callback):
    def __init__(self, see: Callable[[Record], None]) -> None:
        self._see = see

    def on_epoch(self, record: Record) -> None:
        self._see(record)


def train_once(config: Config, on_epoch: Callable[[Record], None] | None = None) -> dict[str, float]:
    """Train as ``config`` says; its last epoch's fitness, map50, map50_95, zeros if it diverges.

    Only the last epoch is validated, unless ``on_epoch`` looks at the record of each.
    """
    try:
        run = dataclasses.replace(config, notest=on_epoch is None, nosave=True, exist_ok=True)
        final = Trainer(run, [_Watch(on_epoch)] if on_epoch else []).fit()["final"]
    except NonFiniteError as error:
        print(error)
        final = {"map50": 0.0, "map50_95": 0.0}
    measures = {key: float(final[key]) for key in ("map50", "map50_95")}
    return {"fitness": fitness(measures), **measures}


def mutable_keys(hyp: Mapping[str, Any], optimizer: str) -> list[str]:
    """The keys that mutation changes: numbers other than zero and counts; sp_* only with SP."""
    return [
        key
        for key, value in hyp.items()
        if isinstance(value, float)
        and value != 0
        and key not in _KEPT
        and not HYP_RULES[key].whole
        and (optimizer == "sp" or not key.startswith("sp_"))
    ]


def choose_parent(rows: list[dict[str, Any]], stream: np.random.Generator) -> dict[str, Any]:
    """One of the best ``PARENTS`` rows, the more probable the more its fitness exceeds that of the worst of them."""
    ranked = sorted(rows, key=lambda row: -row["fitness"])[:PARENTS]
    weights = np.array([row["fitness"] for row in ranked])
    weights = weights - weights.min() + 1e-6
    return ranked[int(stream.choice(len(ranked), p=weights / weights.sum()))]


def mutate(values: Mapping[str, float], stream: np.random.Generator) -> dict[str, float]:
    """``values``, about ``MUTATED`` of them times 1 + N(0, SPREAD), within FACTORS and each key's bounds."""
    changed = np.zeros(len(values), bool)
    while not changed.any():
        changed = stream.random(len(values)) < MUTATED
    factors = np.clip(1 + stream.normal(0, SPREAD, len(values)), *FACTORS)
    result = {}
    for (key, value), factor, change in zip(values.items(), factors.tolist(), changed, strict=True):
        rule = HYP_RULES[key]
        moved = 1 - (1 - value) * factor if key in _NEAR_ONE else value * factor
        result[key] = round(min(max(moved, rule.low), rule.high), 6) if change else value
    return result


# ---------------------------------------------------------------------------------------------------------------- files
def _run_name(generation: int) -> str:
    return f"generation{generation:03d}"


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fittest row, the earliest of equals."""
    return max(rows, key=lambda row: (row["fitness"], -row["generation"]))


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "evolve.csv"
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from None
    return [{**row, "generation": int(row["generation"])} for row in table]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _keep_best_run(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Of all runs only the fittest keeps its folder: each holds weights and pictures."""
    kept = best(rows)["generation"]
    for row in rows:
        if row["generation"] != kept:
            shutil.rmtree(folder / _run_name(row["generation"]), ignore_errors=True)


def _write_best(run: RunDir, folder: Path, rows: list[dict[str, Any]]) -> None:
    found = best(rows)
    hyp = dict(read_yaml(folder / _run_name(found["generation"]) / "hyp.yaml"))
    head = (
        f"# Generation {found['generation']} of {len(rows)}: fitness {found['fitness']:.4f}, "
        f"mAP@.5 {found['map50']:.4f}, mAP@.5:.95 {found['map50_95']:.4f}, "
        "measured on the split that it was chosen by.\n"
    )
    run.write("hyp_evolved.yaml", head + yaml.safe_dump(hyp, sort_keys=False))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Fitness over the generations, and over each value that was mutated.

    Raises:
        EnvironmentFault: matplotlib is missing. StorageError: ``path`` cannot be written.
    """
    keys = ["generation", *(key for key in rows[0] if key not in _COLUMNS)]
    columns = 5
    figure = new_figure(3 * columns, 2.5 * -(-len(keys) // columns))
    heights, top = [row["fitness"] for row in rows], best(rows)
    for place, key in enumerate(keys, 1):
        axes = figure.add_subplot(-(-len(keys) // columns), columns, place)
        axes.scatter([row[key] for row in rows], heights, s=12, c=[row["generation"] for row in rows])
        axes.plot(top[key], top["fitness"], "k+", markersize=12)
        axes.set_title(f"{key} {top[key]:.4g}", fontsize=9)
    save_figure(figure, path, dpi=100)
