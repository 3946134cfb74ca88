"""Models of given widths: the number of channels of each family in a configuration's ``widths``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from sp_yolo.errors import UserError
from sp_yolo.models.channels import FIXED, channel_groups

if TYPE_CHECKING:
    from sp_yolo.models.build import DetectionModel

WIDTHS = "widths"  # key of a configuration: {name of a family of channels: how many of them}


def narrow(model: DetectionModel, widths: Any, where: str) -> None:
    """Give families of channels of ``model`` the number that ``widths`` has for them, in place, with fresh weights.

    Raises:
        UserError: not a mapping of the model's families to numbers from 1 to their size.
    """
    groups = channel_groups(model)
    sizes = {family.name: family.size for family in groups.families}
    if not isinstance(widths, Mapping):
        raise UserError(f"{where}: {WIDTHS} must be a mapping from layers to channels, got {widths!r:.80}")
    for name, width in widths.items():
        if name not in sizes:
            raise UserError(f"{where}: {WIDTHS}: {name!r:.80} is no layer whose channels can be removed")
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= sizes[name]:
            raise UserError(f"{where}: {WIDTHS}: {name}: must be from 1 to {sizes[name]}, got {width!r:.80}")
    kept = {number for family in groups.families for number in family.numbers[: widths.get(family.name, family.size)]}
    for use in groups.uses:
        inputs, outputs = places(use.inputs, kept), places(use.outputs, kept)
        for name in use.convs:
            _replace(model, name, _resized(model.get_submodule(name), len(inputs), len(outputs)))
        for name in use.norms:
            norm: Any = model.get_submodule(name)
            _replace(model, name, type(norm)(len(outputs), eps=norm.eps, momentum=norm.momentum))
        if use.implicit:
            vector = model.get_parameter(use.implicit)
            holder = model.get_submodule(use.implicit.rpartition(".")[0])
            holder.implicit = nn.Parameter(vector.detach()[:, : len(inputs)].clone())


def _resized(conv: Any, inputs: int, outputs: int) -> nn.Conv2d:
    if conv.groups > 1 or (conv.in_channels, conv.out_channels) == (inputs, outputs):
        return conv
    bias = conv.bias is not None
    return nn.Conv2d(inputs, outputs, conv.kernel_size, conv.stride, conv.padding, bias=bias)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def places(numbers: Sequence[int], kept: Collection[int]) -> list[int]:
    """Where the channels that stay stand among ``numbers``."""
    return [place for place, number in enumerate(numbers) if number == FIXED or number in kept]
