"""Records of an epoch and starts of a run, for what watches one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from sp_yolo.trackers import RunStart


def epoch(number: int, value: float = 0.25) -> dict[str, Any]:
    names = ("box", "obj", "cls", "val_box", "val_obj", "val_cls", "precision", "recall", "map50", "map50_95")
    record: dict[str, Any] = {"epoch": number, **dict.fromkeys(names, value), "images_per_second": 10.0}
    return {**record, "val_cls": float("nan"), "lr": {"bias": 0.1}, "sparsity": {"head": 0.5}}


def start(folder: Path, first: int = 0, identity: str = "1a2b3c4d") -> RunStart:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"epochs": 2, "data": "x" * 900, "img_size": [64, 64], "hyp/lr0": 0.01}
    settings |= {f"hyp/other_{number}": number for number in range(150)}  # as many as there are
    return RunStart(folder, "project", "exp", identity, settings, first, 2, bool(first), model, optimizer)


def files(folder: Path) -> list[Path]:
    picture, page = folder / "results.png", folder / "report.html"
    cv2.imwrite(str(picture), np.full((24, 32, 3), 128, np.uint8))
    page.write_text("<p>report</p>", encoding="utf-8")
    return [picture, page]
