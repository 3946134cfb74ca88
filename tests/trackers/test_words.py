"""Where words go: notes through logging and, from a command, to stdout; a bar that the user's variables turn off."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from support.launcher import Program

from sp_yolo.runtime.words import bar_switch, note, shown


def test_a_line_is_a_record(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sp_yolo")
    note("one\nwarning: two\n\n")
    assert [(each.levelname, each.message) for each in caplog.records] == [("INFO", "one"), ("WARNING", "two")]
    assert capsys.readouterr().out == ""
    with shown(), shown():
        note("one\nwarning: 50 %d off")
    note("three")
    assert capsys.readouterr().out == "one\nwarning: 50 %d off\n"


@pytest.mark.parametrize("off", [True, False, None])
def test_the_users_variable_wins_where_a_bar_is_wanted(off: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert bar_switch(off) == {"disable": off}
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert bar_switch(off) == ({"disable": True} if off else {})


def test_a_run_without_bar_and_colour(toy_yaml: Path, mini_cfg: str, tmp_path: Path) -> None:
    """The epoch's line is then printed with the table; on a terminal too nothing is coloured."""
    program = Program(tmp_path, TQDM_DISABLE="1", NO_COLOR="1", TERM="xterm-256color")
    flags = ["--data", str(toy_yaml), "--cfg", mini_cfg, "--img", "64", "--batch", "4", "--epochs", "1", "--noplots"]
    ran = program.run(*flags, "--workers", "0", "--device", "cpu", "--noautoanchor")
    assert ran.returncode == 0 and "it/s" not in ran.stderr and "0/0" not in ran.stderr, ran.stderr
    lines = ran.stdout.splitlines()
    header = next(index for index, line in enumerate(lines) if line.split()[:2] == ["Epoch", "gpu_mem"])
    assert lines[header + 1].split()[0] == "0/0" and len(lines[header + 1].split()) == 8
    assert "\x1b" not in ran.stdout + ran.stderr and os.linesep.join(lines).count("Optimizer groups: ") == 1
