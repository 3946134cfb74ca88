"""`sp-yolo classify`: train small networks on MNIST, CIFAR-10 or any image folder, one run for each seed."""

from __future__ import annotations

from dataclasses import dataclass

from sp_yolo.config import Rule, option
from sp_yolo.experiments.classify.runs import run_seeds
from sp_yolo.experiments.classify.settings import ClassifyConfig
from sp_yolo.runtime.folder import RunDir

EXAMPLES = """
  {prog} --dataset mnist --download --samples 1000 --seeds 5
  {prog} --dataset cifar10 --model cnn-bn --optimizer adamw --set lr0=0.001
  {prog} --dataset my-images/ --image-size 64 --epochs 10
"""


@dataclass(frozen=True)
class RunsOptions:
    """Runs and results."""

    seeds: int = option(1, "number of runs, with the seeds --seed, --seed + 1, ...", rule=Rule(1))
    project: str = option("runs/classify", "folder of run directories")
    name: str = option("exp", "run directory")
    exist_ok: bool = option(False, "write into an existing run directory")


OPTIONS = (ClassifyConfig, RunsOptions)


def run(config: ClassifyConfig, runs: RunsOptions) -> int:
    """Train once for each seed, print and write the figures; returns the exit code."""
    folder = RunDir.create(runs.project, runs.name, runs.exist_ok)
    run_seeds(config, runs.seeds, folder)
    print(f"results in {folder.path}")
    return 0
