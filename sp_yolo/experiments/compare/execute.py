"""One cell: train, measure, and what is kept of it."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sp_yolo import __version__
from sp_yolo.config import CHECKOUT, Config, DatasetConfig, load_config
from sp_yolo.engine import Trainer
from sp_yolo.engine.inputs import round_up, size_grid
from sp_yolo.engine.plan import choose_size
from sp_yolo.engine.splits import open_dataset, open_measured_split
from sp_yolo.engine.validate import validate
from sp_yolo.errors import NonFiniteError
from sp_yolo.eval import EvalResult
from sp_yolo.experiments.classify import Source, fit, load_classify_config, open_source
from sp_yolo.experiments.classify.splits import config_splits
from sp_yolo.experiments.classify.training import state_bytes, zeros
from sp_yolo.experiments.compare.study import Cell
from sp_yolo.experiments.compare.subset import subset_yaml
from sp_yolo.models import DetectionModel
from sp_yolo.runtime.device import select_compute
from sp_yolo.runtime.words import shown

# At or below this a run is counted as failed: one and a half times chance; of detection a mAP of 1 %.
CHANCE, FAILED_MAP = 1.5, 0.01
FEW_CLASSES = 20  # the score of each class is kept
Result = dict[str, Any]


def run_cell(cell: Cell, folder: Path) -> Result:
    """Run one cell; its result in plain values. Classification uses one thread: ``--jobs`` changes no number."""
    _forget_peak_memory()
    run = {"classify": _classify, "detect": _detect}[cell.task]
    found = run(cell, folder)
    return {
        **{key: getattr(cell, key) for key in ("variant", "optimizer", "seed", "measure")},
        "key": cell.key,
        "trial": dict(cell.trial),
        **found,
        "commit": commit(),
        "versions": f"sp-yolo {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def _forget_peak_memory() -> None:
    """The peak is of a process, which runs many cells."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: resets the peak of the resident set
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@functools.lru_cache(maxsize=1)
def commit() -> str:
    """Of the checkout, "+changes" where it has some; "unknown" of an installed copy."""
    git = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty=+changes"]
    try:
        if not (CHECKOUT / "setup.cfg").is_file():
            raise FileNotFoundError  # an installed copy: a repository around it is somebody else's
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# ------------------------------------------------------------------------------------------------------- classification
@functools.lru_cache(maxsize=1)
def _source(dataset: str, root: str, download: bool, image_size: int) -> Source:
    return open_source(dataset, root or None, download=download, image_size=image_size)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _classify(cell: Cell, folder: Path) -> Result:
    own = {"optimizer": cell.optimizer, "opt": cell.keywords, "seed": cell.seed, "overrides": cell.overrides}
    config = load_classify_config(**cell.options, **own)
    recipe = config.recipe().optimizer
    rates = {"lr0": recipe.lr0, "weight_decay": recipe.weight_decay}
    source = _source(config.dataset, config.root, config.download, config.image_size)
    splits = config_splits(config, source)
    chance = 1 / len(source.names)
    records: list[dict[str, Any]] = []
    try:
        with _one_thread():
            outcome = fit(config, splits, test=cell.measure == "test", on_epoch=records.append)
    except NonFiniteError as error:
        curves = _curves(records, "val_accuracy", "train_loss")
        return {**rates, "score": chance, "val_score": chance, "failed": True, "remark": str(error), **curves}
    found = outcome.summary
    score = found[f"{cell.measure}_accuracy"]
    return {
        **rates,
        "score": score,
        "val_score": found["val_accuracy"],
        "train_score": found["train_accuracy"],
        "failed": score <= CHANCE * chance,
        "zeros": found["zeros"],
        "seconds": found["seconds"],
        "optimizer_bytes": found["optimizer_bytes"],
        **_curves(records, "val_accuracy", "train_loss"),
    }


def _curves(records: list[dict[str, Any]], score: str, loss: str) -> Result:
    """Per epoch: the score on the validation split (None where it was not measured) and the training loss."""
    return {"curve": [record[score] for record in records], "losses": [record[loss] for record in records]}


# ------------------------------------------------------------------------------------------------------------ detection
def _detect(cell: Cell, folder: Path) -> Result:
    """Train; the score is the mAP of the epoch that is best on the validation split, there or on the test split."""
    options, overrides = dict(cell.options), dict(cell.overrides)
    samples, few = options.pop("samples", 0), options.pop("val_samples", 0)
    if samples or few:
        root = str(overrides.pop("root", "") or options.pop("root", ""))
        options["data"] = subset_yaml(options["data"], root, samples, cell.seed, folder, val_samples=few)
    own = {"optimizer": cell.optimizer, "opt": cell.keywords, "seed": cell.seed, "overrides": overrides}
    place = {"project": str(folder / "runs"), "name": cell.key, "exist_ok": True}
    config = load_config(**{"quiet": True, **options, **own, **place})
    run = folder / "runs" / cell.key
    run.mkdir(parents=True, exist_ok=True)
    try:
        with open(run / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log), shown():
            trainer = Trainer(config)
            return _detection_result(cell, trainer, trainer.fit(), run)
    except NonFiniteError as error:
        failed = {"score": 0.0, "val_score": 0.0, "failed": True, "remark": str(error)}
        return {**failed, **_curves(_records(run), "map50_95", "total")}
    finally:
        shutil.rmtree(run / "weights", ignore_errors=True)  # tens of MB for each run


def _detection_result(cell: Cell, trainer: Trainer, summary: Result, run: Path) -> Result:
    config, state, recipe = trainer.options, trainer.run.state, trainer.run.told["hyp"]
    dataset = open_dataset(config.data, config.root)
    model = state.ema.module  # which ``fit`` has left with the best weights
    scores = {"val": float(summary["best"]["map50_95"])}
    found: Result = {"map50": float(summary["best"]["map50"])}
    if cell.measure == "test":
        results = {s: measured(model, dataset, s, config) for s in ("train", "test") if getattr(dataset, s)}
        scores |= {split: float(result.map50_95) for split, result in results.items()}
        if "test" in results:
            found["map50"] = float(results["test"].map50)
            if len(results["test"].per_class) <= FEW_CLASSES:
                found["classes"] = {entry.name: round(float(entry.ap), 4) for entry in results["test"].per_class}
    score = scores.get(cell.measure, scores["val"])
    return {
        **{key: float(recipe[key]) for key in ("lr0", "weight_decay")},
        "score": score,
        "val_score": scores["val"],
        **({"train_score": scores["train"]} if "train" in scores else {}),
        **found,
        "failed": score <= FAILED_MAP,
        "zeros": zeros(model),
        "seconds": summary["wall_seconds"],
        "peak_bytes": summary["peak_memory_bytes"],
        "optimizer_bytes": state_bytes(state.optimizer.state),
        "device": summary["device"],
        **_curves(_records(run), "map50_95", "total"),
    }


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measured(model: DetectionModel, dataset: DatasetConfig, split: str, config: Config) -> EvalResult:
    """``model`` on a split, measured as the trainer's validation does."""
    compute = select_compute(config.device, config.amp)
    stride = size_grid(model)
    data = open_measured_split(
        dataset,
        split,
        image_size=round_up(choose_size(config, dataset).val, stride),
        batch_size=32,
        stride=stride,
        single_class=config.single_cls,
        workers=0,
    )
    model = model.to(compute.device).to(memory_format=torch.channels_last).eval()
    validate(model, data.loader.epoch(0), data.evaluator, compute)
    return data.evaluator.compute()
