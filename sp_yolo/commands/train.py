"""`sp-yolo train` and train_sp.py: the original's flags with their names, defaults and meaning, then ours."""

from __future__ import annotations

from dataclasses import dataclass

from sp_yolo.config import Config, Rule, option
from sp_yolo.errors import UserError

EXAMPLES = """
  {prog} --data data/bccd.yaml --cfg yolov7-tiny --img 320 --epochs 30
  {prog} --data photos/ --weights yolov7-tiny.pt --batch 16 --set lr0=0.001
  {prog} --resume runs/train/exp --epochs 60
"""


@dataclass(frozen=True)
class EvolveOptions:
    """Evolution instead of one run."""

    evolve: int | None = option(
        None, "evolve the recipe in N runs (default 300)", rule=Rule(1), metavar="N", without=300
    )
    evolve_minutes: float | None = option(
        None, "start no further run of --evolve after M minutes", rule=Rule(0), metavar="M"
    )


@dataclass(frozen=True)
class FormerOptions:
    """Accepted without effect."""

    local_rank: int | None = option(
        None, "of old launchers; torchrun's environment decides", "--local_rank", "--local-rank", metavar="N"
    )
    v5_metric: bool = option(False, "training reports pycocotools' metric (see val)")
    bucket: str | None = option(None, "", without="")
    entity: str | None = option(None, "", without="")
    upload_dataset: str | None = option(None, "", "--upload_dataset", without="")
    bbox_interval: str | None = option(None, "", "--bbox_interval", without="")
    artifact_alias: str | None = option(None, "", "--artifact_alias", without="")


OPTIONS = (Config, EvolveOptions, FormerOptions)
# The original's flags of Weights & Biases, and what replaces them.
_WANDB = {
    "entity": "Weights & Biases is --log wandb here, the entity its own variable WANDB_ENTITY",
    "bucket": "nothing is uploaded to a bucket; --log wandb, mlflow or trackio keep pictures and report",
    "upload_dataset": "data are not uploaded; --log wandb (Weights & Biases) keeps figures, pictures and report",
    "bbox_interval": "drop the flag: --log wandb (Weights & Biases) keeps the pictures that the run draws",
    "artifact_alias": "data are not uploaded, so no artifact of them has an alias; --log wandb is Weights & Biases",
}


def run(config: Config, evolution: EvolveOptions, former: FormerOptions) -> int:
    """Train, once or many times; returns the exit code."""
    for name in _WANDB:
        if getattr(former, name) is not None:
            raise UserError(f"--{name}: {_WANDB[name]}")
    generations, minutes = evolution.evolve, evolution.evolve_minutes
    if minutes is not None and (generations is None or minutes <= 0):
        raise UserError(f"--evolve-minutes {minutes:g}: must be above 0, and bounds --evolve")
    if generations is not None:
        from sp_yolo.experiments.evolve import evolve

        evolve(config, generations=generations, minutes=minutes or 0.0)
        return 0
    from sp_yolo.engine import Trainer  # OpenCV is slow to import: --help and a wrong flag should not wait

    Trainer(config).fit()
    return 0
