"""Channels that go while a detector is trained, and the small model that is left at the end."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sp_yolo.engine.state import Content
from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.models import DetectionModel, channel_groups, check_compact, compact, description
from sp_yolo.optim import SP, Removal
from sp_yolo.report import draw_channels
from sp_yolo.runtime.checkpoint import save_checkpoint

# Layers keep multiples of so many channels: runtimes compute eight in the time of one (docs/channels.md).
BLOCK = 8
COMPACT = "best-compact.pt"


@dataclass(frozen=True)
class CompactReport:
    """What the cut changed. ``layers``: name, channels left, channels before of each family of channels that may go.

    ``gflops``, ``parameters``: before and after, of one image of ``image_size`` px. ``difference``: the largest of a
    raw map, float32.
    """

    image_size: int
    gflops: tuple[float, float]
    parameters: tuple[int, int]
    layers: tuple[tuple[str, int, int], ...]
    difference: float

    @property
    def share(self) -> float:
        """Of the FLOPs that is gone."""
        return 1 - self.gflops[1] / self.gflops[0]

    def __str__(self) -> str:
        left, before = sum(row[1] for row in self.layers), sum(row[2] for row in self.layers)
        millions = [number / 1e6 for number in self.parameters]
        return (
            f"channels {before} -> {left}; {self.gflops[0]:.3g} -> {self.gflops[1]:.3g} GFLOPs at {self.image_size} px "
            f"({self.share:.1%} less); {millions[0]:.2f} -> {millions[1]:.2f} M parameters"
        )

    def as_dict(self) -> Content:
        """Plain values, for summary.json."""
        return {
            "image_size": self.image_size,
            "gflops": list(self.gflops),
            "parameters": list(self.parameters),
            "channels": {name: [left, before] for name, left, before in self.layers},
            "largest_difference": self.difference,
        }

    def draw(self, path: Path) -> str:
        """Write the picture of the channels by layer; a line to say where it cannot be drawn, else ""."""
        try:
            names, left, before = zip(*self.layers, strict=True)
            draw_channels(names, {"before": before, "left": left}, str(self), path)
        except EnvironmentFault as missing:
            return str(missing)
        return ""


def least_channels(size: int, share: float) -> int:
    """How many channels of a layer of ``size`` stay at the least where ``share`` of the FLOPs goes: as large a share as
    of the FLOPs, in whole blocks. A FLOP is an input times an output, so all layers alike would keep the root of it.
    Without such a bound the last layers of the head are nearly emptied (docs/channels.md)."""
    return max(BLOCK, math.floor(round(size * (1 - share) / BLOCK, 6)) * BLOCK)


def remove_channels(optimizer: torch.optim.Optimizer, model: DetectionModel, share: float) -> str:
    """Have ``optimizer`` remove ``share`` of the FLOPs of ``model`` as whole channels; returns a line to say.

    Raises:
        UserError: it is not SP; more is asked for than can go.
    """
    if not isinstance(optimizer, SP):
        raise UserError(f"sp_channels = {share:g}: SP removes channels, not {type(optimizer).__name__}: --optimizer sp")
    groups = channel_groups(model, trainable=True)
    families = [family.tied for family in groups.families]
    try:
        least = [least_channels(family.size, share) for family in groups.families]
        optimizer.remove_groups(Removal(families, share, groups.cost, least, block=BLOCK))
    except ValueError as error:
        raise UserError(f"sp_channels = {share:g}: {error}") from None
    count, schedule = int(groups.sizes.sum()), optimizer.param_groups[0]
    return (
        f"{share:.0%} of the FLOPs go as whole channels of {count} in {len(families)} layers, between "
        f"{schedule['start']:.0%} and {schedule['end']:.0%} of {schedule['total_steps']} steps"
    )


def compact_report(held: DetectionModel, image_size: int) -> tuple[DetectionModel, CompactReport]:
    """The compact form of ``held``, compared with it, and what changed.

    Raises:
        SPYoloError: it computes something else. UserError: fused weights.
    """
    small = compact(held)
    difference = check_compact(held, small)
    before, after = channel_groups(held), channel_groups(small)
    left = {family.name: family.size for family in after.families}
    report = CompactReport(
        image_size,
        (before.gflops(image_size), after.gflops(image_size)),
        (_parameters(held), _parameters(small)),
        tuple((family.name, left[family.name], family.size) for family in before.families),
        difference,
    )
    return small, report


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def save_compact(held: DetectionModel, path: Path, content: Content, image_size: int) -> CompactReport:
    """Write the compact form of ``held`` as weights; ``content``: what else belongs into the file.

    Raises: as :func:`compact_report`; StorageError: the file cannot be written.
    """
    small, report = compact_report(held, image_size)
    save_checkpoint(path, {**content, **json.loads(json.dumps(description(small))), "ema": small.state_dict()})
    return report
