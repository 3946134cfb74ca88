"""Which recipe, and above all which learning rate, a run gets; and that it is said."""

import inspect
from pathlib import Path

import pytest
import torch

from sp_yolo.config import CHECKOUT, load_config
from sp_yolo.engine.model import ChosenRecipe, choose_recipe
from sp_yolo.errors import UserError
from sp_yolo.models import DetectionModel, build_model


@pytest.fixture(scope="module")
def model() -> DetectionModel:
    return build_model("yolov7-tiny")


def chosen(model: DetectionModel, **options: object) -> tuple[float, str]:
    found: ChosenRecipe = choose_recipe(load_config(**options), model)
    return found.recipe.optimizer.lr0, "\n".join(found.notes)


def recipe_file(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["RAdam", "Adagrad", "NAdam"])
def test_a_class_of_torch_keeps_its_own_rate(model: DetectionModel, tmp_path: Path, name: str) -> None:
    own = inspect.signature(getattr(torch.optim, name)).parameters["lr"].default
    lr0, words = chosen(model, optimizer=name)
    assert lr0 == own != 0.02  # SGD's, whose recipe it otherwise has
    assert f"lr0 {own:g} is the default of {name.lower()}, all else is from sgd.yaml" in words
    assert chosen(model, optimizer=name, overrides={"lr0": 0.5}) == (0.5, "")
    lr0, words = chosen(model, optimizer=name, hyp=recipe_file(tmp_path, "extends: auto\nlr0: 0.3\n"))
    assert lr0 == 0.3 and f"lr0 0.3 is from {tmp_path}" in words and f"is {own:g}" in words
    assert chosen(model, optimizer=name, hyp=recipe_file(tmp_path, "mosaic: 0\n"))[0] == own


def test_sp_at_the_rate_of_sgd_is_warned_of(model: DetectionModel, tmp_path: Path) -> None:
    hyp = str(CHECKOUT / "hyp" / "hyp.scratch.p5.yaml")
    lr0, words = chosen(model, hyp=hyp)
    assert lr0 == 0.01 and words.startswith(f"warning: {hyp}: lr0 0.01 ") and "--set lr0=0.002" in words
    assert "\n" not in words
    assert "warning: " in chosen(model, optimizer="sp", compat=True)[1]
    for options in (
        {"hyp": hyp, "overrides": {"lr0": 0.01}},
        {"hyp": hyp, "optimizer": "sgd"},
        {"hyp": recipe_file(tmp_path, "extends: sp.yaml\nmosaic: 0.5\n")},
        {"compat": True},
        {},
    ):
        assert chosen(model, **options)[1] == ""


def test_what_a_recipe_leaves_to_the_defaults_is_said(model: DetectionModel, tmp_path: Path) -> None:
    hyp = recipe_file(tmp_path, "lr0: 0.003\nlrf: 0.2\n")
    words = chosen(model, hyp=hyp, overrides={"momentum": 0.9})[1]
    assert words.startswith(f"{hyp}: defaults for 27 hyperparameters not in it: weight_decay, warmup_epochs, ")
    assert "`extends: sp.yaml`" in words and "momentum" not in words.replace("warmup_momentum", "")
    complete = (CHECKOUT / "hyp" / "hyp.scratch.tiny.yaml").read_text().replace("lr0: 0.01", "lr0: 0.003")
    assert chosen(model, hyp=recipe_file(tmp_path, complete))[1] == ""
    one = complete.replace("mixup: 0.05\n", "")
    assert "defaults for 1 hyperparameter not in it: mixup (" in chosen(model, hyp=recipe_file(tmp_path, one))[1]


def test_an_optimizer_without_a_recipe_for_detectors(model: DetectionModel) -> None:
    with pytest.raises(UserError, match="--optimizer sp-paper: has no recipe for detectors"):
        chosen(model, optimizer="sp-paper")
