"""Strict YAML, hyperparameters and dataset descriptions: what is refused, and in which words."""

import dataclasses
from pathlib import Path

import pytest
import torch

from sp_yolo.config import (
    CHECKOUT,
    HYP_RULES,
    Recipe,
    load_config,
    load_dataset_config,
    load_recipe,
    parse_assignments,
    read_yaml,
)
from sp_yolo.errors import UserError
from sp_yolo.optim import SP


def write(folder: Path, text: str, name: str = "file.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' appears twice"),
        ("a: 1\nb: !!python/object/apply:os.system ['true']\n", 2, "not allowed"),
        ("a: 1\nb: !shout x\n", 2, "not allowed"),
        ("- 1\n", 1, "key: value"),
        ("a: 1\nb:\n\tc: 2\n", 3, "\\t"),
        ("a: [1, 2\nb: 3\n", 2, ""),
        ("", 1, "key: value"),
    ],
)
def test_read_yaml_refuses_with_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_yaml_numbers_and_lines(tmp_path: Path) -> None:
    values = read_yaml(write(tmp_path, "# comment\na: 1e-3\nb: 1.5E+2\nc: [1, x]\nd: '1e-3'\n"))
    assert values == {"a": 1e-3, "b": 150.0, "c": [1, "x"], "d": "1e-3"}
    assert [values.line(key) for key in "abcd"] == [2, 3, 4, 5]


@pytest.mark.parametrize("path", sorted((CHECKOUT / "hyp").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_loads(path: Path) -> None:
    assert set(load_recipe(path).flat()) == set(HYP_RULES)


def test_original_values_are_the_published_ones() -> None:
    """Spot values of the recipes that the original ships."""
    tiny, p5, p6 = (load_recipe(CHECKOUT / "hyp" / f"hyp.scratch.{size}.yaml").flat() for size in ("tiny", "p5", "p6"))
    assert (tiny["cls"], tiny["obj"], tiny["lrf"], tiny["scale"], tiny["mixup"]) == (0.5, 1.0, 0.01, 0.5, 0.05)
    assert (p5["cls"], p5["obj"], p5["lrf"], p5["scale"], p5["mixup"]) == (0.3, 0.7, 0.1, 0.9, 0.15)
    assert p6["lrf"] == 0.2
    assert {hyp["momentum"] for hyp in (tiny, p5, p6)} == {0.937}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("lr0: 0.1\nlr_0: 0.1\n", 2, "did you mean 'lr0'"),
        ("lr0: abc\n", 1, "must be a number"),
        ("momentum: 1.5\n", 1, "must lie in [0, 0.9999]"),
        ("mosaic: true\n", 1, "must be a number"),
        ("lr0: .nan\n", 1, "must be a number"),
        ("sp_rho: 1.0\n", 1, "must lie in [0, 1)"),
        ("extends: [tiny]\n", 1, "must be a recipe file"),
        ("sp_mode: clever\n", 1, "'robust' or 'paper'"),
        ("sp_every: 2.5\n", 1, "a whole number"),
    ],
)
def test_load_recipe_refuses(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert f"{path}:{line}: " in str(caught.value) and words in str(caught.value)


def test_a_recipe_holds_what_differs_from_the_one_that_it_extends(tmp_path: Path) -> None:
    """Values by hand: the original's mixup by size, SP's rate, and what the file itself says last."""
    path = write(tmp_path, "extends: sp.yaml\nmosaic: 0.25\n", "mine.yaml")
    for size, mixup in (("tiny", 0.05), ("p5", 0.15), ("p6", 0.15)):
        recipe = load_recipe(path, size=size)
        assert (recipe.optimizer.lr0, recipe.augment.mosaic, recipe.augment.mixup) == (0.002, 0.25, mixup)
    second = write(tmp_path, "extends: mine.yaml\nmixup: 0.5\n", "second.yaml")  # beside it
    assert load_recipe(second).augment.mixup == 0.5 and load_recipe(second).augment.mosaic == 0.25
    write(tmp_path, "extends: second.yaml\n", "mine.yaml")
    with pytest.raises(UserError, match="extends itself"):
        load_recipe(second)


def test_settings_of_sp_have_the_bounds_and_defaults_of_the_class() -> None:
    model = torch.nn.Linear(2, 2)
    recipe = vars(Recipe().optimizer)
    for key, value in recipe.items():
        if key.startswith("sp_") and key != "sp_channels":  # which is said to SP by remove_groups
            setting = key.removeprefix("sp_").removesuffix("_backbone").removesuffix("_head")
            assert SP(model.parameters()).defaults[setting] == value
    for key, setting, bad in (("sp_rho", "rho", 1.0), ("sp_every", "every", 0), ("sp_sigma_head", "sigma", -0.1)):
        with pytest.raises(ValueError, match=setting):
            SP(model.parameters(), **{setting: bad})
        with pytest.raises(ValueError, match="must"):
            HYP_RULES[key].check(bad)


def test_overrides_win_and_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, "lr0: 0.5\n")
    assert load_recipe(path).optimizer.lr0 == 0.5
    assert load_recipe(path, parse_assignments(["lr0=1e-3"])).optimizer.lr0 == 1e-3
    assert load_recipe(path, parse_assignments(["ema_decay=auto"])).schedule.ema_decay == "auto"
    with pytest.raises(UserError, match="--set: lr0 = 'abc'"):
        load_recipe(path, parse_assignments(["lr0=abc"]))
    with pytest.raises(UserError, match="unknown hyperparameter 'nosuchkey'"):
        load_recipe(path, parse_assignments(["nosuchkey=1"]))
    with pytest.raises(UserError, match=r"'lr' \(did you mean 'lr0'\?\)"):
        load_recipe(path, parse_assignments(["lr=0.1"]))
    with pytest.raises(UserError, match="KEY=VALUE"):
        parse_assignments(["lr0"])


