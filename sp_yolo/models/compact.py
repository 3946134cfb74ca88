"""The cut: a smaller model without the channels that are zero, which computes the same."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from sp_yolo.errors import SPYoloError, UserError
from sp_yolo.models.build import DetectionModel
from sp_yolo.models.channels import ChannelGroups, Channels, Use, channel_groups
from sp_yolo.models.deploy import is_fused
from sp_yolo.models.widths import WIDTHS, places

# A compact model's outputs may differ by so much, absolute and relative to their size.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def alive(family: Channels) -> Tensor:
    """bool [size]: channels that are not zero in every layer that produces them. Where all are, the first stays."""
    found = torch.zeros(family.size, dtype=torch.bool)
    for tensor, rows in family.tied:
        if tensor.ndim == 1:  # batch norm's weight and bias: where both are zero, its output is, whatever goes in
            found |= tensor.detach()[rows].ne(0).cpu()
    if not found.any():
        found[0] = True
    return found


@torch.no_grad()
def compact(model: DetectionModel) -> DetectionModel:
    """A copy of ``model`` without the channels that are zero, in eval mode; ``model`` stays as it is.

    The implicit vector that a head adds to a channel taken out is a constant: it goes into the head's bias.

    Raises:
        UserError: the weights are fused: batch norms, whose zeros tell which channels are removed, are gone.
    """
    if is_fused(model.state_dict()):
        raise UserError("fused weights cannot be made compact: give the training checkpoint they were made from")
    groups = channel_groups(model)
    masks = [alive(family) for family in groups.families]
    widths = dict(model.yaml.get(WIDTHS, {}))
    widths |= {f.name: int(mask.sum()) for f, mask in zip(groups.families, masks, strict=True) if not mask.all()}
    state = _cut_state(model, groups, masks)
    with torch.device("meta"):
        result = DetectionModel({**model.yaml, WIDTHS: widths} if widths else model.yaml)
    result.load_state_dict(state, assign=True)
    result.names = list(model.names)
    return result.eval()


def _cut_state(model: DetectionModel, groups: ChannelGroups, masks: list[Tensor]) -> dict[str, Tensor]:
    """The state_dict of ``model``, its rows and columns of removed channels left out."""
    kept = {
        number
        for family, mask in zip(groups.families, masks, strict=True)
        for number, stays in zip(family.numbers, mask.tolist(), strict=True)
        if stays
    }
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    for use in groups.uses:
        inputs = torch.tensor(places(use.inputs, kept), device=next(iter(state.values())).device)
        outputs = torch.tensor(places(use.outputs, kept), device=inputs.device)
        if use.implicit:
            _fold_implicit(state, use, inputs)
        for name in use.convs:
            weight = state[f"{name}.weight"][outputs]
            grouped = weight.shape[1] != len(use.inputs)
            state[f"{name}.weight"] = weight if grouped else weight[:, inputs]
            if f"{name}.bias" in state:
                state[f"{name}.bias"] = state[f"{name}.bias"][outputs]
        for name in use.norms:
            for part in ("weight", "bias", "running_mean", "running_var"):
                state[f"{name}.{part}"] = state[f"{name}.{part}"][outputs]
    return state


def _fold_implicit(state: dict[str, Tensor], use: Use, inputs: Tensor) -> None:
    """conv(x + a) with x = 0 at the channels that go: their W a joins the bias, before the rows are cut."""
    name = use.convs[0]
    added = state[use.implicit].clone()
    state[use.implicit] = added[:, inputs]
    added[:, inputs] = 0
    state[f"{name}.bias"] = state[f"{name}.bias"] + (state[f"{name}.weight"] * added).sum((1, 2, 3))


@torch.no_grad()
def check_compact(held: DetectionModel, small: DetectionModel) -> float:
    """Compare ``small``, the compact form of ``held``, with it on noise; the largest difference of a raw map.

    In float64 a compact form made in float64 is compared: the bias of ``small`` was rounded.

    Raises:
        SPYoloError: an output differs by more than rounding.
    """
    side = 2 * int(max(held.stride))
    largest = 0.0
    for dtype, tolerance in TOLERANCES.items():
        whole = copy.deepcopy(held).cpu().to(dtype).eval()
        cut = compact(whole) if dtype == torch.float64 else copy.deepcopy(small).cpu().to(dtype).eval()
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype)
        pairs = list(zip(whole(images)[1], cut(images)[1], strict=True))
        largest = max(float((found - wanted).abs().max()) for wanted, found in pairs)
        if not all(torch.allclose(found, wanted, rtol=tolerance, atol=tolerance) for wanted, found in pairs):
            raise SPYoloError(f"the compact model's output differs from the model's by {largest:.3g}: not written")
    return largest
