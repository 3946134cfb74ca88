"""A configuration -> the network. The layer table is explicit; nothing in a configuration is ever evaluated."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_yolo.errors import UserError
from sp_yolo.models import grammar
from sp_yolo.models.blocks import MP, SPPCSPC, Chuncat, Concat, Conv, DownC, ReOrg, RepConv, SameMaxPool, Shortcut
from sp_yolo.models.grammar import Row
from sp_yolo.models.heads import Detect, IAuxDetect, IDetect
from sp_yolo.models.widths import WIDTHS, narrow

# Test-time augmentation: (scale, mirrored) of each pass, and the gray that fills what the scaled image leaves free.
TTA_PASSES = ((1.0, False), (0.83, True), (0.67, False))
TTA_FILL = 0.447


@dataclass(frozen=True)
class Feature:
    """What is known of a layer's output before running it; stride = image size / feature size."""

    channels: int
    stride: Fraction


Built = tuple[Callable[[], nn.Module], Feature]


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
    return value


def _convolution(kind: type[nn.Module]) -> Callable[..., Built]:
    def build(x: Feature, channels, kernel=1, stride=1, padding=None, groups=1, activation=True) -> Built:  # type: ignore[no-untyped-def]
        _whole("kernel", kernel)
        result = Feature(channels, x.stride * _whole("stride", stride))
        return lambda: kind(x.channels, channels, kernel, stride, padding, groups, activation), result

    return build


def _sppcspc(
    x: Feature, channels: int, shortcut: bool = False, groups: int = 1, e: float = 0.5, k: Any = (5, 9, 13)
) -> Built:
    return lambda: SPPCSPC(x.channels, channels, shortcut, groups, e, k), Feature(channels, x.stride)


def _downc(x: Feature, channels: int, kernel: int = 2) -> Built:
    return lambda: DownC(x.channels, channels, kernel), Feature(channels, x.stride * _whole("kernel", kernel))


def _mp(x: Feature, kernel: int = 2) -> Built:
    return lambda: MP(kernel), Feature(x.channels, x.stride * _whole("kernel", kernel))


def _sp(x: Feature, kernel: int = 3, stride: int = 1) -> Built:
    return lambda: SameMaxPool(_whole("kernel", kernel), stride), Feature(
        x.channels, x.stride * _whole("stride", stride)
    )


def _reorg(x: Feature) -> Built:
    return ReOrg, Feature(4 * x.channels, x.stride * 2)


def _upsample(x: Feature, size: None = None, scale_factor: int = 2, mode: str = "nearest") -> Built:
    if size is not None:
        raise ValueError("nn.Upsample takes None and a scale factor here, not a fixed size")
    factor = _whole("scale factor", scale_factor)
    return lambda: nn.Upsample(None, factor, mode), Feature(x.channels, x.stride / factor)


def _concat(inputs: Sequence[Feature], dim: int = 1) -> Built:
    if dim != 1:
        raise ValueError(f"only channels (dimension 1) can be concatenated, got {dim!r}")
    return lambda: Concat(dim), Feature(sum(x.channels for x in inputs), inputs[0].stride)


def _chuncat(inputs: Sequence[Feature], dim: int = 1) -> Built:
    if dim != 1 or any(x.channels % 2 for x in inputs):
        raise ValueError("needs dimension 1 and even channel counts")
    return Chuncat, Feature(sum(x.channels for x in inputs), inputs[0].stride)


def _shortcut(inputs: Sequence[Feature], unused: Any = None) -> Built:
    if len(inputs) != 2 or inputs[0] != inputs[1]:
        raise ValueError(f"needs two inputs of equal channels, got {[x.channels for x in inputs]}")
    return Shortcut, inputs[0]


@dataclass(frozen=True)
class Layer:
    """How a row becomes a module."""

    build: Callable[..., Built]
    many: bool = False  # takes a list of inputs
    scaled: bool = False  # its first argument is a number of channels
    swallows_number: bool = False  # the original hands `number` to the module, which ignores it


LAYERS = {
    "Conv": Layer(_convolution(Conv), scaled=True),
    "RepConv": Layer(_convolution(RepConv), scaled=True),
    "SPPCSPC": Layer(_sppcspc, scaled=True, swallows_number=True),
    "DownC": Layer(_downc, scaled=True, swallows_number=True),
    "MP": Layer(_mp),
    "SP": Layer(_sp),
    "ReOrg": Layer(_reorg),
    "nn.Upsample": Layer(_upsample),
    "Concat": Layer(_concat, many=True),
    "Chuncat": Layer(_chuncat, many=True),
    "Shortcut": Layer(_shortcut, many=True),
}
HEAD_TYPES: dict[str, type[Detect]] = {"Detect": Detect, "IDetect": IDetect, "IAuxDetect": IAuxDetect}


