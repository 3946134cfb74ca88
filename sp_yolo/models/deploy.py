"""The deployed form of a model: batch norms, RepConv branches and implicit vectors merged, auxiliary heads dropped.

All merging is exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_yolo.models import grammar
from sp_yolo.models.blocks import Conv, RepConv
from sp_yolo.models.build import DetectionModel
from sp_yolo.models.heads import merge_implicit


def deploy(model: DetectionModel) -> DetectionModel:
    """A fused copy of ``model`` for inference, in eval mode and without gradients; ``model`` stays as it is.

    Its ``yaml`` is the deploy configuration, its decoded output that of ``model.eval()``.
    """
    with torch.no_grad():
        state = {key: value.detach().clone() for key, value in deploy_state(model.state_dict(), model.yaml).items()}
        with torch.device("meta"):  # no memory, no time and no random numbers for weights that are replaced at once
            copy = DetectionModel(grammar.deploy_config(model.yaml, "model"))
        if is_fused(state):
            fuse(copy)
        copy.load_state_dict(state, assign=True)
        if not is_fused(state):
            fuse(copy)
    copy.names = list(model.names)
    return copy.eval().requires_grad_(False)


def is_fused(state: Mapping[str, Tensor]) -> bool:
    """Whether a state_dict holds convolutions that have taken in their batch norms."""
    return any(key.endswith((".conv.bias", ".rbr_reparam.bias")) for key in state)


def deploy_state(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Training weights -> the weights of the deploy configuration, convolutions unfused.

    ``config`` is the configuration that ``state`` belongs to; a deploy configuration's own weights come back unchanged.
    """
    rows = grammar.parse_rows(config, "model")
    kept = sorted(grammar.lead_rows(rows))
    head = f"model.{rows[-1].index}."
    result: dict[str, Tensor] = {}
    for new, old in enumerate(kept):
        prefix = f"model.{old}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if prefix == head:
            own = merged_head(own)
        result.update({f"model.{new}.{name}": value for name, value in own.items()})
    return result


def merged_head(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A training head's tensors (keys without the row's prefix) -> those of the equal Detect head."""
    result = {key: value for key, value in own.items() if key.split(".")[0] in ("anchors", "anchor_grid", "m")}
    levels = len(own["anchors"]) if "ia.0.implicit" in own else 0
    for level in range(levels):
        weight, bias = f"m.{level}.weight", f"m.{level}.bias"
        add, scale = own[f"ia.{level}.implicit"], own[f"im.{level}.implicit"]
        result[weight], result[bias] = merge_implicit(own[weight], own[bias], add, scale)
    return result


@torch.no_grad()
def fuse(model: nn.Module) -> None:
    """Merge, in place, every batch norm into its convolution and every RepConv into one convolution."""
    for module in list(model.modules()):
        if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = _biased(module.conv, *_conv_and_norm(module.conv.weight, module.bn))
            module.bn = nn.Identity()
        elif isinstance(module, RepConv) and module.rbr_reparam is None:
            _fuse_branches(module)


def _conv_and_norm(weight: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * factor.view(-1, 1, 1, 1), norm.bias - norm.running_mean * factor


def _fuse_branches(module: RepConv) -> None:
    dense: Any = module.rbr_dense
    one: Any = module.rbr_1x1
    weight, bias = _conv_and_norm(dense[0].weight, dense[1])
    weight_one, bias_one = _conv_and_norm(one[0].weight, one[1])
    weight, bias = weight + F.pad(weight_one, (1, 1, 1, 1)), bias + bias_one
    if module.rbr_identity is not None:
        per_group = weight.shape[1]
        unit = torch.eye(per_group, dtype=weight.dtype, device=weight.device).repeat(one[0].groups, 1)
        weight_same, bias_same = _conv_and_norm(unit.view(-1, per_group, 1, 1), module.rbr_identity)
        weight, bias = weight + F.pad(weight_same, (1, 1, 1, 1)), bias + bias_same
        module.rbr_identity = None
    module.rbr_reparam = _biased(dense[0], weight, bias)
    del module.rbr_dense, module.rbr_1x1


def _biased(like: Any, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    with torch.device("meta"):
        result = nn.Conv2d(
            like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding, groups=like.groups
        )
    result.weight, result.bias = nn.Parameter(weight), nn.Parameter(bias)
    return result
