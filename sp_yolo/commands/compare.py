"""`sp-yolo compare`: a study file, or optimizers named on the command line, to one table with confidence intervals."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from sp_yolo.config import Rule, option
from sp_yolo.config.options import optional
from sp_yolo.errors import EnvironmentFault, StorageError
from sp_yolo.experiments.classify.settings import ClassifyData, ClassifyTraining
from sp_yolo.experiments.compare.cells import run_cells
from sp_yolo.experiments.compare.report import choose, write_report
from sp_yolo.experiments.compare.study import Study, Variant, final_cells, load_study, make_study, quick, tuning_cells

EXAMPLES = """
  {prog} studies/mnist-1000.yaml --jobs 2
  {prog} --optimizers sp,sgd,adamw --dataset mnist --samples 500
  {prog} --optimizers sp,adamw --data mine.yaml --cfg yolov7-tiny --img 320 --epochs 30
"""


@dataclass(frozen=True)
class CompareOptions:
    """Study."""

    study: str = option("", "YAML such as studies/mnist-1000.yaml", "study")
    optimizers: str = option("", "names with commas (default: the study's variants, or sp,sgd,adamw)")
    seeds: int | None = option(
        None, "runs of each optimizer for the table, with the seeds 0, 1, ... (default: the study's, or 5)"
    )
    tuning_seeds: int | None = option(
        None, "runs of each learning rate that is tried before that (default: the study's, or 2)"
    )
    quick: bool = option(False, "the same in miniature, to see that it works")
    jobs: int = option(1, "processes that share the runs", rule=Rule(1))
    project: str = option("runs/compare", "folder of results")
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
    """Run what is missing of the study, write its report, print the table; returns the exit code.

    Raises:
        UserError: the study, the data or a flag is wrong.
    """
    study = the_study(options, *parts)
    folder = Path(options.project) / (options.name or study.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made: {error.strerror}") from None
    print(f"{study.name}: {len(tuning_cells(study))} runs to tune, then {study.seeds * len(study.variants)}; {folder}")
    tuning = run_cells(tuning_cells(study), folder, options.jobs)
    final = run_cells(final_cells(study, choose(study, tuning)), folder, options.jobs)
    command = f"sp-yolo {shlex.join(sys.argv[1:])}"
    try:
        write_report(study, tuning, final, folder, command)
    except EnvironmentFault as fault:
        print(fault)
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"results in {folder}: report.md, cells.csv, curves.png, losses.png, lr.png")
    return 0


def the_study(options: CompareOptions, *parts: object) -> Study:
    """The study of the file and the flags; a flag wins over the file."""
    given = {key: value for part in parts for key, value in vars(part).items() if value is not None}
    overrides = given.pop("overrides", {})
    if options.study:
        base = load_study(options.study)
    else:
        task = "detect" if any(key in given for key in vars(DetectionOptions())) else "classify"
        base = Study("compare", task, {}, {}, (), "", 5, 2)
    names = options.optimizers or ("" if base.variants else "sp,sgd,adamw")
    variants = [Variant(name, name, (), {}, own_grid=False) for name in names.split(",") if name]
    study = make_study(
        base.name,
        task=base.task,
        options={**base.options, **given},
        overrides={**base.overrides, **overrides},
        variants=variants or list(base.variants),
        baseline="" if variants else base.baseline,
        seeds=base.seeds if options.seeds is None else options.seeds,
        tuning_seeds=base.tuning_seeds if options.tuning_seeds is None else options.tuning_seeds,
    )
    return quick(study) if options.quick else study
