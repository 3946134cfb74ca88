"""`sp-yolo yolov7`: run a script of an untouched YOLOv7 checkout with SP as its optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from sp_yolo.config import REQUIRED, option
from sp_yolo.plugins.settings import parse_settings
from sp_yolo.plugins.yolov7 import run_script

EXAMPLES = """
  {prog} ~/yolov7 -- --data data/coco.yaml --cfg cfg/training/yolov7.yaml --weights '' --batch-size 16
  {prog} ~/yolov7 --script train_aux.py -- --cfg cfg/training/yolov7-w6.yaml --weights ''
  {prog} ~/yolov7 --sp sigma_head=0.5 --sp total_steps=90000 -- --data data/coco.yaml
"""


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Host."""

    directory: str = option(
        REQUIRED, "checkout of YOLOv7 (or its installed package's folder)", "directory", metavar="DIR"
    )
    script: str = option("train.py", "script to run: train_aux.py for P6 models, test.py, ...")
    sp: tuple[str, ...] = option((), "settings of SP", metavar="KEY=VALUE", repeated=True)
    no_compat: bool = option(False, "no patches for today's torch and numpy")
    arguments: tuple[str, ...] = option(
        REQUIRED, "after --: the script's own arguments", "arguments", metavar="ARGUMENT"
    )


OPTIONS = (HostOptions,)


def run(options: HostOptions) -> int:
    """Run the script; returns its exit code."""
    settings = parse_settings(list(options.sp))
    return run_script(
        options.directory, options.arguments, script=options.script, compat=not options.no_compat, **settings
    )
