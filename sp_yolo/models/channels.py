"""Which channels of a model belong together, and what each of them costs: one pass over its rows.

A channel goes as a whole: the row of its convolution and its batch norm's weight and bias, of every layer that a
shortcut ties to it. All layers of the family turn a channel of zeros into zeros (activations, pooling), so that nothing
that reads it changes when it is taken out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sp_yolo.models.blocks import MP, SPPCSPC, Chuncat, Concat, Conv, DownC, ReOrg, RepConv, SameMaxPool, Shortcut
from sp_yolo.models.heads import Detect

if TYPE_CHECKING:
    from sp_yolo.models.build import DetectionModel

FIXED = 0  # the number of every channel that stays: the image's, the outputs
FLOPS_PER_PRODUCT = 2  # a multiplication and an addition


@dataclass
class Use:
    """A convolution, or branches that are summed, by the ``name`` of its block.

    ``convs``, ``norms``: names of its modules. ``inputs``, ``outputs``: the numbers of its channels; equal numbers are
    one channel. ``work``: multiplications per pixel of the image and pair of channels; 0: not computed in inference.
    ``implicit``: the vector that is added to its input, "" for none.
    """

    name: str
    convs: tuple[str, ...]
    norms: tuple[str, ...]
    inputs: list[int]
    outputs: list[int]
    work: float
    implicit: str = ""


@dataclass(frozen=True)
class Channels:
    """``size`` channels that are produced side by side: number i is row ``start`` + i of each of the ``uses``.

    ``tied``: the tensors that hold them, with their rows: what an optimizer removes together.
    """

    name: str
    size: int
    numbers: tuple[int, ...]
    uses: tuple[tuple[int, int], ...]
    tied: tuple[tuple[Tensor, slice], ...]


class ChannelCost:
    """Multiplications per pixel of the image as a function of the channels kept: sum of work x inputs x outputs."""

    def __init__(self, uses: Sequence[Use], families: Sequence[Channels]) -> None:
        place = {number: index for index, family in enumerate(families) for number in family.numbers}
        sizes = torch.tensor([family.size for family in families], dtype=torch.float64)

        def counts(numbers: Sequence[int]) -> tuple[float, Tensor]:
            row = torch.zeros(len(families), dtype=torch.float64)
            found = Counter(place.get(number, -1) for number in numbers)
            for index, count in found.items():
                if index >= 0:
                    row[index] = count
            return float(found[-1]), row / sizes

        self.work = torch.tensor([use.work for use in uses], dtype=torch.float64)
        sides = [[counts(use.inputs) for use in uses], [counts(use.outputs) for use in uses]]
        self.fixed = [torch.tensor([fixed for fixed, _ in side], dtype=torch.float64) for side in sides]
        self.shares = [torch.stack([row for _, row in side]) for side in sides]

    def total(self, kept: Tensor) -> float:
        """``kept`` float64 [families]: channels of each."""
        inputs, outputs = self.sides(kept)
        return float((self.work * inputs * outputs).sum())

    def each(self, kept: Tensor) -> Tensor:
        """What one channel of each family costs beside the others, float64 [families]."""
        inputs, outputs = self.sides(kept)
        return (self.work * outputs) @ self.shares[0] + (self.work * inputs) @ self.shares[1]

    def sides(self, kept: Tensor) -> list[Tensor]:
        """Input and output channels of every convolution."""
        return [fixed + share @ kept for fixed, share in zip(self.fixed, self.shares, strict=True)]


@dataclass(frozen=True)
class ChannelGroups:
    """The removable channels of a model, family by family; ``uses``: all of its convolutions, in order."""

    families: tuple[Channels, ...]
    uses: tuple[Use, ...]
    cost: ChannelCost

    @property
    def sizes(self) -> Tensor:
        return torch.tensor([family.size for family in self.families], dtype=torch.float64)

    def own_flops(self, family: int) -> float:
        """Multiplications per pixel of the image of the convolutions that make a family, its part of their outputs."""
        own, cost = self.families[family], self.cost
        inputs, _ = cost.sides(self.sizes)
        return float(sum(cost.work[index] * inputs[index] * own.size for index, _ in own.uses))

    def gflops(self, image_size: int, kept: Tensor | None = None) -> float:
        """Of one square image, the model deployed; ``kept`` [families]: with so many channels of each."""
        total = self.cost.total(self.sizes if kept is None else kept)
        return FLOPS_PER_PRODUCT * total * image_size**2 / 1e9


def channel_groups(model: DetectionModel, *, trainable: bool = False) -> ChannelGroups:
    """The channels of ``model`` that may go. Those of the image, the outputs, grouped convolutions and rows that only
    auxiliary heads use stay; with ``trainable`` also those of which a tensor is frozen."""
    walk = _Walk(model)
    if trainable:
        for use in walk.uses:
            if not all(p.requires_grad for module in _modules(model, use) for p in module.parameters(recurse=False)):
                walk.fix(use.outputs)
    for use in walk.uses:
        use.inputs, use.outputs = walk.roots(use.inputs), walk.roots(use.outputs)
    for use in walk.uses:  # one channel twice in a layer: its rows cannot be told apart
        walk.fix([number for number, count in Counter(use.outputs).items() if count > 1])
    for use in walk.uses:
        use.inputs, use.outputs = walk.roots(use.inputs), walk.roots(use.outputs)
    families = tuple(_families(model, walk.uses))
    return ChannelGroups(families, tuple(walk.uses), ChannelCost(walk.uses, families))


def _modules(model: nn.Module, use: Use) -> list[nn.Module]:
    return [model.get_submodule(name) for name in (*use.convs, *use.norms)]


def _families(model: nn.Module, uses: Sequence[Use]) -> list[Channels]:
    """Channels that stand side by side in all the layers that produce them, in order of the first of these."""
    places: dict[int, list[tuple[int, int]]] = {}
    for index, use in enumerate(uses):
        for row, number in enumerate(use.outputs):
            if number != FIXED:
                places.setdefault(number, []).append((index, row))
    found: list[list[int]] = []
    for number, own in places.items():
        last = places[found[-1][-1]] if found else []
        if own == [(index, row + 1) for index, row in last]:
            found[-1].append(number)
        else:
            found.append([number])
    names: Counter[str] = Counter()
    families = []
    for numbers in found:
        own = places[numbers[0]]
        first = uses[own[0][0]].name
        names[first] += 1
        name = first if names[first] == 1 else f"{first}#{names[first]}"
        tied = tuple(
            (tensor, slice(start, start + len(numbers)))
            for index, start in own
            for module in _modules(model, uses[index])
            for tensor in module.parameters(recurse=False)
        )
        families.append(Channels(name, len(numbers), tuple(numbers), tuple(own), tied))
    return families


@dataclass(frozen=True)
class _Map:
    """The channels of a feature map by number, and its stride."""

    channels: tuple[int, ...]
    stride: Fraction


class _Walk:
    """Follows every channel through the rows. Numbers that are tied to each other have one root."""

    def __init__(self, model: DetectionModel) -> None:
        self.uses: list[Use] = []
        self._parents = [FIXED]
        self._leads = {index for index, _ in model._inference_plan}
        maps = {-1: _Map((FIXED,) * model.yaml["ch"], Fraction(1))}
        for index, layer in enumerate(model.model):
            inputs = [maps[source] for source in model._sources[index]]
            self._computed = index in self._leads
            name = f"model.{index}"
            if isinstance(layer, Detect):
                self._head(name, layer, inputs)
                continue
            blocks = layer.named_children() if isinstance(layer, nn.Sequential) else [("", layer)]
            for part, block in blocks:
                inputs = [_RULES[type(block)](self, f"{name}.{part}".rstrip("."), block, inputs)]
            maps[index] = inputs[0]

    def roots(self, numbers: Sequence[int]) -> list[int]:
        return [self._root(number) for number in numbers]

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = number = self._parents[self._parents[number]]
        return number

    def tie(self, some: Sequence[int], others: Sequence[int]) -> None:
        for pair in zip(some, others, strict=True):
            first, second = sorted(self.roots(pair))
            self._parents[second] = first  # the smaller: what is tied to FIXED is fixed

    def fix(self, numbers: Sequence[int]) -> None:
        self.tie(numbers, (FIXED,) * len(numbers))

    def convolve(self, name: str, convs: Sequence[str], norms: Sequence[str], conv: Any, x: _Map) -> _Map:
        """The map of the branches ``convs`` of the block ``name``; ``conv``: the one that counts."""
        numbers = list(range(len(self._parents), len(self._parents) + conv.out_channels))
        self._parents += numbers
        if conv.groups > 1:
            self.fix(x.channels)
        if conv.groups > 1 or not self._computed:
            self.fix(numbers)
        stride = x.stride * conv.stride[0]
        work = conv.kernel_size[0] * conv.kernel_size[1] / conv.groups / float(stride) ** 2
        paths = {part: f"{name}.{part}".strip(".") for part in (*convs, *norms)}
        self.uses.append(
            Use(
                name,
                tuple(paths[part] for part in convs),
                tuple(paths[part] for part in norms),
                list(x.channels),
                numbers,
                work if self._computed else 0.0,
            )
        )
        return _Map(tuple(numbers), stride)

    def conv(self, name: str, block: Any, inputs: Sequence[_Map]) -> _Map:
        norms = ["bn"] if isinstance(block.bn, nn.BatchNorm2d) else []
        return self.convolve(name, ["conv"], norms, block.conv, inputs[0])

    def rep_conv(self, name: str, block: Any, inputs: Sequence[_Map]) -> _Map:
        if block.rbr_reparam is not None:
            return self.convolve(name, ["rbr_reparam"], [], block.rbr_reparam, inputs[0])
        norms = ["rbr_dense.1", "rbr_1x1.1"]
        if block.rbr_identity is not None:
            norms.append("rbr_identity")
        result = self.convolve(name, ["rbr_dense.0", "rbr_1x1.0"], norms, block.rbr_dense[0], inputs[0])
        if block.rbr_identity is not None:
            self.tie(inputs[0].channels, result.channels)
        return result

    def sppcspc(self, name: str, block: Any, inputs: Sequence[_Map]) -> _Map:
        def cv(number: int, x: _Map) -> _Map:
            return self.conv(f"{name}.cv{number}", getattr(block, f"cv{number}"), [x])

        inner = cv(4, cv(3, cv(1, inputs[0])))
        pooled = replace(inner, channels=inner.channels * (1 + len(block.kernels)))
        inner = cv(6, cv(5, pooled))
        return cv(7, replace(inner, channels=inner.channels + cv(2, inputs[0]).channels))

    def down_c(self, name: str, block: Any, inputs: Sequence[_Map]) -> _Map:
        strided = self.conv(f"{name}.cv2", block.cv2, [self.conv(f"{name}.cv1", block.cv1, inputs)])
        pooled = self.conv(f"{name}.cv3", block.cv3, [replace(inputs[0], stride=strided.stride)])
        return replace(strided, channels=strided.channels + pooled.channels)

    def pool(self, name: str, block: Any, inputs: Sequence[_Map]) -> _Map:
        return replace(inputs[0], stride=inputs[0].stride * block.stride)

    def upsample(self, name: str, block: Any, inputs: Sequence[_Map]) -> _Map:
        return replace(inputs[0], stride=inputs[0].stride / int(block.scale_factor))

    def reorg(self, name: str, block: Any, inputs: Sequence[_Map]) -> _Map:
        return _Map(inputs[0].channels * 4, inputs[0].stride * 2)

    def concat(self, name: str, block: Any, inputs: Sequence[_Map]) -> _Map:
        return replace(inputs[0], channels=sum((x.channels for x in inputs), ()))

    def chuncat(self, name: str, block: Any, inputs: Sequence[_Map]) -> _Map:
        result = self.concat(name, block, inputs)
        self.fix(result.channels)  # its halves must stay halves
        return result

    def shortcut(self, name: str, block: Any, inputs: Sequence[_Map]) -> _Map:
        self.tie(inputs[0].channels, inputs[1].channels)
        return inputs[0]

    def _head(self, name: str, head: Any, inputs: Sequence[_Map]) -> None:
        for level, x in enumerate(inputs[: head.nl]):
            self.convolve(f"{name}.m.{level}", [""], [], head.m[level], x)
            if hasattr(head, "ia"):
                self.uses[-1].implicit = f"{name}.ia.{level}.implicit"
            self.fix(self.uses[-1].outputs)
        self._computed = False
        for level, x in enumerate(inputs[head.nl :]):
            self.convolve(f"{name}.m2.{level}", [""], [], head.m2[level], x)


_Rule = Callable[[_Walk, str, Any, Sequence[_Map]], _Map]
_RULES: dict[type[nn.Module], _Rule] = {
    Conv: _Walk.conv,
    RepConv: _Walk.rep_conv,
    SPPCSPC: _Walk.sppcspc,
    DownC: _Walk.down_c,
    MP: _Walk.pool,
    SameMaxPool: _Walk.pool,
    nn.Upsample: _Walk.upsample,
    ReOrg: _Walk.reorg,
    Concat: _Walk.concat,
    Chuncat: _Walk.chuncat,
    Shortcut: _Walk.shortcut,
}
