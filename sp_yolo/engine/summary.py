"""What a run says about itself: the record of an epoch, and the files and words at its end."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from sp_yolo import __version__
from sp_yolo.engine.progress import PARTS, Progress
from sp_yolo.engine.splits import MeasuredSplit
from sp_yolo.eval import EvalResult
from sp_yolo.models import DetectionModel
from sp_yolo.optim import SP
from sp_yolo.report import write_report
from sp_yolo.runtime.device import Compute
from sp_yolo.trackers import Record

MEASURED = ("precision", "recall", "map50", "map50_95")


def epoch_record(
    epoch: int,
    means: Sequence[float],
    rate: float,
    outcome: tuple[EvalResult, Sequence[float]] | None,
    *,
    optimizer: torch.optim.Optimizer,
    labels: int,
    image_size: int,
    memory: int,
) -> Record:
    """One epoch as metrics.jsonl has it. ``means``: of the loss parts; ``rate``: images/s; ``memory``: peak bytes.

    ``outcome``: metrics and losses of the validation; without one (--notest) what it measures is NaN.
    """
    result, val_losses = outcome or (None, (math.nan,) * 3)
    sparsity = optimizer.sparsity() if isinstance(optimizer, SP) else {}
    return {
        "epoch": epoch,
        "gpu_mem": memory,
        **dict(zip(PARTS, means, strict=True)),
        "labels": labels,
        "img_size": image_size,
        **{name: getattr(result, name) if result else math.nan for name in MEASURED},
        **dict(zip(("val_box", "val_obj", "val_cls"), val_losses, strict=True)),
        "lr": {group["name"]: float(group["lr"]) for group in optimizer.param_groups},
        "sparsity": {name: float(value) for name, value in sparsity.items()},
        "images_per_second": rate,
        "class_map": [float(entry.ap) for entry in result.per_class] if result else [],
    }


def run_summary(best: EvalResult, progress: Progress, seconds: float, seed: int, compute: Compute) -> Record:
    """The content of summary.json. ``seconds``: of this process, without those before a resume."""
    records = progress.records
    rates = [record["images_per_second"] for record in records if record["images_per_second"]]
    return {
        "best": {"epoch": progress.best_epoch, **best.metrics(), "stats": list(best.stats)},
        "final": {"epoch": len(records) - 1, **{name: records[-1][name] for name in MEASURED}},
        "wall_seconds": seconds,
        "images_per_second": float(np.median(rates)) if rates else 0.0,
        "peak_memory_bytes": compute.peak_memory(),
        "versions": {"sp_yolo": __version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "device": compute.words,
        "seed": seed,
        "argv": sys.argv,
    }


def model_facts(model: DetectionModel, image_size: int) -> dict[str, str]:
    """Parameters, and floating point operations of one square image of ``image_size`` px; a multiply-add counts two.

    Counted by torch (torch.utils.flop_counter): convolutions and matrix products.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_size, image_size, device=device))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    operations = f"{counter.get_total_flops() / 1e9:.1f} GFLOPs at {image_size} px"
    return {"parameters": f"{millions:.2f} million", "operations": operations}


def run_report(
    folder: Path,
    best: EvalResult,
    split: MeasuredSplit,
    *,
    title: str,
    facts: Mapping[str, object],
    history: list[Record],
) -> list[str]:
    """Curves, confusion matrix, worst images and report.html of the best weights; returns the lines to print."""
    return write_report(
        folder,
        best,
        split.truth,
        split.evaluator.detections(),
        title=title,
        facts=dict(facts),
        history=history,
        read_image=split.reader(),
    )
