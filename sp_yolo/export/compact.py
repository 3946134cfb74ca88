"""Held weights -> a checkpoint of the smaller model, beside them."""

from __future__ import annotations

from pathlib import Path

from sp_yolo.engine.compact import CompactReport, save_compact
from sp_yolo.errors import UserError
from sp_yolo.models import model_from_weights, read_checkpoint

# What a checkpoint of ours says beside the weights.
_BESIDE = ("version", "config", "hyp", "ema_updates", "progress")


def compact_file(weights: str, image_size: int) -> tuple[Path, CompactReport]:
    """Write NAME-compact.pt beside the checkpoint ``weights``: its model without the channels that are zero.

    ``image_size``: px, that the report's GFLOPs are of.

    Raises:
        UserError: no model; fused weights; no channel is zero. SPYoloError: the small model computes something else.
        StorageError: the file cannot be written.
    """
    content = read_checkpoint(weights)
    held = model_from_weights(weights, content)
    ours = content if isinstance(content, dict) and content.get("format") == "sp-yolo" else {}
    path = Path(weights).with_name(f"{Path(weights).stem}-compact.pt")
    report = save_compact(held, path, {key: ours[key] for key in _BESIDE if key in ours}, image_size)
    if report.parameters[0] == report.parameters[1]:
        path.unlink()
        raise UserError(f"{weights}: no channel of it is zero: train it with --set sp_channels=0.5")
    return path, report
