"""Running the cells of a study: each leaves one JSON file, written whole, so that an interrupted study goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, as_completed
from pathlib import Path

from sp_yolo.errors import EnvironmentFault, SPYoloError, StorageError
from sp_yolo.experiments.compare.execute import Result, run_cell
from sp_yolo.experiments.compare.pools import Pool
from sp_yolo.experiments.compare.report import choose
from sp_yolo.experiments.compare.study import Cell, Study, final_cells, tuning_cells
from sp_yolo.runtime.folder import RunDir


def run_cells(
    cells: list[Cell], folder: Path, say: Callable[[str], None] = print, pool: Pool | None = None
) -> list[Result]:
    """The results of all ``cells`` of one study, in their order; see :func:`run_all`."""
    return run_all([(cell, folder) for cell in cells], say, pool)


def run_all(
    cells: list[tuple[Cell, Path]], say: Callable[[str], None] = print, pool: Pool | None = None
) -> list[Result]:
    """The results of all ``cells``, each of a study with that folder, in their order.

    Those that folder/cells holds already are not run again. ``pool``: processes that run them, here or elsewhere;
    without one this process does.

    Raises:
        UserError: the data are not there. StorageError: a result cannot be written or read.
        EnvironmentFault: a process died.
    """
    for folder in {folder for _, folder in cells}:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    pending = [(cell, folder) for cell, folder in cells if not _path(cell, folder).exists()]
    for done, ((cell, folder), result) in enumerate(_completed(pending, pool), 1):
        RunDir(folder / "cells").write_json(f"{cell.key}.json", result)
        say(f"[{done}/{len(pending)}] {cell.key}: {result['score']:.4f}")
    return [{**_read(_path(cell, folder)), "variant": cell.variant} for cell, folder in cells]


def _path(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.key}.json"


def _read(path: Path) -> Result:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: the result cannot be read ({error}); remove it to have it made again") from None


def _completed(cells: list[tuple[Cell, Path]], pool: Pool | None) -> Iterator[tuple[tuple[Cell, Path], Result]]:
    """Each cell with its result, as soon as it is done."""
    if pool is None:
        for cell, folder in cells:
            yield (cell, folder), run_cell(cell, folder)
        return
    submit = pool.executor.submit
    futures = {submit(pool.run, _without_workers(cell), folder): (cell, folder) for cell, folder in cells}
    failure: SPYoloError | None = None
    dead: tuple[type[BaseException], ...] = (CancelledError, *pool.broken)
    lost = 0
    try:
        for future in as_completed(futures):
            try:
                result = future.result()
            except dead:
                lost += 1
                continue
            except SPYoloError as error:  # those that are under way are not lost
                failure = failure or error
                for other in futures:
                    other.cancel()
                continue
            yield futures[future], result
    finally:
        for future in futures:
            future.cancel()
    if failure is not None:
        raise failure
    if lost:
        raise EnvironmentFault(f"{lost} cells ended without a result (out of memory?); call again to go on")


def _without_workers(cell: Cell) -> Cell:
    """Where many cells run at once each loads its own images, unless the study says otherwise."""
    return cell if cell.task == "classify" else dataclasses.replace(cell, options={"workers": 0, **cell.options})


def stored(study: Study, rows: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """(tuning, final) results of ``study`` among ``rows``, such as those of a committed file; nothing is run.

    Of the final ones those of the seeds that every variant has.
    """
    by_key = {row["key"]: row for row in rows}
    tuning = _found(tuning_cells(study), by_key)
    if len(tuning) < len(tuning_cells(study)):
        return tuning, []
    final = _found(final_cells(study, choose(study, tuning)), by_key)
    seeds = {variant.name: {r["seed"] for r in final if r["variant"] == variant.name} for variant in study.variants}
    whole = set.intersection(*seeds.values())
    return tuning, [result for result in final if result["seed"] in whole]


def _found(cells: list[Cell], by_key: Mapping[str, Result]) -> list[Result]:
    return [{**by_key[cell.key], "variant": cell.variant} for cell in cells if cell.key in by_key]