class DetectionModel(nn.Module):
    """A YOLOv7 network. state_dict keys are the original's: ``model.<row>.<...>``.

    forward: images [B, 3, H, W] in 0..1, H and W multiples of max(stride).
      train(): list of nl raw maps [B, na, ny, nx, no]; with auxiliary heads 2*nl, lead first.
      eval(): (decoded [B, N, no]: cx, cy, w, h in input pixels, objectness, classes; list of the nl raw maps).
      augment=True (eval): (decoded boxes of three scaled and mirrored passes, None).

    Attributes: stride [nl] float tensor, names, num_classes, yaml (the configuration), backbone_rows, head.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "model configuration") -> None:
        super().__init__()
        rows = grammar.parse_rows(config, where)
        features: list[Feature] = []
        layers: list[nn.Module] = []
        channels = _input_channels(config, where)
        for row in rows[:-1]:
            inputs = [Feature(channels, Fraction(1)) if s < 0 else features[s] for s in row.sources]
            layer, feature = _build_row(row, inputs, config, where)
            layers.append(layer)
            features.append(feature)
        layers.append(_build_head(rows[-1], features, config, where))
        self.model = nn.Sequential(*layers)
        self.yaml: dict[str, Any] = {**config, "ch": channels}
        self.backbone_rows = len(config["backbone"])
        self.num_classes = self.head.nc
        self.names = [str(index) for index in range(self.num_classes)]
        self.stride = torch.tensor(self.head.strides, dtype=torch.float32, device="cpu")
        self._sources = [row.sources for row in rows]
        self._many = [row.layer in HEAD_TYPES or LAYERS[row.layer].many for row in rows]
        # In inference the rows that only feed auxiliary heads are not computed.
        self._training_plan = _plan(rows, range(len(rows)))
        self._inference_plan = _plan(rows, sorted(grammar.lead_rows(rows)))
        if WIDTHS in config:
            narrow(self, config[WIDTHS], where)

    @property
    def head(self) -> Detect:
        return self.model[-1]  # type: ignore[return-value]

    def forward(self, x: Tensor, augment: bool = False) -> Any:
        return (self._augmented(x), None) if augment else self._run(x)

    def _run(self, x: Tensor) -> Any:
        outputs: dict[int, Tensor] = {-1: x}
        result: Any = x
        for index, released in self._training_plan if self.training else self._inference_plan:
            # Auxiliary inputs come last, so leaving out what was not computed keeps the head's order.
            inputs = [outputs[source] for source in self._sources[index] if source in outputs]
            result = self.model[index](inputs if self._many[index] else inputs[0])
            outputs[index] = result
            for source in released:
                del outputs[source]
        return result

    def _augmented(self, x: Tensor) -> Tensor:
        """Boxes [B, sum N, no] of the three passes, in pixels of ``x``."""
        height, width = x.shape[2:]
        grid = max(self.head.strides)
        decoded = []
        for scale, mirrored in TTA_PASSES:
            image = x.flip(3) if mirrored else x
            if scale != 1:
                size = (int(height * scale), int(width * scale))
                padded = [math.ceil(side * scale / grid) * grid for side in (height, width)]
                image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
                image = F.pad(image, (0, padded[1] - size[1], 0, padded[0] - size[0]), value=TTA_FILL)
            boxes, scores = self._run(image)[0].split((4, self.head.no - 4), -1)
            boxes = boxes / scale
            if mirrored:
                boxes = torch.cat((width - boxes[..., :1], boxes[..., 1:]), -1)
            decoded.append(torch.cat((boxes, scores), -1))
        return torch.cat(decoded, 1)


def build_model(
    cfg: str | os.PathLike[str] | Mapping[str, Any],
    num_classes: int | None = None,
    anchors: int | Sequence[Sequence[float]] | None = None,
) -> DetectionModel:
    """Build a model with fresh weights.

    Args:
        cfg: a packaged model's name ("yolov7-tiny"), the path of a YAML in the original's grammar, or its content.
        num_classes: replaces the configuration's ``nc``.
        anchors: replaces its anchors: flat lists w,h,w,h,... in pixels per level, or an integer (placeholders).
    Raises:
        UserError: the configuration is not found or wrong; names file, row and rule.
    """
    config, where = grammar.read_model_config(cfg)
    if num_classes is not None:
        config["nc"] = num_classes
    if anchors is not None:
        config["anchors"] = anchors if isinstance(anchors, int) else [list(level) for level in anchors]
    return DetectionModel(config, where)


def _input_channels(config: Mapping[str, Any], where: str) -> int:
    channels = config.get("ch", 3)
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise UserError(f"{where}: ch must be a whole number from 1, got {channels!r}")
    return channels


def _build_row(row: Row, inputs: list[Feature], config: Mapping[str, Any], where: str) -> tuple[nn.Module, Feature]:
    layer = LAYERS.get(row.layer)
    if layer is None:
        known = ", ".join([*LAYERS, *HEAD_TYPES])
        problem = "must be the last row" if row.layer in HEAD_TYPES else f"is not a layer this package knows: {known}"
        raise UserError(f"{row.where}: {row.layer} {problem}")
    repeats = 1 if layer.swallows_number else row.repeats
    try:
        if not layer.many and len(inputs) != 1:
            raise ValueError(f"takes one input, got {len(inputs)}")
        if len({x.stride for x in inputs}) != 1:
            strides = ", ".join(f"{x.stride} of layer {s}" for x, s in zip(inputs, row.sources, strict=True))
            raise ValueError(f"inputs have different strides: {strides}")
        first = inputs if layer.many else inputs[0]
        arguments = list(row.arguments)
        if layer.scaled and arguments:
            arguments[0] = _scaled_channels(arguments[0], config, where)
        accepted = inspect.signature(layer.build)
        try:
            accepted.bind(first, *arguments)
        except TypeError:
            raise ValueError(f"args are {', '.join(list(accepted.parameters)[1:]) or 'none'}") from None
        make, feature = layer.build(first, *arguments)
        if repeats == 1:
            return make(), feature
        if [feature] != inputs:
            raise ValueError(f"number {repeats} needs equal input and output")
        return nn.Sequential(*(make() for _ in range(repeats))), feature
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{row.where}: {row.layer}{list(row.arguments)}: {reason}") from None


def _scaled_channels(channels: Any, config: Mapping[str, Any], where: str) -> int:
    anchors = config.get("anchors")
    per_level = len(anchors[0]) // 2 if isinstance(anchors, Sequence) else int(anchors or 0)
    width = grammar.positive_number(config, "width_multiple", 1.0, where)
    if _whole("channels", channels) == per_level * (grammar.num_classes_of(config, where) + 5):
        return channels
    return math.ceil(channels * width / 8) * 8


def _build_head(row: Row, features: Sequence[Feature], config: Mapping[str, Any], where: str) -> Detect:
    kind = HEAD_TYPES.get(row.layer)
    if kind is None:
        raise UserError(f"{row.where}: the last row must be one of {', '.join(HEAD_TYPES)}, got {row.layer}")
    if len(row.arguments) != 2:
        raise UserError(f"{row.where}: {row.layer} args are nc, anchors; got {list(row.arguments)}")
    inputs = [features[source] for source in row.sources]
    per_level = grammar.HEADS[row.layer]
    if len(inputs) % per_level:
        raise UserError(f"{row.where}: {row.layer} needs an auxiliary input for each lead input, got {len(inputs)}")
    levels = len(inputs) // per_level
    num_classes = grammar.num_classes_of({"nc": row.arguments[0]}, row.where)
    anchors = grammar.checked_anchors(row.arguments[1], levels, row.where)
    strides = [x.stride for x in inputs]
    if any(stride.denominator != 1 for stride in strides) or strides[levels:] not in ([], strides[:levels]):
        raise UserError(f"{row.where}: inputs have impossible strides {[str(stride) for stride in strides]}")
    return kind(num_classes, anchors, [x.channels for x in inputs], [int(stride) for stride in strides[:levels]])


def _plan(rows: Sequence[Row], computed: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """(row, layers whose output nobody needs after it) in order: memory is given back as early as possible."""
    last_use = {source: index for index in computed for source in rows[index].sources}
    available = {-1, *computed}
    return [
        (index, tuple(s for s in dict.fromkeys(rows[index].sources) if last_use[s] == index and s in available))
        for index in computed
    ]
