"""Configurations in the original's grammar: what is built, and what is refused with which words."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sp_yolo.errors import UserError
from sp_yolo.models import build_model
from sp_yolo.models.blocks import Conv
from sp_yolo.models.grammar import packaged_models

SMALL = """\
nc: 3
depth_multiple: 1.0
width_multiple: 1.0
anchors:
  - [10,13, 16,30]
  - [30,61, 62,45]
backbone:
  # [from, number, module, args]
  [[-1, 1, Conv, [16, 3, 2, None, 1, nn.LeakyReLU(0.1)]],  # 0
   [-1, 1, Conv, [24, 3, 4]],  # 1
   [-1, 1, MP, []],  # 2
  ]
head:
  [[-1, 1, SPPCSPC, [16]],  # 3
   [-1, 1, nn.Upsample, [None, 2, 'nearest']],
   [[-1, 1], 1, Concat, [1]],  # 5
   [[5, 3], 1, IDetect, [nc, anchors]],  # 6
  ]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_a_users_own_file(tmp_path: Path) -> None:
    model = build_model(write(tmp_path, SMALL))
    assert model.stride.tolist() == [8.0, 16.0] and model.backbone_rows == 3 and model.num_classes == 3
    assert model.names == ["0", "1", "2"] and model.yaml["ch"] == 3
    first, second = model.model[0], model.model[1]
    assert isinstance(first.act, nn.LeakyReLU) and first.act.negative_slope == 0.1 and first.act.inplace
    assert isinstance(second.act, nn.SiLU) and second.conv.padding == (1, 1)
    assert (first.bn.eps, first.bn.momentum) == (1e-3, 0.03)
    assert model.model[6].m[0].in_channels == 40
    maps = model(torch.zeros(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 2, 8, 12, 8), (2, 2, 4, 6, 8)]


