"""`sp-yolo classify`: train small networks on MNIST, CIFAR-10 or any image folder, one run for each seed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import torch

from sp_yolo import __version__
from sp_yolo.classify.data import Source, open_source
from sp_yolo.classify.models import MODELS
from sp_yolo.classify.settings import OPTIMIZERS, ClassifyConfig, load_classify_config
from sp_yolo.classify.splits import config_splits
from sp_yolo.classify.training import fit
from sp_yolo.compare.plots import draw_lines
from sp_yolo.compare.statistics import mean_interval
from sp_yolo.config import parse_assignments
from sp_yolo.engine.rundir import RunDir
from sp_yolo.errors import EnvironmentFault, UserError


def add_data_arguments(parser: argparse._ActionsContainer) -> None:
    """The flags that say what is trained on; `sp-yolo compare` has them too."""
    absent: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument("--dataset", help="mnist (default), cifar10, toy, or a path: idx, npz, image folder", **absent)
    parser.add_argument("--root", help="where mnist or cifar10 lies (default datasets/NAME)", **absent)
    parser.add_argument("--download", action="store_true", help="let torchvision fetch it first", **absent)
    parser.add_argument("--image-size", type=int, help="px, of image folders and toy (default 32)", **absent)
    parser.add_argument("--samples", type=int, help="training images, stratified (default 0: all)", **absent)
    parser.add_argument("--val-samples", type=int, help="cut from the training data (default 1000)", **absent)
    parser.add_argument("--label-noise", type=float, metavar="SHARE", help="wrong training labels", **absent)
    parser.add_argument("--model", choices=MODELS, help="default cnn", **absent)
    parser.add_argument("--epochs", type=int, help="default 20", **absent)
    parser.add_argument("--batch-size", "--batch", type=int, help="default 50", **absent)
    parser.add_argument(
        "--augment", action=argparse.BooleanOptionalAction, help="crop and flip (default: colour only)", **absent
    )
    parser.add_argument("--device", help="cpu, 0, 1, ... ('' = first GPU, else CPU)", **absent)
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", dest="assignments", help="hyperparameter; repeatable", **absent
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sp", help="default sp (robust mode)")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one run each")
    parser.add_argument("--project", default="runs/classify")
    parser.add_argument("--name", default="exp")
    parser.add_argument("--exist-ok", action="store_true")


_OWN = ("command", "seeds", "project", "name", "exist_ok")


def run(arguments: argparse.Namespace) -> int:
    """Train once for each seed, print and write the figures; returns the exit code.

    Raises:
        UserError: data or a flag is wrong. NonFiniteError: a run diverged.
    """
    options = {key: value for key, value in vars(arguments).items() if key not in _OWN}
    options["overrides"] = parse_assignments(options.pop("assignments", ()))
    config = load_classify_config(**options)
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: must be at least 1")
    source = open_config_source(config)
    folder = RunDir.create(arguments.project, arguments.name, arguments.exist_ok)
    folder.write_yaml("opt.yaml", {**dataclasses.asdict(config), "seeds": arguments.seeds})
    folder.write_yaml("hyp.yaml", config.hyp())
    seeds = range(config.seed, config.seed + arguments.seeds)
    curves, summaries = zip(
        *(_one_seed(dataclasses.replace(config, seed=seed), source, folder) for seed in seeds), strict=True
    )
    folder.write_json("summary.json", _joint_summary(config, summaries))
    for key in ("train_accuracy", "val_accuracy", "test_accuracy"):
        print(f"{key.replace('_', ' ')}: {mean_interval([summary[key] for summary in summaries])}")
    try:
        draw_lines(
            folder.path / "curves.png",
            {
                f"seed {seed}": [(r["epoch"] + 1, r["val_accuracy"]) for r in rows]
                for seed, rows in zip(seeds, curves, strict=True)
            },
            title=f"{config.dataset}, {config.optimizer}",
            labels=("epoch", "validation accuracy"),
        )
    except EnvironmentFault as fault:
        print(fault)
    print(f"results in {folder.path}")
    return 0


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
