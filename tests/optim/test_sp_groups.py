"""build_param_groups on a small network with a detector's names, on plain ones, and what it refuses."""

import pytest
import torch
from torch import nn

from sp_yolo.optim import SP, build_param_groups


class ImplicitA(nn.Module):
    def __init__(self):
        super().__init__()
        self.implicit = nn.Parameter(torch.zeros(1, 4, 1, 1))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.ModuleList([nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)])
        self.ia = nn.ModuleList([ImplicitA(), ImplicitA()])


class Rows(nn.Module):
    """Rows 0-1 backbone, 2 neck, 3 detection."""

    backbone_rows = 2

    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))  # noqa: E731
        self.model = nn.Sequential(block(), block(), block(), Head())


def by_name(groups):
    return {g["name"]: dict(zip(g["param_names"], g["prunable"], strict=True)) for g in groups}


def test_rows():
    groups = build_param_groups(Rows(), weight_decay=0.01, sigma_backbone=0.7, sigma_head=0.3)
    assert [g["name"] for g in groups] == ["backbone", "head", "bias", "norm"]
    assert by_name(groups) == {
        "backbone": {"model.0.0.weight": False, "model.1.0.weight": True},
        "head": {"model.2.0.weight": True, "model.3.m.0.weight": False, "model.3.m.1.weight": False},
        "bias": dict.fromkeys(
            ["model.0.1.bias", "model.1.1.bias", "model.2.1.bias", "model.3.m.0.bias", "model.3.m.1.bias"], False
        ),
        "norm": dict.fromkeys(
            [
                "model.0.1.weight",
                "model.1.1.weight",
                "model.2.1.weight",
                "model.3.ia.0.implicit",
                "model.3.ia.1.implicit",
            ],
            False,
        ),
    }
    assert [g["weight_decay"] for g in groups] == [0.01, 0.01, 0.0, 0.0]
    assert [g["sigma"] for g in groups] == [0.7, 0.3, 0.0, 0.0]


@pytest.mark.parametrize("wrap", [lambda m: nn.ModuleDict({"module": m}), lambda m: m])
def test_number_predicate_and_wrappers(wrap):
    assert list(by_name(build_param_groups(wrap(Rows()), backbone=1))["backbone"]) == ["model.0.0.weight"]
    groups = by_name(build_param_groups(wrap(Rows()), backbone=lambda name: name.startswith("model.2.")))
    assert list(groups["backbone"]) == ["model.2.0.weight"]


def test_compiled_model_keeps_its_rows():
    groups = by_name(build_param_groups(torch.compile(Rows(), backend="eager")))
    assert list(groups["backbone"]) == ["model.0.0.weight", "model.1.0.weight"]


def test_plain_models():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    groups = by_name(build_param_groups(plain))
    assert groups["backbone"] == {"0.weight": False, "2.weight": True}
    assert groups["head"] == {"4.weight": False}
    assert groups["norm"] == {"1.weight": False}
    named = nn.ModuleDict({"features": nn.Conv2d(3, 4, 3), "neck": nn.Conv2d(4, 4, 1), "classifier": nn.Linear(4, 2)})
    groups = by_name(build_param_groups(named))
    assert list(groups["backbone"]) == ["features.weight"] and list(groups["head"]) == [
        "neck.weight",
        "classifier.weight",
    ]


def test_frozen_are_left_out_and_groups_may_be_empty():
    model = Rows()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("model.2."))
    groups = build_param_groups(model)
    assert [len(g["params"]) for g in groups] == [0, 1, 1, 1]
    assert by_name(groups)["head"] == {"model.2.0.weight": True}  # the frozen first conv is still the first
    optimizer = SP(groups, sigma=0.0)
    for g in groups:
        for p in g["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.sparsity() == {"backbone": 0.0, "head": 0.0, "bias": 0.0, "norm": 0.0}


def test_shared_parameters_are_counted_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert sum(len(g["params"]) for g in build_param_groups(model)) == 3


def test_refusals():
    with pytest.raises(ValueError, match=r"backbone=3 counts rows, but the model has no parameter named model"):
        build_param_groups(nn.Linear(2, 2), backbone=3)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_param_groups(frozen)


def test_settings_reach_every_group_and_pruning_spares_what_it_must():
    torch.manual_seed(0)
    model = Rows()
    groups = build_param_groups(model, sigma_backbone=0.5, sigma_head=0.75, every=1, start=0.0, end=0.0, total_steps=5)
    optimizer = SP(groups)
    assert all(g["every"] == 1 for g in optimizer.param_groups)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.sparsity() == {"backbone": 0.5, "head": 0.75, "bias": 0.0, "norm": 0.0}
    zeros = {
        name: int((p == 0).sum()) for name, p in model.named_parameters() if p.ndim == 4 and "implicit" not in name
    }
    assert zeros == {
        "model.0.0.weight": 0, "model.1.0.weight": 72, "model.2.0.weight": 108, "model.3.m.0.weight": 0,
        "model.3.m.1.weight": 0,
    }  # fmt: skip
