"""`sp-yolo compare`: a study file, or optimizers named on the command line, to one table with confidence intervals."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from sp_yolo.config import Rule, option
from sp_yolo.config.options import optional
from sp_yolo.engine.foreign import package_of
from sp_yolo.errors import EnvironmentFault, StorageError, UserError
from sp_yolo.experiments.classify.settings import ClassifyData, ClassifyTraining
from sp_yolo.experiments.compare.cells import run_all
from sp_yolo.experiments.compare.execute import Result
from sp_yolo.experiments.compare.page import Page, make_page, write_page
from sp_yolo.experiments.compare.pools import Pool, cluster_pool, local_pool
from sp_yolo.experiments.compare.quick import quick
from sp_yolo.experiments.compare.report import choose, write_report
from sp_yolo.experiments.compare.store import take_in
from sp_yolo.experiments.compare.study import (
    Cell,
    Study,
    Variant,
    final_cells,
    load_study,
    make_study,
    tuning_cells,
)
from sp_yolo.experiments.compare.trials import TUNINGS

EXAMPLES = """
  {prog} studies/mnist-1000.yaml --jobs 2
  {prog} --optimizers sp,sgd,adamw --dataset mnist --samples 500
  {prog} --optimizers sp,adamw --data mine.yaml --cfg yolov7-tiny --img 320 --epochs 30
"""


@dataclass(frozen=True)
class CompareOptions:
    """Study."""

    studies: tuple[str, ...] = option(
        (), "YAML such as studies/mnist-1000.yaml; several: one page about all", "studies"
    )
    optimizers: str = option("", "names with commas (default: the study's variants, or sp,sgd,adamw)")
    seeds: int | None = option(
        None, "runs of each optimizer for the table, with the seeds 0, 1, ... (default: the study's, or 5)"
    )
    tuning_seeds: int | None = option(None, "runs of each trial before that (default: the study's, or 2)")
    tuning: str | None = option(None, "what is tried (default: the study's)", rule=Rule(words=TUNINGS))
    quick: bool = option(False, "the same in miniature, to see that it works")
    jobs: int = option(1, "processes that share the runs", rule=Rule(1))
    scheduler: str = option("", "Dask cluster such as tcp://HOST:8786 that runs them instead", metavar="ADDRESS")
    project: str = option("runs/compare", "folder of results")
    cells: tuple[str, ...] = option((), "results from elsewhere, not to be run again", metavar="CSV")
    name: str = option("", "folder below --project (default: the study's name)")


@dataclass(frozen=True)
class DetectionOptions:
    """Detection instead of classification, 300 epochs and 16 images per step unless given."""

    data: str | None = option(None, "dataset YAML or folder; with it detectors are trained")
    cfg: str | None = option(None, "model (default yolov7-tiny)")
    img_size: int | None = option(None, "px (default 640)", "--img-size", "--img", "--imgsz", rule=Rule(1, 8192))


# Of the data and the training only what is given counts: the rest is the study's.
OPTIONS = (CompareOptions, DetectionOptions, optional(ClassifyData), optional(ClassifyTraining))


def run(options: CompareOptions, *parts: object) -> int:
    """Run what is missing of the studies, write their reports, print the tables; returns the exit code.

    Raises:
        UserError: a study, the data or a flag is wrong.
    """
    studies = [the_study(path, options, *parts) for path in options.studies or ("",)]
    folders = _folders(options, studies)
    for study, folder in zip(studies, folders, strict=True):
        taken = take_in([Path(path) for path in options.cells], folder)
        tune, measure = len(tuning_cells(study)), study.seeds * len(study.variants)
        print(
            f"{study.name}: {tune} runs to tune, then {measure}; {folder}" + f"; {taken} from elsewhere" * bool(taken)
        )
    command = f"sp-yolo {shlex.join(sys.argv[1:])}"
    packages = {package_of(variant.optimizer) for study in studies for variant in study.variants}
    if options.scheduler and options.jobs > 1:
        raise UserError("--jobs and --scheduler: give one of the two")
    place = cluster_pool(options.scheduler) if options.scheduler else local_pool(options.jobs, sorted(packages - {""}))
    with place as pool:
        tuning = _results(studies, folders, [tuning_cells(study) for study in studies], pool)
        chosen = [choose(study, own) for study, own in zip(studies, tuning, strict=True)]
        wanted = [final_cells(study, own) for study, own in zip(studies, chosen, strict=True)]
        final = _results(studies, folders, wanted, pool)
    for study, folder, tuned, measured in zip(studies, folders, tuning, final, strict=True):
        try:
            write_report(study, tuned, measured, folder, command)
        except EnvironmentFault as fault:
            print(fault)
        print((folder / "report.md").read_text(encoding="utf-8"))
        print(f"results in {folder}: report.md, cells.csv, curves.png, losses.png, lr.png")
    if len(studies) > 1:
        _write_page(make_page(studies, tuning, final), folders[0].parent, command)
    return 0


def _write_page(page: Page, folder: Path, command: str) -> None:
    try:
        write_page(page, folder, command)
    except EnvironmentFault as fault:
        print(fault)
    print((folder / "page.md").read_text(encoding="utf-8"))
    print(f"page in {folder}: page.md, page.csv, ranks.png")


def _folders(options: CompareOptions, studies: list[Study]) -> list[Path]:
    """A folder for each study, made."""
    if len({study.name for study in studies}) < len(studies):
        raise UserError("the studies need different names: " + " ".join(study.name for study in studies))
    if len(studies) == 1:
        folders = [Path(options.project) / (options.name or studies[0].name)]
    else:
        folders = [Path(options.project) / options.name / study.name for study in studies]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be made: {error.strerror}") from None
    return folders


def _results(
    studies: list[Study], folders: list[Path], cells: list[list[Cell]], pool: Pool | None
) -> list[list[Result]]:
    """The results of each study's cells; those of all studies are run side by side."""
    pairs = [(cell, folder) for own, folder in zip(cells, folders, strict=True) for cell in own]
    found = iter(run_all(pairs, pool=pool))
    return [[next(found) for _ in own] for own in cells]


def the_study(path: str, options: CompareOptions, *parts: object) -> Study:
    """The study of the file, "" for none, and the flags; a flag wins over the file."""
    given = {key: value for part in parts for key, value in vars(part).items() if value is not None}
    overrides = given.pop("overrides", {})
    if path:
        base = load_study(path)
    else:
        task = "detect" if any(key in given for key in vars(DetectionOptions())) else "classify"
        base = Study("compare", task, {}, {}, (), "", 5, 2)
    names = options.optimizers or ("" if base.variants else "sp,sgd,adamw")
    variants = [Variant(name, name) for name in names.split(",") if name]
    study = make_study(
        base.name,
        task=base.task,
        options={**base.options, **given},
        overrides={**base.overrides, **overrides},
        variants=variants or list(base.variants),
        baseline="" if variants else base.baseline,
        seeds=base.seeds if options.seeds is None else options.seeds,
        tuning_seeds=base.tuning_seeds if options.tuning_seeds is None else options.tuning_seeds,
        tuning=dataclasses.replace(base.tuning, how=options.tuning or base.tuning.how),
    )
    return quick(study) if options.quick else study
