"""`sp-yolo check`: what would silently ruin a training run, found before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sp_yolo.config import REQUIRED, Rule, option
from sp_yolo.errors import UserError

EXAMPLES = """
  {prog} --data data/bccd.yaml
  {prog} --data photos/ --img 320
  {prog} --data mine.yaml --weights yolov7-tiny.pt --cfg yolov7-tiny
"""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Check."""

    data: str = option(REQUIRED, "dataset YAML, or a folder of images with their labels")
    cfg: str = option("", "model to check the anchors of (default: of --weights, yolov7-tiny)")
    weights: str = option("", "weights that training is to start from")
    img_size: int = option(640, "training size in px", "--img-size", "--img", "--imgsz", rule=Rule(1, 8192))
    output: str = option("runs/check", "folder for the page", metavar="DIR")
    accept_losses: bool = option(False, "what is lost is no error, as in train")


OPTIONS = (CheckOptions,)


def run(options: CheckOptions) -> int:
    """Check, print, draw; 0: training would run, 2: it would not."""
    from sp_yolo.engine.check import check_data  # OpenCV is slow to import

    findings = check_data(
        options.data,
        cfg=options.cfg,
        weights=options.weights,
        image_size=options.img_size,
        accepted=options.accept_losses,
        folder=Path(options.output),
    )
    return UserError.exit_code if findings.errors else 0
