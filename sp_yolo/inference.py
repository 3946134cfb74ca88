"""What `val` and `predict` have in common: flags, their bounds, and detections as lines of label files."""

from __future__ import annotations

import argparse

import torch

from sp_yolo.boxes import xyxy_to_cxcywh
from sp_yolo.errors import UserError


def add_inference_arguments(
    parser: argparse.ArgumentParser, *, image_size: int | None, conf_thres: float, iou_thres: float | None, project: str
) -> None:
    """Add the flags of a command that runs weights; ``image_size``, ``iou_thres`` None: as the training."""
    size_words = "px" if image_size else "px (default: the training's test size, or 640)"
    words = "checkpoint: ours, the original's .pt, safetensors"
    parser.add_argument("--weights", required=True, nargs="+", help=words)  # the original takes several
    parser.add_argument("--no-trace", action="store_true", help="accepted; nothing is traced here")
    parser.add_argument("--img-size", "--img", "--imgsz", type=int, default=image_size, help=size_words)
    parser.add_argument("--conf-thres", "--conf", type=float, default=conf_thres)
    nms_words = "of NMS" if iou_thres else "of NMS (default: as the training)"
    parser.add_argument("--iou-thres", "--iou", type=float, default=iou_thres, help=nms_words)
    parser.add_argument("--device", default="", help="cpu, 0, 1, ... ('' = first GPU, else CPU)")
    parser.add_argument("--augment", action="store_true", help="test-time augmentation: three scales, one mirrored")
    parser.add_argument("--save-txt", action="store_true", help="labels/*.txt: class cx cy w h, normalised")
    parser.add_argument("--save-conf", action="store_true", help="confidence as the last column of the txt files")
    parser.add_argument("--project", default=project)
    parser.add_argument("--name", default="exp")
    parser.add_argument("--exist-ok", action="store_true")


def check_flags(arguments: argparse.Namespace) -> None:
    """Make ``weights`` the one file given.

    Raises:
        UserError: several of them, or a number out of its bounds, of the flags above and of `val`'s own.
    """
    if len(arguments.weights) > 1:
        given = " ".join(arguments.weights)
        raise UserError(f"--weights {given}: ensembles of several models are not supported here, give one file")
    arguments.weights = arguments.weights[0]
    rules = {"conf_thres": (0, 1), "iou_thres": (0, 1), "batch_size": (1, 65536), "img_size": (1, 8192)}
    for key, (low, high) in {**rules, "workers": (0, 1024)}.items():
        value = getattr(arguments, key, None)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{key.replace('_', '-')} {value}: must lie in [{low}, {high}]")


def yolo_lines(rows: torch.Tensor, original_hw: tuple[int, int], with_confidence: bool) -> str:
    """Detections [k, 6] (xyxy in original px, score, class) as lines of a YOLO label file, best detection last."""
    height, width = original_hw
    boxes = xyxy_to_cxcywh(rows[:, :4]) / torch.tensor([width, height, width, height])
    lines = []
    for box, (score, label) in zip(boxes.tolist(), rows[:, 4:].tolist(), strict=True):
        values = [*box, score] if with_confidence else box
        lines.append(" ".join([f"{int(label)}", *(f"{value:g}" for value in values)]) + "\n")
    return "".join(reversed(lines))
