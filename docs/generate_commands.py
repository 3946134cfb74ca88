"""Write docs/commands/*.md, one page per command, from each command's own argparse parser.

    python docs/generate_commands.py           # write the pages
    python docs/generate_commands.py --check   # say which are stale, exit 1

It needs two names of the package: ``sp_yolo.cli.COMMANDS`` (command -> module, words) and ``parser_of``. Nothing
but the parser is asked, so the pages hold what ``--help`` holds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sp_yolo.cli import COMMANDS, parser_of

FOLDER = Path(__file__).resolve().parent / "commands"
MADE = "<!-- Made by docs/generate_commands.py from the parsers; do not edit. -->"
# Prose that no parser knows: where a command is explained at length.
SEE = {
    "train": "[Getting started](../getting-started.md), [your data](../data.md), [exit codes](../faults.md)",
    "yolov7": "[SP in other trainers](../plugins.md#yolov7-and-its-relatives)",
    "val": "[Getting started](../getting-started.md#4-look)",
    "predict": "[Getting started](../getting-started.md#5-predict)",
    "export": "[Getting started](../getting-started.md#6-export), [a further format](../extending.md#an-export-format)",
    "saliency": "[Small, fast detectors](../channels.md)",
    "check": "[Your data](../data.md)",
    "classify": "[Comparing optimizers](../compare.md#one-run-several-seeds-sp-yolo-classify)",
    "compare": "[Comparing optimizers](../compare.md#a-table-sp-yolo-compare)",
    "tune": "[Better hyperparameters](../compare.md#better-hyperparameters-sp-yolo-tune-and-evolve)",
}


def main(arguments: list[str]) -> int:
    """Write or check every page. Returns the exit code."""
    pages = {FOLDER / f"{name}.md": page(name) for name in COMMANDS} | {FOLDER / "index.md": overview()}
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    stale += sorted(set(FOLDER.glob("*.md")) - set(pages))
    if arguments == ["--check"]:
        for path in stale:
            print(f"stale: {path}; run python docs/generate_commands.py", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.unlink(missing_ok=True)
        if path in pages:
            path.write_text(pages[path], encoding="utf-8", newline="\n")
    return 0


def page(name: str) -> str:
    """The Markdown of a command's page."""
    parser = parser_of(name)
    lines = [
        f"# sp-yolo {name}",
        "",
        _sentence(parser.description or ""),
        *(["", f"More: {SEE[name]}."] if name in SEE else []),
        *(["", "```text", parser.epilog.strip("\n"), "```"] if parser.epilog else []),
    ]
    for group in parser._action_groups:
        actions = [one for one in group._group_actions if _is_shown(one)]
        if actions:
            lines += ["", f"## {_title(group, parser)}", "", "| option | what it does | default |", "|---|---|---|"]
            lines += [_row(one, parser.prog) for one in actions]
    return "\n".join([*lines, "", MADE, ""])


def overview() -> str:
    """The Markdown of the list of commands."""
    rows = [f"| [`sp-yolo {name}`]({name}.md) | {_sentence(words)} |" for name, (_, words) in COMMANDS.items()]
    words = "`sp-yolo COMMAND --help` prints the same. `python -m sp_yolo` is the same program."
    head = ["# Commands", "", words, "", "| command | what it does |", "|---|---|"]
    return "\n".join([*head, *rows, "", MADE, ""])


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:].rstrip('.')}."


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def _title(group: argparse._ArgumentGroup, parser: argparse.ArgumentParser) -> str:
    standard = {parser._optionals: "Options", parser._positionals: "Arguments"}
    return standard.get(group) or (group.title or "Options").capitalize()


def _row(action: argparse.Action, prog: str) -> str:
    flags, value = list(action.option_strings), _value(action)
    if not flags:
        flags = [value or action.dest]
    elif value:
        flags[0] += f" {value}"
    required = "required" if action.required and action.option_strings else _default(action)
    words = _help(action, prog).replace("<", "&lt;").replace("*", "\\*")
    cells = [cell.replace("|", r"\|") for cell in (", ".join(f"`{flag}`" for flag in flags), words, required)]
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def _value(action: argparse.Action) -> str:
    """What follows the flag, as --help shows it: ``N``, ``{a,b}``, ``[PATH]``, ``SIZE [SIZE ...]``."""
    if action.nargs == 0:
        return ""
    name = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    if isinstance(name, tuple):
        return " ".join(name)
    forms = {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]", argparse.REMAINDER: "..."}
    return forms.get(str(action.nargs), name)


def _help(action: argparse.Action, prog: str) -> str:
    text = (action.help or "").removesuffix(" (default: %(default)s)")  # BooleanOptionalAction's, up to Python 3.12
    return " ".join((text % {**vars(action), "prog": prog}).split()).removesuffix(" (required)")  # has its own column


def _default(action: argparse.Action) -> str:
    """The parser's own default; flags without one say in their help what happens."""
    value: Any = action.default
    if value is None or value is argparse.SUPPRESS or value is False or value in ("", [], ()):
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, list | tuple) else value}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
