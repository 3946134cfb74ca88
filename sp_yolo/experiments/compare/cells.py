"""Running the cells of a study: each leaves one JSON file, written whole, so that an interrupted study goes on."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from sp_yolo.config import Config, DatasetConfig, load_config
from sp_yolo.engine import Trainer
from sp_yolo.engine.inputs import round_up, size_grid
from sp_yolo.engine.plan import choose_size
from sp_yolo.engine.splits import open_dataset, open_measured_split
from sp_yolo.engine.validate import validate
from sp_yolo.errors import EnvironmentFault, NonFiniteError, StorageError
from sp_yolo.experiments.classify import Source, fit, load_classify_config, open_source
from sp_yolo.experiments.classify.splits import config_splits
from sp_yolo.experiments.classify.training import state_bytes, zeros
from sp_yolo.experiments.compare.study import Cell
from sp_yolo.experiments.compare.subset import subset_yaml
from sp_yolo.models import DetectionModel, model_from_weights
from sp_yolo.runtime.checkpoint import load_checkpoint
from sp_yolo.runtime.device import select_compute
from sp_yolo.runtime.folder import RunDir

# At or below this a run is counted as failed: one and a half times chance; of detection a mAP of 1 %.
CHANCE, FAILED_MAP = 1.5, 0.01
Result = dict[str, Any]


def run_cells(cells: list[Cell], folder: Path, jobs: int, say: Callable[[str], None] = print) -> list[Result]:
    """The results of all ``cells``, in their order; those that ``folder``/cells holds already are not run again.

    ``jobs`` processes with one thread each; 1 runs in this process.

    Raises:
        UserError: the data are not there. StorageError: a result cannot be written or read.
        EnvironmentFault: a process died.
    """
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    pending = [cell for cell in cells if not _path(cell, folder).exists()]
    for done, cell in enumerate(_completed(pending, folder, jobs), 1):
        say(f"[{done}/{len(pending)}] {cell.key}: {_read(_path(cell, folder))['score']:.4f}")
    return [{**_read(_path(cell, folder)), "variant": cell.variant} for cell in cells]


def _path(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.key}.json"


def _read(path: Path) -> Result:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: the result cannot be read ({error}); remove it to have it made again") from None


def _completed(cells: list[Cell], folder: Path, jobs: int) -> Iterator[Cell]:
    """Each cell as soon as its file is there."""
    if jobs == 1:
        for cell in cells:
            run_cell(cell, folder)
            yield cell
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(jobs, len(cells) or 1), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(run_cell, cell, folder): cell for cell in cells}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool:
            raise EnvironmentFault("a process ended without a result (out of memory?); call again to go on") from None
        finally:
            pool.shutdown(cancel_futures=True)


def run_cell(cell: Cell, folder: Path) -> None:
    """Run one cell and write its file. Classification uses one thread, so that ``--jobs`` changes no number."""
    run = {"classify": _classify, "detect": _detect}[cell.task]
    result = {
        **{key: getattr(cell, key) for key in ("variant", "optimizer", "lr0", "seed", "measure")},
        **run(cell, folder),
    }
    RunDir(folder / "cells").write_json(f"{cell.key}.json", result)


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
    config = load_classify_config(**cell.options, optimizer=cell.optimizer, seed=cell.seed, overrides=cell.overrides)
    source = _source(config.dataset, config.root, config.download, config.image_size)
    splits = config_splits(config, source)
    chance = 1 / len(source.names)
    records: list[dict[str, Any]] = []
    try:
        with _one_thread():
            outcome = fit(config, splits, test=cell.measure == "test", on_epoch=records.append)
    except NonFiniteError as error:
        curves = _curves(records, "val_accuracy", "train_loss")
        return {"score": chance, "val_score": chance, "failed": True, "remark": str(error), **curves}
    found = outcome.summary
    score = found[f"{cell.measure}_accuracy"]
    return {
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
    samples = options.pop("samples", 0)
    if samples:
        options["data"] = subset_yaml(
            options["data"], str(overrides.pop("root", "") or options.pop("root", "")), samples, cell.seed, folder
        )
    own = {"optimizer": cell.optimizer, "seed": cell.seed, "overrides": overrides}
    place = {"project": str(folder / "runs"), "name": cell.key, "exist_ok": True}
    config = load_config(**{"quiet": True, **options, **own, **place})
    run = folder / "runs" / cell.key
    run.mkdir(parents=True, exist_ok=True)
    try:
        with open(run / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            summary = Trainer(config).fit()
            return _detection_result(cell, config, summary, run)
    except NonFiniteError as error:
        failed = {"score": 0.0, "val_score": 0.0, "failed": True, "remark": str(error)}
        return {**failed, **_curves(_records(run), "map50_95", "total")}
    finally:
        shutil.rmtree(run / "weights", ignore_errors=True)  # tens of MB for each run


def _detection_result(cell: Cell, config: Config, summary: Result, run: Path) -> Result:
    dataset = open_dataset(config.data, config.root)
    model = model_from_weights(run / "weights" / "best.pt")
    scores = {"val": float(summary["best"]["map50_95"])}
    if cell.measure == "test":
        splits = [split for split in ("train", "test") if getattr(dataset, split)]
        scores |= {split: measure_map(model, dataset, split, config) for split in splits}
    score = scores.get(cell.measure, scores["val"])
    optimizer = load_checkpoint(run / "weights" / "last.pt")["optimizer"]
    return {
        "score": score,
        "val_score": scores["val"],
        **({"train_score": scores["train"]} if "train" in scores else {}),
        "failed": score <= FAILED_MAP,
        "zeros": zeros(model),
        "seconds": summary["wall_seconds"],
        "optimizer_bytes": state_bytes(optimizer["state"]),
        **_curves(_records(run), "map50_95", "total"),
    }


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measure_map(model: DetectionModel, dataset: DatasetConfig, split: str, config: Config) -> float:
    """mAP@.5:.95 of ``model`` on a split, measured as the trainer's validation does."""
    compute = select_compute(config.device, config.amp)
    stride = size_grid(model)
    measured = open_measured_split(
        dataset,
        split,
        image_size=round_up(choose_size(config, dataset).val, stride),
        batch_size=32,
        stride=stride,
        single_class=config.single_cls,
        workers=0,
    )
    model = model.to(compute.device).to(memory_format=torch.channels_last).eval()
    validate(model, measured.loader.epoch(0), measured.evaluator, compute)
    return float(measured.evaluator.compute().map50_95)
