"""What each layer of a detector could lose: the saliency of its channels, and which would go first."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sp_yolo.config import load_recipe
from sp_yolo.engine.compact import BLOCK, least_channels
from sp_yolo.engine.inputs import round_up, size_grid, to_input
from sp_yolo.engine.model import model_size
from sp_yolo.engine.splits import open_dataset, open_measured_split
from sp_yolo.errors import UserError
from sp_yolo.losses import DetectionLoss
from sp_yolo.models import ChannelGroups, DetectionModel, channel_groups
from sp_yolo.optim.group_prox import choose
from sp_yolo.optim.saliency import saliency
from sp_yolo.runtime.device import Compute

SHARES = (0.1, 0.3, 0.5, 0.7)  # of the FLOPs


@dataclass(frozen=True)
class LayerSaliency:
    """One layer. ``flops``: its share of the model's; ``left``: its channels with each of SHARES of the FLOPs gone."""

    name: str
    channels: int
    flops: float
    left: tuple[int, ...]


@dataclass(frozen=True)
class ChannelSaliency:
    """``gflops``: of the whole model, one image of ``image_size`` px. ``lost``: the share of the sum of all saliencies
    that goes with each of SHARES of the FLOPs. ``source``: where E[g^2] is from."""

    layers: tuple[LayerSaliency, ...]
    lost: tuple[float, ...]
    gflops: float
    image_size: int
    source: str

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [13])
        heads = "".join(f"{f'-{share:.0%}':>7}" for share in SHARES)
        lines = [f"{'layer':{width}} channels  FLOPs   left with so much of the FLOPs gone"]
        lines.append(f"{'':{width}} {'':8} {'':6} {heads}")
        for layer in self.layers:
            left = "".join(f"{count:7}" for count in layer.left)
            lines.append(f"{layer.name:{width}} {layer.channels:8} {layer.flops:6.1%} {left}")
        sums = [sum(layer.left[i] for layer in self.layers) for i in range(len(SHARES))]
        whole = sum(layer.channels for layer in self.layers)
        lines.append(f"{'all':{width}} {whole:8} {'':6} {''.join(f'{count:7}' for count in sums)}")
        lines.append(f"{'saliency lost':{width}} {'':8} {'':6} {''.join(f'{share:7.1%}' for share in self.lost)}")
        return "\n".join(lines)


def channel_saliency(
    model: DetectionModel, squares: Mapping[str, Tensor] | None, source: str, image_size: int
) -> ChannelSaliency:
    """``squares``: E[g^2] of each parameter by name; None: the saliency is the magnitude, 1/2 x^2."""
    groups = channel_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scores = []
    for family in groups.families:
        own = torch.zeros(family.size, dtype=torch.float64)
        for tensor, rows in family.tied:
            h = None if squares is None else squares[names[id(tensor)]].cpu().double()[rows]
            own += saliency(tensor.detach().cpu().double()[rows], h).reshape(family.size, -1).sum(1)
        scores.append(own)
    whole = groups.cost.total(groups.sizes)
    gone = [_gone(groups, scores, share) for share in SHARES]
    everything = float(torch.cat(scores).sum()) or 1.0
    lost = tuple(float(torch.cat([s[i] for s, i in zip(scores, own, strict=True)]).sum()) / everything for own in gone)
    layers = tuple(
        LayerSaliency(
            family.name,
            family.size,
            groups.own_flops(index) / whole,
            tuple(family.size - len(own[index]) for own in gone),
        )
        for index, family in enumerate(groups.families)
    )
    return ChannelSaliency(layers, lost, groups.gflops(image_size), image_size, source)


def _gone(groups: ChannelGroups, scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """The channels of each family that one proximal step would take for ``share`` of the FLOPs."""
    cost, sizes = groups.cost, groups.sizes
    budget = (1 - share) * cost.total(sizes)
    least = [least_channels(family.size, share) for family in groups.families]
    return choose(scores, cost.each(sizes), cost.total, budget, least, BLOCK)[0]


def stored_squares(content: Any, model: DetectionModel) -> dict[str, Tensor] | None:
    """E[g^2] by parameter from a checkpoint of a run with SP; None where it holds none of every parameter."""
    saved = content.get("optimizer") if isinstance(content, dict) else None
    if not isinstance(saved, dict):
        return None
    found = {
        name: saved["state"][key]["square_avg"]
        for group in saved.get("param_groups", [])
        for name, key in zip(group.get("param_names", []), group["params"], strict=False)
        if "square_avg" in saved["state"].get(key, {})
    }
    return found if all(name in found for name, _ in model.named_parameters()) else None


def measured_squares(
    model: DetectionModel, data: str, root: str, *, image_size: int, batch_size: int, batches: int, compute: Compute
) -> tuple[dict[str, Tensor], int]:
    """E[g^2] by parameter over batches of training images as they are, with the statistics of the model; and how many
    batches there were.

    Raises:
        UserError: data or model do not fit, or the split is empty.
    """
    dataset = open_dataset(data, root)
    if len(dataset.names) != model.num_classes:
        raise UserError(f"{dataset.path}: {len(dataset.names)} classes, the weights have {model.num_classes}")
    grid = size_grid(model)
    side = round_up(image_size, grid)
    split = open_measured_split(
        dataset, "train", image_size=side, batch_size=batch_size, stride=grid, single_class=False, workers=0
    )
    recipe = load_recipe("sp.yaml", size=model_size(model)).loss
    network = model.to(compute.device).requires_grad_(True).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    loss = DetectionLoss(network, recipe, side, "ota" if recipe.loss_ota else "anchor")
    sums = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    count = 0
    for batch in itertools.islice(split.loader.epoch(0), batches):
        network.zero_grad()
        images = to_input(batch.images, compute)
        with compute.autocast():
            value, _ = loss(network(images), batch.targets, (images.shape[2], images.shape[3]))
        value.backward()
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad**2
        count += 1
    model.eval().requires_grad_(False)
    return {name: total / max(count, 1) for name, total in sums.items()}, count
