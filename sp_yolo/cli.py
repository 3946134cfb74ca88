"""`sp-yolo COMMAND`: one parser, one place where errors become one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sp_yolo.errors import SPYoloError

# command -> (module with add_arguments and run, one line of help)
COMMANDS = {
    "train": ("sp_yolo.train", "train a detector (same as train_sp.py)"),
    "yolov7": ("sp_yolo.plugins.yolov7", "run an untouched YOLOv7's train.py with SP as its optimizer"),
    "val": ("sp_yolo.val", "measure weights on a split (the original's test.py)"),
    "predict": ("sp_yolo.predict", "detect on images, folders, videos, webcams (the original's detect.py)"),
    "export": ("sp_yolo.export", "write TorchScript or ONNX, checked against the model"),
    "eval": ("sp_yolo.eval.command", "metrics of a detections file: COCO, VOC07 or VOC12"),
    "classify": ("sp_yolo.classify.command", "train small networks on MNIST, CIFAR-10 or image folders"),
    "compare": ("sp_yolo.compare.command", "compare optimizers over seeds, tuned alike, with confidence intervals"),
    "check": ("sp_yolo.check", "find what would ruin a training run before it starts"),
    "download": ("sp_yolo.download", "fetch VOC, COCO, MNIST or CIFAR-10 from the official hosts"),
}


class _Parser(argparse.ArgumentParser):
    """argparse with one line per mistake and without abbreviations: they break as soon as a longer flag shares them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        unknown = message.split() if message.startswith("unrecognized arguments") else []
        for word in unknown:
            near = difflib.get_close_matches(word, self._option_string_actions, 1) if word.startswith("--") else []
            if near:
                message += f"; did you mean {near[0]}?"
        self.exit(2, f"error: {message} (all flags: {self.prog} --help)\n")


def guarded(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """``run(arguments)`` with every expected error turned into one line on stderr and its exit code."""
    try:
        return run(arguments)
    except SPYoloError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except MemoryError:
        print("error: out of memory; try a smaller --batch-size or --img-size", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


def main_train(argv: Sequence[str] | None = None) -> int:
    """The program train_sp.py."""
    from sp_yolo import train

    parser = _Parser(prog="train_sp.py", description="Train a YOLOv7 detector with the Spectral Proximal optimizer.")
    train.add_arguments(parser)
    return guarded(train.run, parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """The program sp-yolo."""
    parser = _Parser(prog="sp-yolo", description="YOLOv7 detectors with the Spectral Proximal optimizer.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    given = list(sys.argv[1:] if argv is None else argv)
    wanted = given[0] if given else ""
    for name, (module, words) in COMMANDS.items():
        command = commands.add_parser(name, help=words, description=words)
        if name == wanted:  # only the chosen command's module is imported
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args(given)
    return guarded(importlib.import_module(COMMANDS[arguments.command][0]).run, arguments)


if __name__ == "__main__":
    sys.exit(main())
