"""Options as fields of dataclasses: what argparse, the checks and the help make of them."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from sp_yolo.cli import COMMANDS, main, options_of, parser_of
from sp_yolo.config import REQUIRED, Config, Rule, add_options, checked, entries, from_arguments, load_config, option
from sp_yolo.config.options import optional
from sp_yolo.engine import Trainer
from sp_yolo.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sea:
    """The sea.

    Its second sentence is no heading.
    """

    depth: float = option(10.0, "in m", rule=Rule(0, 11000))
    boats: tuple[int, ...] = option((1, 2), "numbers", "--boats", "--ships", rule=Rule(1))


@dataclass(frozen=True, kw_only=True)
class Trip(Sea):
    """The trip."""

    port: str = option(REQUIRED, "where from", "port")
    depth: float = option(20.0, "in m", rule=Rule(0, 11000))
    days: int | None = option(None, "how long", rule=Rule(1))
    sails: bool = option(False, "under sail")
    sky: str = option("clear", "weather", rule=Rule(words=("clear", "gray")))
    rest: str = option("", "a break", without="noon")

    @staticmethod
    def prepare(given: Mapping[str, Any]) -> dict[str, Any]:
        return {**given, "port": given["port"].upper()}


def parsed(text: str) -> Trip:
    parser = argparse.ArgumentParser()
    add_options(parser, Trip)
    return from_arguments(Trip, parser.parse_args(text.split()))


def test_flags_and_defaults() -> None:
    assert parsed("oslo") == Trip(port="OSLO", depth=20.0, boats=(1, 2))
    assert parsed("oslo --ships 3 4 --depth 5 --days 7 --sails --sky gray --rest") == Trip(
        port="OSLO", boats=(3, 4), depth=5.0, days=7, sails=True, sky="gray", rest="noon"
    )
    with pytest.raises(SystemExit):
        parsed("")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x --depth -1", "--depth -1.0: must lie in [0, 11000]"),
        ("x --ships 1 0", "--boats 1 0: must be at least 1"),
        ("x --days 0", "--days 0: must be at least 1"),
        ("x --sky blue", "--sky blue: must be 'clear' or 'gray'"),
        ("x --depth nan", "--depth nan: must be a number"),
    ],
)
def test_values_outside_their_rule(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(text)
    assert str(caught.value) == words


def test_names_from_python() -> None:
    with pytest.raises(UserError, match=r"unknown option 'dept' \(did you mean 'depth'\?\)"):
        checked(Trip, {"port": "x", "dept": 1})
    with pytest.raises(UserError, match=r"--days 2\.5: must be a whole number"):
        checked(Trip, {"port": "x", "days": 2.5})
    assert checked(Trip, {"port": "x", "boats": [5]}).boats == (5,)
    for given, meant in (("ships", "boats"), ("ship", "boats"), ("--depth", "depth")):  # flags, as one knows them
        with pytest.raises(UserError, match=rf"unknown option '{given}' \(did you mean '{meant}'\?\)"):
            checked(Trip, {"port": "x", given: 1})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("img", "did you mean 'img_size'"),
        ("imgsz", "did you mean 'img_size'"),
        ("batch", "did you mean 'batch_size'"),
        ("set", "did you mean 'overrides'"),
        ("lr0", "it is a hyperparameter, overrides={'lr0': ...} sets it"),
    ],
)
def test_flags_and_hyperparameters_given_to_a_trainer(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        Trainer.new(**{name: 64})
    assert str(caught.value).startswith(f"unknown option '{name}'") and words in str(caught.value)


def test_help_has_headings_and_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Trip)
    text = " ".join(parser.format_help().split())
    assert "The sea: " in text and "The trip: " in text and "second sentence" not in text
    assert text.count("--depth") == 2  # usage, and one line: the heir's default counts
    assert "in m (default 20)" in text and "numbers (default 1 2)" in text and "--sky clear|gray" in text


def test_what_was_not_given_is_none() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, optional(Sea))
    assert vars(from_arguments(optional(Sea), parser.parse_args([]))) == {"depth": None, "boats": None}
    assert vars(from_arguments(optional(Sea), parser.parse_args(["--depth", "10"])))["depth"] == 10.0
    assert "in m (default 10)" in parser.format_help()


def test_help_marks_what_is_required_and_shows_a_default_of_zero() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needed:
        """Needed."""

        port: str = option(REQUIRED, "where from")
        days: int = option(0, "how long")
        sails: bool = option(False, "under sail")

    parser = argparse.ArgumentParser()
    add_options(parser, Needed)
    text = " ".join(parser.format_help().split())
    assert "where from (required)" in text and "how long (default 0)" in text
    assert text.endswith("under sail") and text.count("required") == 1


@pytest.mark.parametrize("command", ["val", "predict"])
def test_the_device_has_a_heading_of_its_own(command: str) -> None:
    text = parser_of(command).format_help()
    assert text.count("Device and speed:") == 1
    assert "--device" not in text.partition("Device and speed:")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_words_and_every_example_is_read(command: str) -> None:
    parser = parser_of(command)
    for action in parser._actions:
        assert action.help and (action.help == argparse.SUPPRESS or len(action.help) > 1), action.option_strings
    examples = [line.strip() for line in str(parser.epilog).splitlines()[1:]]
    assert len(examples) == 3
    for line in examples:
        assert line.startswith(f"sp-yolo {command} ")
        options_of(command, shlex.split(line)[2:])


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("sp_yolo.cli.run_command", interrupted)
    assert main(["check", "--data", "x"]) == 130
    assert capsys.readouterr().err == "interrupted (Ctrl-C)\n"


def test_a_run_keeps_its_options_but_those_that_may_change() -> None:
    changing = {name for name, entry in entries(Config).items() if entry.option.on_resume}
    wanted = "accept_losses augment_on close_mosaic device epochs log max_minutes noplots"
    wanted += " patience quiet save_every workers"
    assert changing == set(wanted.split())


def test_options_that_depend_on_one_another() -> None:
    assert load_config(overrides={"root": "/data", "lr0": 0.1}) == load_config(root="/data", overrides={"lr0": 0.1})
    assert load_config(adam=True).optimizer == "adam" and load_config(optimizer="AdamW").optimizer == "adamw"
    assert load_config(img_size=320).img_size == (320, 320)
    for options, words in (
        ({"adam": True, "optimizer": "sgd"}, "--adam and --optimizer sgd"),
        ({"nosave": True, "save_every": 5.0}, "--nosave and --save-every 5"),
        ({"img_size": (1, 2, 3)}, "takes one or two sizes"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(**options)
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().epochs = 3  # type: ignore[misc]
