"""Optimizers of other packages: found by name, refused where they cannot train, given the groups they need."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from sp_yolo.config import OptimizerRecipe
from sp_yolo.engine.optimizer import build_optimizer, find_optimizer
from sp_yolo.errors import EnvironmentFault, UserError
from sp_yolo.models import build_model


class _SignDescent(torch.optim.Optimizer):
    """An optimizer of somebody's own module, with an argument of its own."""

    def __init__(self, params: object, lr: float = 0.25, scale: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "scale": scale})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * group["scale"] * parameter.grad.sign()


class _TwoPasses(_SignDescent):
    first_step = None


class _Closure(_SignDescent):
    def step(self, closure) -> None:  # type: ignore[no-untyped-def, override]
        closure()


class _Explodes(_SignDescent):
    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.fill_(torch.nan)


class _NoRate(torch.optim.Optimizer):
    def __init__(self, params: object) -> None:
        super().__init__(params, {})


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("somebodys")
    vars(own).update(Sign=_SignDescent, TwoPasses=_TwoPasses, Closure=_Closure, Explodes=_Explodes, NoRate=_NoRate)
    monkeypatch.setitem(sys.modules, "somebodys", own)


def built(name: str, keywords: dict[str, object] | None = None) -> torch.optim.Optimizer:
    model = build_model("yolov7-tiny", num_classes=2)
    recipe = OptimizerRecipe(lr0=0.004)
    return build_optimizer(name, model, recipe, weight_decay=0.01, total_steps=9, keywords=keywords)


def test_a_class_of_any_module_with_its_arguments() -> None:
    optimizer = built("somebodys:Sign", {"scale": 2.0})
    assert type(optimizer) is _SignDescent
    names = {group["name"]: (group["lr"], group["scale"], group["weight_decay"]) for group in optimizer.param_groups}
    assert names == {
        **dict.fromkeys(("backbone", "head"), (0.004, 2.0, 0.01)),
        **dict.fromkeys(("bias", "norm"), (0.004, 2.0, 0.0)),
    }
    entry = find_optimizer("somebodys:Sign")
    assert entry.own_lr == 0.25 and not entry.momentum and entry.grid[2] == 0.25


@pytest.mark.parametrize(
    ("name", "keywords", "words"),
    [
        ("somebodys:TwoPasses", {}, "needs two backward passes for a step"),
        ("somebodys:Closure", {}, "evaluates the loss several times within a step (a closure)"),
        ("LBFGS", {}, "evaluates the loss several times within a step (a closure)"),
        ("somebodys:Explodes", {}, "the weights are not finite after two steps"),
        ("somebodys:NoRate", {}, "has no learning rate to set"),
        ("somebodys:Nothing", {}, "somebodys:Nothing: module 'somebodys' has no attribute 'Nothing'"),
        ("torch.nn:Linear", {}, "torch.nn:Linear: is no class of optimizers"),
        ("torch.optim:Muon", {}, "only supports 2D parameters"),
        ("somebodys:Sign", {"scales": 2}, "unexpected keyword argument 'scales'"),
        ("somebodys:Sign", {"lr": 2}, "--opt lr: is lr0 of the recipe"),
        ("somebodys:Sign", {"weight_decay": 2}, "--opt weight_decay: is weight_decay of the recipe"),
        ("sp", {"betas": [0.9, 0.9]}, "--opt betas: SP's settings are the recipe's sp_*"),
        ("adamw", {"beta": 0.9}, "--optimizer adamw: AdamW.__init__() got an unexpected keyword argument 'beta'"),
        ("adamw", {"betas": [0.9, 1.9]}, "--optimizer adamw: Invalid beta parameter at index 1: 1.9"),
        ("adamz", {}, "did you mean adam"),
    ],
)
def test_what_cannot_train_is_refused_in_one_line(name: str, keywords: dict[str, object], words: str) -> None:
    if name == "torch.optim:Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch without Muon")
    with pytest.raises(UserError) as caught:
        find_optimizer(name, keywords)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentFault, match=r"--optimizer nowhere:Sign: No module named 'nowhere'$"):
        find_optimizer("nowhere:Sign")
    for name in ("timm:lion", "pytorch_optimizer:Lion", "muon"):
        for module in ("timm", "timm.optim", "pytorch_optimizer"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(EnvironmentFault, match=rf"--optimizer {name}: .*pip install 'sp-yolo\[optimizers\]'"):
            find_optimizer(name)


def test_the_trial_draws_nothing_from_the_stream_of_the_run() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    find_optimizer("somebodys:Sign", {"scale": 3.5})
    assert torch.equal(torch.rand(3), expected)


def test_betas_are_left_alone_where_they_are_given() -> None:
    assert find_optimizer("adamw").momentum and not find_optimizer("adamw", {"betas": [0.9, 0.95]}).momentum
    assert find_optimizer("adamw", {"amsgrad": True}).momentum
    assert {tuple(group["betas"]) for group in built("adamw", {"betas": [0.9, 0.95]}).param_groups} == {(0.9, 0.95)}


def test_muon_gets_hidden_layers_and_adamw_the_rest() -> None:
    pytest.importorskip("timm")
    optimizer = built("muon")
    model_names = {id(p) for group in optimizer.param_groups for p in group["params"]}
    model = build_model("yolov7-tiny", num_classes=2)
    assert len(model_names) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        shapes = {parameter.ndim for parameter in group["params"]}
        assert group["use_muon"] == (
            group["name"] in ("backbone", "head") and shapes == {4} and len(group["params"]) > 3
        )
    outside = [len(group["params"]) for group in optimizer.param_groups if not group["use_muon"]]
    assert sorted(outside)[:2] == [1, 3]  # the first convolution; the three output layers
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    hidden = next(group["params"][2] for group in optimizer.param_groups if group["use_muon"])
    before = hidden.detach().clone()
    with torch.no_grad():
        optimizer.step()
    moved = (hidden - before * (1 - 0.004 * 0.01)).flatten(1)
    # An orthogonal step: all singular values alike, as no step of AdamW on random gradients has them.
    values = torch.linalg.svdvals(moved)
    assert values.max() / values.min() < 2
    rms = moved.square().mean().sqrt().item()
    assert 0.1 * 0.004 < rms < 0.4 * 0.004  # matched to AdamW's size of 0.2 lr


def test_names_of_timm_and_pytorch_optimizer() -> None:
    pytest.importorskip("timm")
    assert type(built("timm:lion")).__name__ == "Lion"
    pytest.importorskip("pytorch_optimizer")
    assert type(built("pytorch_optimizer:SOAP")).__name__ == "SOAP"
    with pytest.raises(UserError, match="--optimizer timm:nosuch: "):
        find_optimizer("timm:nosuch")
    with pytest.raises(UserError, match="second derivatives"):
        find_optimizer("pytorch_optimizer:AdaHessian")


def test_linear_layers_without_prunable_marks() -> None:
    """Groups that were made by hand: two dimensions are a hidden layer."""
    from sp_yolo.engine.foreign import _split_hidden

    model = nn.Linear(3, 2)
    split = _split_hidden([{"params": list(model.parameters()), "name": "head", "weight_decay": 0.1}])
    assert [(group["use_muon"], group["params"][0].ndim) for group in split] == [(True, 2), (False, 1)]
