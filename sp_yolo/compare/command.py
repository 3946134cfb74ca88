"""`sp-yolo compare`: a study file, or optimizers named on the command line, to one table with confidence intervals."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from sp_yolo.classify.command import add_data_arguments
from sp_yolo.compare.cells import run_cells
from sp_yolo.compare.report import choose, write_report
from sp_yolo.compare.study import Study, Variant, final_cells, load_study, make_study, quick, tuning_cells
from sp_yolo.config import parse_assignments
from sp_yolo.errors import EnvironmentFault, StorageError, UserError

_DETECTION = ("data", "cfg", "img_size")
_NOT_OPTIONS = ("command", "study", "optimizers", "quick", "jobs", "project", "name")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    absent: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument("study", nargs="?", default="", help="YAML such as studies/mnist-1000.yaml")
    parser.add_argument("--optimizers", default="", help="such as sp,sgd,adamw; instead of a study's variants")
    parser.add_argument("--seeds", type=int, help="of the table (default 5)", **absent)
    parser.add_argument("--tuning-seeds", type=int, help="per learning rate (default 2)", **absent)
    parser.add_argument("--quick", action="store_true", help="the same in miniature, to see that it works")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--project", default="runs/compare")
    parser.add_argument("--name", default="", help="folder below --project (default: the study's name)")
    detection = parser.add_argument_group("detection instead of classification")
    detection.add_argument("--data", help="dataset YAML", **absent)
    detection.add_argument("--cfg", help="model such as yolov7-tiny", **absent)
    detection.add_argument("--img-size", "--img", type=int, help="px", **absent)
    add_data_arguments(parser.add_argument_group("classification (epochs, batch, samples, device, set: both)"))


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing of the study, write its report, print the table; returns the exit code.

    Raises:
        UserError: the study, the data or a flag is wrong.
    """
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: must be at least 1")
    study = the_study(arguments)
    folder = Path(arguments.project) / (arguments.name or study.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made: {error.strerror}") from None
    print(f"{study.name}: {len(tuning_cells(study))} runs to tune, then {study.seeds * len(study.variants)}; {folder}")
    tuning = run_cells(tuning_cells(study), folder, arguments.jobs)
    final = run_cells(final_cells(study, choose(study, tuning)), folder, arguments.jobs)
    command = f"sp-yolo {shlex.join(sys.argv[1:])}"
    try:
        write_report(study, tuning, final, folder, command)
    except EnvironmentFault as fault:
        print(fault)
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"results in {folder}: report.md, cells.csv, curves.png, losses.png, lr.png")
    return 0


def the_study(arguments: argparse.Namespace) -> Study:
    """The study of the file and the flags; a flag wins over the file."""
    given = {key: value for key, value in vars(arguments).items() if key not in _NOT_OPTIONS}
    overrides = parse_assignments(given.pop("assignments", ()))
    counts = {key: given.pop(key) for key in ("seeds", "tuning_seeds") if key in given}
    if arguments.study:
        base = load_study(arguments.study)
    else:
        task = "detect" if any(key in given for key in _DETECTION) else "classify"
        base = Study("compare", task, {}, {}, (), "", 5, 2)
    names = arguments.optimizers or ("" if base.variants else "sp,sgd,adamw")
    variants = [Variant(name, name, (), {}, own_grid=False) for name in names.split(",") if name]
    study = make_study(
        base.name,
        task=base.task,
        options={**base.options, **given},
        overrides={**base.overrides, **overrides},
        variants=variants or list(base.variants),
        baseline="" if variants else base.baseline,
        **{"seeds": base.seeds, "tuning_seeds": base.tuning_seeds, **counts},
    )
    return quick(study) if arguments.quick else study
