"""Channels of a model, and the cut: FLOPs against torch's counter, equal outputs, files that load, refusals."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from support.networks import mini
from torch.utils.flop_counter import FlopCounterMode

from sp_yolo.errors import SPYoloError, UserError
from sp_yolo.models import (
    DetectionModel,
    build_model,
    channel_groups,
    check_compact,
    compact,
    deploy,
    description,
    load_weights,
    model_from_weights,
)
from sp_yolo.models.grammar import packaged_models, read_model_config
from sp_yolo.runtime.checkpoint import save_checkpoint

# Every kind of row that the seven models have, and two that they have not: a grouped convolution, tied halves.
ZOO = """
nc: 2
anchors: [[8,8, 12,12], [20,20, 28,28]]
backbone:
  - [-1, 1, ReOrg, []]                        # 0: 12 /2
  - [-1, 1, Conv, [16, 3, 2]]                 # 1: 16 /4
  - [-1, 1, DownC, [32]]                      # 2: 32 /8
  - [-1, 1, Conv, [16, 1, 1]]                 # 3
  - [-2, 1, Conv, [16, 3, 1, None, 1, nn.LeakyReLU(0.1)]]  # 4
  - [[-1, -2, -1], 1, Concat, [1]]            # 5: 48
  - [-1, 1, Conv, [32, 1, 1]]                 # 6
  - [[-1, 2], 1, Shortcut, [1]]               # 7: 32, tied to both halves of 2
  - [-1, 2, Conv, [32, 3, 1]]                 # 8: two
  - [-1, 1, RepConv, [32, 3, 1]]              # 9: with its identity
  - [-1, 1, Conv, [32, 3, 1, None, 4]]        # 10: in groups, stays whole, and its input
  - [-1, 1, SP, [5]]                          # 11
head:
  - [-1, 1, SPPCSPC, [16]]                    # 12
  - [-1, 1, MP, []]                           # 13: /16
  - [-1, 1, Conv, [24, 3, 1]]                 # 14
  - [-1, 1, nn.Upsample, [None, 2, nearest]]  # 15: /8
  - [[-1, 12], 1, Concat, [1]]                # 16: 40
  - [-1, 1, RepConv, [16, 3, 1]]              # 17
  - [14, 1, Conv, [16, 3, 1]]                 # 18
  - [16, 1, Conv, [8, 3, 1]]                  # 19: auxiliary alone
  - [14, 1, Conv, [8, 3, 1]]                  # 20
  - [[17, 18, 19, 20], 1, IAuxDetect, [nc, anchors]]
"""


def zoo() -> DetectionModel:
    torch.manual_seed(0)
    return build_model(yaml.safe_load(ZOO))


@torch.no_grad()
def lively(model: DetectionModel, seed: int = 0) -> DetectionModel:
    """Statistics, shifts and implicit vectors as of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "bias", "ia.0.implicit")) or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("running_var"):
            tensor.mul_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model


