"""docs/commands is what the parsers say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sp_yolo.cli import COMMANDS, main

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_pages_are_those_of_the_parsers() -> None:
    command = [sys.executable, str(DOCS / "generate_commands.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_page_holds_every_flag_of_the_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--help is argparse's own text: a flag that it has and the page has not is a fault of the generator."""
    monkeypatch.setenv("COLUMNS", "10000")  # flags are not broken at a line's end
    with pytest.raises(SystemExit):
        main([name, "--help"])
    page = (DOCS / "commands" / f"{name}.md").read_text(encoding="utf-8")
    in_help, on_page = (set(re.findall(r"--[a-z][\w-]*", text)) for text in (capsys.readouterr().out, page))
    assert in_help - {"--help"} and in_help - {"--help"} <= on_page
