"""`sp-yolo COMMAND`: one parser, one place where errors become one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sp_yolo.commands.relatives import RELATIVES
from sp_yolo.config import add_options, entries, from_arguments
from sp_yolo.errors import EnvironmentFault, SPYoloError
from sp_yolo.runtime.words import shown

# command -> (module with OPTIONS, EXAMPLES and run, one line of help)
COMMANDS = {
    "train": ("sp_yolo.commands.train", "train a detector (same as train_sp.py)"),
    "yolov7": ("sp_yolo.commands.yolov7", "run an untouched YOLOv7's train.py with SP as its optimizer"),
    "val": ("sp_yolo.commands.val", "measure weights on a split (the original's test.py)"),
    "predict": ("sp_yolo.commands.predict", "detect on images, folders, videos, webcams (the original's detect.py)"),
    "export": ("sp_yolo.commands.export", "write TorchScript or ONNX, checked against the model"),
    "saliency": ("sp_yolo.commands.saliency", "show which channels matter, and what each layer could lose"),
    "eval": ("sp_yolo.commands.eval", "metrics of a detections file: COCO, VOC07 or VOC12"),
    "classify": ("sp_yolo.commands.classify", "train small networks on MNIST, CIFAR-10 or image folders"),
    "compare": ("sp_yolo.commands.compare", "compare optimizers over seeds, tuned alike, with confidence intervals"),
    "tune": ("sp_yolo.commands.tune", "search hyperparameters with optuna, in one or many processes"),
    "check": ("sp_yolo.commands.check", "find what would ruin a training run before it starts"),
    "download": ("sp_yolo.commands.download", "fetch VOC, COCO, MNIST or CIFAR-10 from the official hosts"),
}

# The original's scripts, by what they are called here.
FORMER = {"test": "val", "detect": "predict"}


class _Version(argparse.Action):
    """--version: what a report of a fault has to name. torch is imported only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import torch

        from sp_yolo import __version__
        from sp_yolo.runtime.device import select_compute

        words = select_compute("", "auto").words
        python = sys.version.split()[0]
        print(f"sp-yolo {__version__}, torch {torch.__version__}, Python {python}, device {words}")
        parser.exit(0)


class _Parser(argparse.ArgumentParser):
    """argparse with one line per mistake and without abbreviations: they break as soon as a longer flag shares them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            flags = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            hints = [hint for hint in (self._counterpart(flag) for flag in flags) if hint]
            message = "; ".join([message, *hints])
        if any(action.dest == "arguments" for action in self._actions):
            message += "; the host's own arguments come after --"
        self.exit(2, f"error: {message} (all flags: {self.prog} --help)\n")

    def _counterpart(self, flag: str) -> str:
        """What to give instead of the unknown ``flag``; '' where nothing is near."""
        known = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        for spelling in (flag.replace("_", "-"), flag.replace("-", "_").replace("__", "--", 1)):
            if spelling in known:
                return f"did you mean {spelling}?"
        if words := RELATIVES.get(flag.replace("_", "-")):
            # A counterpart of another command is none.
            return next((words for given, words in words if given in known or not given), "")
        near = difflib.get_close_matches(flag, known, 1)
        return f"did you mean {near[0]}?" if near else ""


def _add_version(parser: argparse.ArgumentParser) -> None:
    words = "versions and device, for reports of faults"
    parser.add_argument("--version", nargs=0, action=_Version, default=argparse.SUPPRESS, help=words)


def guarded(command: str, argv: Sequence[str], prog: str = "") -> int:
    """:func:`run_command` with every expected error turned into one line on stderr and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows console or LANG=C cannot show every letter
            stream.reconfigure(errors="replace")
    try:
        with shown():
            return run_command(command, argv, prog)
    except SPYoloError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        from sp_yolo.runtime.faults import is_out_of_memory, out_of_memory_words  # it loads torch

        if not is_out_of_memory(error):
            raise
        print(f"error: {out_of_memory_words(error, _memory_flags(command))}", file=sys.stderr)
        return EnvironmentFault.exit_code
    except KeyboardInterrupt:
        print("interrupted (Ctrl-C)", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


def _memory_flags(command: str) -> list[str]:
    """The flags of a command that decide how much memory it takes."""
    known = {
        name: entry
        for options in importlib.import_module(COMMANDS[command][0]).OPTIONS
        for name, entry in entries(options).items()
    }
    return [known[name].flags[0] for name in ("batch_size", "img_size", "image_size") if name in known]


def parser_of(command: str, prog: str = "") -> argparse.ArgumentParser:
    """The parser of a command, from its options; its help closes with examples."""
    module, words = COMMANDS[command]
    commands = importlib.import_module(module)  # only the chosen one
    prog = prog or f"sp-yolo {command}"
    parser = _Parser(
        prog=prog,
        description=f"{words[0].upper()}{words[1:]}.",
        usage=f"{prog} [options]{_positionals(commands.OPTIONS)}",
        epilog=f"examples:\n{commands.EXAMPLES.format(prog=prog).strip(chr(10))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_version(parser)
    for options in commands.OPTIONS:
        add_options(parser, options)
    return parser


def _positionals(classes: Sequence[type]) -> str:
    own = [entry for options in classes for entry in entries(options).values() if entry.positional]
    words = [f"{entry.option.metavar or entry.name}{' ...' if entry.many else ''}" for entry in own]
    return "".join(f" {word}" if entry.required else f" [{word}]" for entry, word in zip(own, words, strict=True))


def options_of(command: str, argv: Sequence[str], prog: str = "") -> list[Any]:
    """The options of a command from its arguments, one object for each of its option classes.

    Raises:
        SystemExit: 2 for flags that do not exist, 0 after --help. UserError: a value outside its rule.
    """
    arguments = parser_of(command, prog).parse_args(argv)
    return [from_arguments(options, arguments) for options in importlib.import_module(COMMANDS[command][0]).OPTIONS]


def run_command(command: str, argv: Sequence[str], prog: str = "") -> int:
    """Run a command with its arguments; returns the exit code.

    Raises: as :func:`options_of`; SPYoloError: see ``errors``.
    """
    exit_code: int = importlib.import_module(COMMANDS[command][0]).run(*options_of(command, argv, prog))
    return exit_code


def main_train(argv: Sequence[str] | None = None) -> int:
    """The program train_sp.py."""
    return guarded("train", sys.argv[1:] if argv is None else argv, "train_sp.py")


def main(argv: Sequence[str] | None = None) -> int:
    """The program sp-yolo."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in COMMANDS:
        return guarded(given[0], given[1:])
    parser = _Parser(prog="sp-yolo", description="YOLOv7 detectors with the Spectral Proximal optimizer.")
    _add_version(parser)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, (_, words) in COMMANDS.items():
        commands.add_parser(name, help=words)
    if given and not given[0].startswith("-"):
        near = [FORMER[given[0]]] if given[0] in FORMER else difflib.get_close_matches(given[0], COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"{given[0]} is no command: {', '.join(COMMANDS)}{hint}")
    parser.parse_args(given[:1])  # --help, --version, or a flag where the command has to stand
    return 2


if __name__ == "__main__":
    sys.exit(main())