@torch.no_grad()
def without(model: DetectionModel, share: float = 0.5, seed: int = 0) -> DetectionModel:
    """``share`` of the channels of each family zero, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for family in channel_groups(model).families:
        gone = torch.randperm(family.size, generator=generator)[: int(share * family.size)]
        for tensor, rows in family.tied:
            tensor[rows][gone] = 0
    return model


def counted(model: DetectionModel, side: int) -> int:
    """FLOPs of one image, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        deploy(model)(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def test_families_of_a_network_by_hand() -> None:
    sizes = {family.name: family.size for family in channel_groups(zoo()).families}
    inner = {f"model.12.cv{i}": 16 for i in range(1, 8)}
    assert sizes == {
        **{"model.1": 16, "model.2.cv1": 16, "model.2.cv2": 16, "model.2.cv3": 16, "model.3": 16, "model.4": 16},
        "model.8.0": 32,
        **inner,
        **{"model.14": 24, "model.17": 16, "model.18": 16},
    }
    tied = {family.name: [rows for _, rows in family.tied] for family in channel_groups(zoo()).families}
    # 3 tensors of 2.cv2 and 3 of the first half of 6; 8.1 and 9 feed the grouped convolution and stay.
    assert tied["model.2.cv2"] == [slice(0, 16)] * 6 and tied["model.2.cv3"] == [slice(0, 16)] * 3 + [slice(16, 32)] * 3


def test_frozen_layers_keep_their_channels() -> None:
    model = mini()
    model.model[1].requires_grad_(False)
    assert "model.1" in [family.name for family in channel_groups(model).families]
    assert "model.1" not in [family.name for family in channel_groups(model, trainable=True).families]


# The zoo has every kind of row that these have.
LARGE = [
    pytest.param(name, marks=pytest.mark.slow) for name in packaged_models() if name not in ("yolov7-tiny", "yolov7")
]


@pytest.mark.parametrize("name", ["zoo", "yolov7-tiny", "yolov7", *LARGE])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """Before and after the cut, each model a quarter as wide."""
    model = zoo() if name == "zoo" else build_model({**read_model_config(name)[0], "width_multiple": 0.25}, 2)
    side = int(max(model.stride))
    groups = channel_groups(model)
    assert groups.gflops(side) == pytest.approx(counted(model, side) / 1e9, rel=1e-9)
    half = torch.tensor([float(family.size // 2) for family in groups.families], dtype=torch.float64)
    widths = {family.name: family.size // 2 for family in groups.families}
    small = build_model({**model.yaml, "widths": widths})
    assert channel_groups(small).gflops(side) == pytest.approx(counted(small, side) / 1e9, rel=1e-9)
    assert groups.gflops(side, half) == pytest.approx(channel_groups(small).gflops(side), rel=1e-9)
    every = torch.eye(len(half), dtype=torch.float64)
    totals = torch.tensor([groups.cost.total(half + one) - groups.cost.total(half) for one in every])
    assert torch.allclose(groups.cost.each(half), totals.double(), rtol=0.2, atol=1e-12)  # without the squared term


@pytest.mark.parametrize("name", ["zoo", "yolov7-tiny", "yolov7", "yolov7-e6e"])
def test_the_cut_computes_the_same(name: str) -> None:
    model = zoo() if name == "zoo" else build_model({**read_model_config(name)[0], "width_multiple": 0.25}, 2)
    held = without(lively(model)).double().eval()
    small = compact(held)
    side = 2 * int(max(held.stride))
    images = torch.rand(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(held(images)[0], small(images)[0], rtol=1e-9, atol=1e-9)
        held.train(), small.train()  # batch statistics, auxiliary heads
        for wanted, found in zip(held(images), small(images), strict=True):
            assert torch.allclose(wanted, found, rtol=1e-9, atol=1e-9)
    weights = sum(p.numel() for p in small.parameters())
    assert weights < 0.5 * sum(p.numel() for p in held.parameters())
    twice = compact(small)
    assert twice.yaml == small.yaml and sum(p.numel() for p in twice.parameters()) == weights


def test_a_compact_model_is_deployed_and_loaded(tmp_path: Path) -> None:
    held = without(lively(zoo()))
    small = compact(held)
    assert check_compact(held, small) < 1e-4
    path = tmp_path / "small.pt"
    save_checkpoint(path, {**description(small), "ema": small.state_dict()})
    found = model_from_weights(path).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(images)[0], small(images)[0])
        assert torch.allclose(deploy(found)(images)[0], held.eval()(images)[0], rtol=1e-4, atol=1e-3)
    other = build_model(small.yaml, 5)  # other classes: what fine-tuning does
    report = load_weights(other, path)
    assert report.transferred > 0.8 * report.total and other.num_classes == 5


def test_another_network_is_not_taken_for_the_cut() -> None:
    held = without(lively(mini()))
    small = compact(held)
    with torch.no_grad():
        small.model[0].bn.bias[0] += 0.1
    with pytest.raises(SPYoloError, match="differs from the model's"):
        check_compact(held, small)


def test_where_all_channels_are_zero_one_stays() -> None:
    held = without(lively(mini()), share=1.0)
    small = compact(held)
    assert set(small.yaml["widths"].values()) == {1} and check_compact(held, small) < 1e-4


def test_fused_weights_are_refused() -> None:
    with pytest.raises(UserError, match="fused"):
        compact(deploy(mini()))


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ([1], "must be a mapping"),
        ({"model.99": 4}, "no layer whose channels"),
        ({"model.0": 9}, "from 1 to 8, got 9"),
        ({"model.0": 0}, "from 1 to 8, got 0"),
        ({"model.0": True}, "from 1 to 8, got True"),
    ],
)
def test_wrong_widths_are_refused(widths: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_model({**copy.deepcopy(mini().yaml), "widths": widths})


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged_models())
def test_the_cut_of_whole_models(name: str) -> None:
    held = without(lively(build_model(name, 3)))
    assert check_compact(held, compact(held)) < 1e-4
