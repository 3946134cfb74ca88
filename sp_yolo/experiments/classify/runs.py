"""One classification run for each seed, with its files, and what they come to together."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

from sp_yolo import __version__
from sp_yolo.errors import EnvironmentFault
from sp_yolo.experiments.classify.data import Source, open_source
from sp_yolo.experiments.classify.settings import KEYS, ClassifyConfig
from sp_yolo.experiments.classify.splits import config_splits
from sp_yolo.experiments.classify.training import fit
from sp_yolo.experiments.statistics import mean_interval
from sp_yolo.report.lines import draw_lines
from sp_yolo.runtime.folder import RunDir


def run_seeds(config: ClassifyConfig, count: int, folder: RunDir) -> None:
    """Train ``count`` times, from ``config.seed`` on; print and write the figures into ``folder``.

    Raises:
        UserError: the data are wrong. NonFiniteError: a run diverged.
    """
    source = open_config_source(config)
    folder.write_yaml("opt.yaml", {**dataclasses.asdict(config), "seeds": count})
    recipe = config.recipe().flat()
    folder.write_yaml("hyp.yaml", {key: recipe[key] for key in KEYS})
    seeds = range(config.seed, config.seed + count)
    runs = [_one_seed(dataclasses.replace(config, seed=seed), source, folder) for seed in seeds]
    curves, summaries = zip(*runs, strict=True)
    folder.write_json("summary.json", _joint_summary(config, summaries))
    for key in ("train_accuracy", "val_accuracy", "test_accuracy"):
        print(f"{key.replace('_', ' ')}: {mean_interval([summary[key] for summary in summaries])}")
    try:
        draw_lines(
            folder.path / "curves.png",
            {
                f"seed {seed}": [(record["epoch"] + 1, record["val_accuracy"]) for record in records]
                for seed, records in zip(seeds, curves, strict=True)
            },
            title=f"{config.dataset}, {config.optimizer}",
            labels=("epoch", "validation accuracy"),
        )
    except EnvironmentFault as fault:
        print(fault)


def open_config_source(config: ClassifyConfig) -> Source:
    return open_source(config.dataset, config.root or None, download=config.download, image_size=config.image_size)


def _one_seed(config: ClassifyConfig, source: Source, folder: RunDir) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One run, its files in a folder of its own if there are several; returns its epochs and its summary."""
    run_folder = RunDir.create(str(folder.path), f"seed{config.seed}", exist_ok=True)
    splits = config_splits(config, source)
    sizes = ", ".join(f"{len(getattr(splits, part))} {part}" for part in ("train", "val", "test"))
    print(f"seed {config.seed}: {sizes} images, {splits.wrong_labels} wrong labels", flush=True)
    outcome = fit(config, splits, on_epoch=_say)
    run_folder.write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in outcome.epochs))
    run_folder.write_json("summary.json", {**outcome.summary, "seed": config.seed})
    return outcome.epochs, outcome.summary


def _say(record: dict[str, Any]) -> None:
    print(
        f"epoch {record['epoch'] + 1:3}  train loss {record['train_loss']:.4f}  val loss {record['val_loss']:.4f}  "
        f"val accuracy {record['val_accuracy']:.4f}  {record['images_per_second']:.0f} images/s",
        flush=True,
    )


def _joint_summary(config: ClassifyConfig, summaries: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Mean and 95 % confidence half-width of every figure over the seeds."""
    intervals = {key: mean_interval([summary[key] for summary in summaries]) for key in summaries[0]}
    return {
        **{key: {"mean": found.mean, "half_width_95": found.half_width} for key, found in intervals.items()},
        "seeds": [config.seed + index for index in range(len(summaries))],
        "versions": {"sp_yolo": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "argv": sys.argv,
    }