def test_a_recipe_of_the_version_before_is_answered_by_its_successor() -> None:
    with pytest.raises(UserError, match=r"sp\.p5\.yaml: no such file; version 0\.2 has sp\.yaml"):
        load_recipe("hyp/sp.p5.yaml")


def test_generated_data_lie_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the checkout holds some: what a program prints and what it makes are in the same place."""
    (tmp_path / "checkout" / "data" / "toy").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.setattr("sp_yolo.config.dataset.CHECKOUT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "work")
    assert load_dataset_config("data/toy.yaml").root == (tmp_path / "work" / "data" / "toy").resolve()


def test_dataset_paths_and_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("one/images/train", "one/images/val", "two/images/train", "two/images/val"):
        (tmp_path / folder).mkdir(parents=True)
    text = f"root: {tmp_path}/one\ntrain: images/train\nval: [images/val]\nnc: 2\nnames: {{0: a, 1: b}}\n"
    path = write(tmp_path, text, "my-set.yaml")
    dataset = load_dataset_config(path)
    assert dataset.train == (str(tmp_path / "one/images/train"),) and dataset.names == ("a", "b")
    assert load_dataset_config(path, root=str(tmp_path / "two")).root == tmp_path / "two"
    monkeypatch.setenv("MY_SET_ROOT", str(tmp_path / "two"))
    assert load_dataset_config(path).val == (str(tmp_path / "two/images/val"),)
    with pytest.raises(UserError, match="no 'test' split"):
        dataset.entries("test")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: nosuch\nnames: [a]\n", ":1: train: no such file or folder"),
        ("train: .\nnames: [a, a]\n", ":2: class name 'a' appears twice"),
        ("train: .\nnc: 3\nnames: [a]\n", ":2: nc = 3, but 1 names"),
        ("train: .\nnames: {0: a, 2: b}\n", ":2: names must be numbered 0..1"),
        ("train: .\nnames: {0: a, b: c}\n", ":2: names must be numbered 0..1"),
        ("train: .\nnames: [a, yes]\n", "quote it"),
        (f"train: {'a' * 5000}\nnames: [a]\n", "cannot be used as a path: File name too long"),
        ("root: ~nobody-here\ntrain: .\nnames: [a]\n", ":1: '~nobody-here' cannot be used as a path"),
        ("train: .\nnames: [a]\nvall: x\n", ":3: unknown key 'vall' (did you mean 'val'?)"),
        ("root: /no/such\ntrain: .\nnames: [a]\n", ":1: dataset root '/no/such' is no folder"),
        ("names: [a]\n", "none of train, val and test"),
        ("train: .\nval: .\nimages: {val: nosuch}\nnames: [a]\n", ":3: images: no such folder"),
    ],
)
def test_dataset_refusals(tmp_path: Path, text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_dataset_config(write(tmp_path, text))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("coco.yaml", "root: nowhere\ntrain: a.json\nnames: [a]\n"),
        ("coco.yaml", "train: a.json\nnames: [a]\n"),
        ("voc.yaml", "train: .\nimages: {train: nosuch}\nnames: [a]\n"),
    ],
    ids=["root", "annotations", "images"],
)
def test_absent_data_that_can_be_fetched(tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_dataset_config(write(tmp_path, text, name))
    word = name.removesuffix(".yaml")
    for hint in (f"`sp-yolo download {word}`", "--root DIR", f"{word.upper()}_ROOT=DIR"):
        assert hint in str(caught.value)
    with pytest.raises(UserError) as caught:
        load_dataset_config(write(tmp_path, text, "mine.yaml"))
    assert "download" not in str(caught.value)


def test_training_has_no_need_of_a_test_split(tmp_path: Path) -> None:
    text = "train: .\nval: .\ntest: nosuch.json\nimages: {train: ., val: ., test: nosuch}\nnames: [a]\n"
    dataset = load_dataset_config(write(tmp_path, text))
    assert dataset.test is None and "test left out" in dataset.notes[0]


def test_config_round_trip_and_refusals() -> None:
    config = load_config(data="data/bccd.yaml", img_size=[320], freeze=[3], overrides={"lr0": 0.2})
    assert config.img_size == (320, 320)
    assert load_config(**config.as_dict()) == config
    assert load_config(compat=True).optimizer == "sgd" and load_config().optimizer == "sp"
    for bad in ({"batch_size": -1}, {"img_size": [1, 2, 3]}, {"amp": "fp8"}, {"seed": -1}, {"epoch": 3}):
        with pytest.raises(UserError):
            load_config(**bad)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3  # type: ignore[misc]
