"""Flags that people bring from YOLOv5, ultralytics or the original: the counterpart, from the command they typed."""

import platform
import re
from pathlib import Path

import pytest
import torch

from sp_yolo.cli import main, main_train, parser_of
from sp_yolo.commands.relatives import RELATIVES

TYPED = [
    ("train", "--noval", "here it is --notest"),
    ("train", "--nosave-val", "--notest skips the validation"),
    ("train", "--nosave_val", "--notest skips the validation"),
    ("train", "--cos-lr", "--linear-lr is the other one"),
    ("train", "--image_weights", "did you mean --image-weights?"),
    ("train", "--save-perod", "did you mean --save-period?"),
    ("train", "--lr0=0.01", "--set lr0=0.01"),
    ("train", "--half", "--amp"),
    ("train", "--bbox_intervall", ""),  # a refused flag is no counterpart
    ("val", "--half", "--amp"),
    ("val", "--conf_thres", "did you mean --conf-thres?"),
    ("val", "--noval", ""),  # --notest belongs to train
    ("export", "--half", "here it is --fp16"),
    ("export", "--include", "here it is --format"),
    ("predict", "--save-crop", "it has no counterpart here, leave it out"),
    ("predict", "--hide-labels", "it has no counterpart here"),
]
NEEDED = {"predict": ["--weights", "w.pt", "--source", "x.jpg"], "train": [], "eval": ["a", "b"]}


@pytest.mark.parametrize(("command", "flag", "words"), TYPED, ids=lambda value: str(value))
def test_unknown_flag_is_answered_by_its_command(
    command: str, flag: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([command, *NEEDED.get(command, ["--weights", "w.pt"]), flag])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and len(error.splitlines()) == 1
    assert (
        error.startswith(f"error: unrecognized arguments: {flag}") and f"all flags: sp-yolo {command} --help" in error
    )
    if words:
        assert words in error
    else:
        assert "did you mean" not in error and "here it is" not in error


def known_flags(command: str) -> set[str]:
    return set(parser_of(command)._option_string_actions)


def test_every_counterpart_exists_and_is_none_of_the_known_flags() -> None:
    flags = {command: known_flags(command) for command in ("train", "val", "predict", "export")}
    everything = set().union(*flags.values())
    for foreign, answers in RELATIVES.items():
        for given, words in answers:
            assert words and (not given or given in everything), foreign
        # Where a command has the flag itself, nobody asks for a counterpart; somewhere it must be foreign.
        assert any(foreign not in known for known in flags.values()), foreign


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "trian is no command: train, .*; did you mean train.*sp-yolo --help"),
        (["detect"], "did you mean predict"),
        (["test"], "did you mean val"),
        (["--data", "x.yaml"], "required: COMMAND"),
        ([], "required: COMMAND"),
    ],
)
def test_a_wrong_command_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and len(error.splitlines()) == 1
    assert re.search(words, error), error


def test_version_names_what_a_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (lambda: main(["--version"]), lambda: main_train(["--version"])):
        with pytest.raises(SystemExit) as stopped:
            program()
        out = capsys.readouterr().out
        assert stopped.value.code == 0 and len(out.splitlines()) == 1
        assert f"torch {torch.__version__}, Python {platform.python_version()}, device " in out