def test_class_count_and_anchors_given_in_the_call(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    model = build_model(path, num_classes=7, anchors=[[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    assert model.num_classes == 7 and model.yaml["nc"] == 7
    assert model.head.na == 3 and model.head.m[0].out_channels == 3 * 12
    assert model.head.anchor_grid.flatten().tolist() == list(range(1, 13))
    assert model.head.anchors[1, 0].tolist() == [7 / 16, 8 / 16]
    assert build_model(path, anchors=4).head.anchors.shape == (2, 4, 2)


def test_anchors_given_coarse_to_fine_are_turned_round(tmp_path: Path) -> None:
    straight = build_model(write(tmp_path, SMALL)).head
    turned = build_model(write(tmp_path, SMALL), anchors=[[30, 61, 62, 45], [10, 13, 16, 30]]).head
    assert torch.equal(straight.anchors, turned.anchors) and torch.equal(straight.anchor_grid, turned.anchor_grid)
    straight.set_anchors(torch.tensor([[[80.0, 90], [90, 80]], [[8, 8], [16, 16]]]))
    assert straight.anchors.tolist() == [[[1, 1], [2, 2]], [[5, 5.625], [5.625, 5]]]


def test_width_and_depth_multiples(tmp_path: Path) -> None:
    text = SMALL.replace("width_multiple: 1.0", "width_multiple: 0.33").replace(
        "depth_multiple: 1.0", "depth_multiple: 0.5"
    )
    text = text.replace("[-1, 1, MP, []],", "[-1, 6, Conv, [24, 1]],").replace("Conv, [24, 3, 4]", "Conv, [24, 3, 8]")
    text = text.replace("Conv, [16, 3, 2", "Conv, [40, 3, 2")
    text = text.replace("[-1, 1], 1, Concat", "[-1, -1], 1, Concat")
    model = build_model(write(tmp_path, text))
    # ceil(40 * 0.33 / 8) * 8 = 16, ceil(24 * 0.33 / 8) * 8 = 8; 6 repeats at half depth are 3.
    assert model.model[0].conv.out_channels == 16 and model.model[1].conv.out_channels == 8
    assert isinstance(model.model[2], nn.Sequential) and len(model.model[2]) == 3
    assert "model.2.2.conv.weight" in model.state_dict()
    assert len(model(torch.zeros(2, 3, 64, 64))) == 2  # row 5 takes one layer twice


def test_output_convolutions_are_not_scaled(tmp_path: Path) -> None:
    """A channel count of na * (nc + 5) is an output: here 2 * 8 = 16, row 0, keeps its 16."""
    text = SMALL.replace("width_multiple: 1.0", "width_multiple: 0.25").replace("Conv, [24, 3, 4]", "Conv, [64, 3, 4]")
    model = build_model(write(tmp_path, text))
    assert model.model[0].conv.out_channels == 16 and model.model[1].conv.out_channels == 16


def test_output_biases_start_from_priors() -> None:
    torch.manual_seed(0)
    model = build_model("yolov7-tiny", 20)
    for conv, stride in zip(model.head.m, (8, 16, 32), strict=True):
        bias = conv.bias.detach().view(3, 25)
        spread = 1 / math.sqrt(conv.in_channels)  # torch's own start is uniform within this
        assert (bias[:, 4] - math.log(8 / (640 / stride) ** 2)).abs().max() <= spread
        assert (bias[:, 5:] - math.log(0.6 / 19.01)).abs().max() <= spread
        assert bias[:, :4].abs().max() <= spread
    assert float(model.head.im[0].implicit.detach().mean()) == pytest.approx(1, abs=0.02)
    assert float(model.head.ia[2].implicit.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_packaged_models_by_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = "yolov7 yolov7-d6 yolov7-e6 yolov7-e6e yolov7-tiny yolov7-w6 yolov7x"
    assert packaged_models() == wanted.split()
    with torch.device("meta"):
        keys = list(build_model("yolov7-tiny").state_dict())
        for name in ("yolov7-tiny.yaml", "cfg/training/yolov7-tiny.yaml"):
            assert list(build_model(name).state_dict()) == keys
        assert "model.77.ia.0.implicit" not in build_model("cfg/deploy/yolov7-tiny.yaml").state_dict()
    with pytest.raises(UserError, match=r"yolov8: no such model file, and not one of .*yolov7-tiny"):
        build_model("yolov8")
    # A file of that name comes first.
    (tmp_path / "yolov7-tiny").write_text(SMALL)
    assert build_model("yolov7-tiny").head.nl == 2


def test_no_random_number_is_drawn_for_structure() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with torch.device("meta"):
        build_model("yolov7-tiny")
    assert torch.equal(before, torch.get_rng_state())


REFUSED = {
    "unknown layer": ("MP, []", "Involution, [8]", r"mine\.yaml: row 2 \(backbone\[2\]\): Involution is not a layer"),
    "head in the middle": ("MP, []", "Detect, [nc, anchors]", r"row 2 .*: Detect must be the last row"),
    "no head": ("IDetect, [nc, anchors]", "Concat, [1]", r"row 6 \(head\[3\]\): the last row must be one of Detect"),
    "from of a later layer": (
        "[[-1, 1], 1, Concat",
        "[[-1, 9], 1, Concat",
        r"row 5 .*: from 9 is not a layer before it",
    ),
    "from before the start": ("[-1, 1, MP", "[-4, 1, MP", r"row 2 .*: from -4 is not a layer before it \(0 to 1\)"),
    "from itself": ("[[-1, 1], 1, Concat", "[[-1, 5], 1, Concat", r"row 5 .*: from 5 is not"),
    "from of text": ("[-1, 1, MP", "[last, 1, MP", r"row 2 .*: from must be layer numbers, got 'last'"),
    "list for a single input": ("[-1, 1, MP", "[[-1, 0], 1, MP", r"row 2 .*: MP\[\]: "),
    "strides do not meet": (
        "[[-1, 1], 1, Concat",
        "[[-1, 0], 1, Concat",
        r"row 5 .*different strides: 8 of layer 4, 2 of",
    ),
    "negative channels": (
        "Conv, [24, 3, 4]",
        "Conv, [-24, 3, 4]",
        r"row 1 .*channels must be a whole number from 1, got -24",
    ),
    "channels of text": ("Conv, [24, 3, 4]", "Conv, [abc, 3, 4]", r"row 1 .*channels must be a whole number"),
    "no channels": ("Conv, [24, 3, 4]", "Conv, []", r"row 1 .*args are channels, kernel, stride"),
    "too many arguments": ("MP, []", "MP, [2, 2, 2]", r"row 2 .*MP\[2, 2, 2\]: args are kernel"),
    "groups do not divide": ("Conv, [24, 3, 4]", "Conv, [24, 3, 4, None, 5]", r"row 1 .*Conv.*divisible by groups"),
    "shortcut of other channels": (
        "[-1, 1], 1, Concat, [1]",
        "[-1, 1], 1, Shortcut, [1]",
        r"row 5 .*equal channels, got \[16, 24\]",
    ),
    "stride of zero": ("Conv, [24, 3, 4]", "Conv, [24, 3, 0]", r"row 1 .*stride must be a whole number from 1, got 0"),
    "repeated with other channels": (
        "[-1, 1, Conv, [24, 3, 4]]",
        "[-1, 3, Conv, [24, 3, 1]]",
        r"row 1 .*equal input and output",
    ),
    "number": ("[-1, 1, MP", "[-1, 0, MP", r"row 2 .*number must be a whole number from 1, got 0"),
    "row of three": ("[-1, 1, MP, []]", "[-1, 1, MP]", r"row 2 .*expected \[from, number, module, args\]"),
    "args no list": ("[-1, 1, MP, []]", "[-1, 1, MP, 2]", r"row 2 .*args must be a list, got 2"),
    "module no name": ("[-1, 1, MP, []]", "[-1, 1, 5, []]", r"row 2 .*module must be a name"),
    "unknown activation": ("nn.LeakyReLU(0.1)", "nn.Softmax(1)", r"row 0 .*nn\.Softmax\(1\) is not an activation"),
    "code as activation": ("nn.LeakyReLU(0.1)", "nn.ReLU(print(1))", r"row 0 .*is not an activation"),
    "anchors for too few levels": ("  - [30,61, 62,45]\n", "", r"row 6 .*anchors must be an integer or 2 lists"),
    "anchors odd": ("[30,61, 62,45]", "[30,61, 62]", r"row 6 .*anchors must be .*got \[30, 61, 62\]"),
    "anchors negative": ("[30,61, 62,45]", "[30,61, 62,-45]", r"row 6 .*-45 is not a positive number"),
    "head arguments": ("IDetect, [nc, anchors]", "IDetect, [nc]", r"row 6 .*IDetect args are nc, anchors"),
    "auxiliary inputs missing": (
        "[5, 3], 1, IDetect",
        "[5, 3, 5], 1, IAuxDetect",
        r"row 6 .*auxiliary input for each lead",
    ),
    "classes": ("nc: 3", "nc: 0", r"mine\.yaml.*nc must be a positive number, got 0"),
    "classes not whole": ("nc: 3", "nc: 2.5", r"nc must be a whole number, got 2\.5"),
    "width": ("width_multiple: 1.0", "width_multiple: -1", r"width_multiple must be a positive number"),
    "no backbone": ("backbone:", "spine:", r"mine\.yaml: backbone must be a list of rows"),
    "fixed size upsample": ("nn.Upsample, [None, 2", "nn.Upsample, [64, 2", r"row 4 .*not a fixed size"),
    "spp with even kernels": ("SPPCSPC, [16]", "SPPCSPC, [16, False, 1, 0.5, [4, 8]]", r"row 3 .*odd and increasing"),
    "yaml": ("nc: 3", "nc: [3", r"mine\.yaml:\d+: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_configurations_are_refused(name: str, tmp_path: Path) -> None:
    old, new, message = REFUSED[name]
    assert old in SMALL
    with pytest.raises(UserError, match=message) as caught:
        build_model(write(tmp_path, SMALL.replace(old, new)))
    assert "\n" not in str(caught.value)


def test_nothing_in_a_configuration_is_evaluated(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for code in (f"__import__('os').system('touch {marker}')", f"open({str(marker)!r}, 'w')"):
        config: dict[str, Any] = copy.deepcopy(build_model(write(tmp_path, SMALL)).yaml)
        config["backbone"][1][3][0] = code
        with pytest.raises(UserError):
            build_model(config)
        config["backbone"][1][3] = [24, 3, 4, None, 1, code]  # plain text as activation: none, as in the original
        assert isinstance(build_model(config).model[1].act, nn.Identity)
    assert not marker.exists()


def test_building_does_not_change_the_given_mapping(tmp_path: Path) -> None:
    config = build_model(write(tmp_path, SMALL)).yaml
    before = copy.deepcopy(config)
    build_model(config, num_classes=9, anchors=2)
    assert config == before


def test_activation_whitelist(tmp_path: Path) -> None:
    for text, kind in {
        "nn.SiLU()": nn.SiLU,
        "nn.ReLU()": nn.ReLU,
        "nn.Hardswish()": nn.Hardswish,
        "nn.Identity()": nn.Identity,
    }.items():
        model = build_model(write(tmp_path, SMALL.replace("nn.LeakyReLU(0.1)", text)))
        assert isinstance(model.model[0], Conv) and type(model.model[0].act) is kind
    assert isinstance(
        build_model(write(tmp_path, SMALL.replace("nn.LeakyReLU(0.1)", "False"))).model[0].act, nn.Identity
    )


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("yolov7-tinny", "yolov7-tiny"),
        ("YOLOv7_tiny.yaml", "yolov7-tiny"),
        ("cfg/training/yolov7-custom.yaml", "yolov7"),
        ("yolov7-w6-custom", "yolov7-w6"),
        ("yolov7X", "yolov7x"),
        ("yolov5s.yaml", "yolov7"),
        ("resnet50", ""),
    ],
)
def test_a_wrong_name_is_answered_by_the_nearest(given: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(given)
    words = str(caught.value)
    assert words.startswith(f"{given}: no such model file, and not one of yolov7, yolov7-d6, ")
    assert words.endswith(f"(did you mean {near}?)") if near else "mean" not in words


def test_weights_are_no_configuration() -> None:
    with pytest.raises(UserError, match=r"yolov7\.pt: weights are given as --weights"):
        build_model("yolov7.pt")
