"""What a file is that holds no YOLOv7 model, in words: people save web pages and other networks as best.pt."""

from __future__ import annotations

import pickletools
from collections.abc import Iterable
from pathlib import Path

_OWN_FORM = "a zip file as torch.save has written since version 1.6"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the file it stands for: fetch that with `git lfs pull`"),
    (_LEGACY, "written by torch.save before version 1.6: load it in torch where you trust it, and save it again"),
    (b"PK\x03\x04", "it begins like one and breaks off: the download or copy was cut short"),
    (b"\x80", "a bare pickle, which only running it could read: save the state_dict with torch.save"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"\x89HDF", "a Keras (HDF5) file, of another framework"),
)
_SUFFIXES = {
    ".weights": "darknet weights: a file of the original's .pt releases is needed",
    ".onnx": "an exported ONNX program, which cannot be trained: give the checkpoint it was made from",
    ".engine": "a TensorRT engine, which cannot be trained: give the checkpoint it was made from",
    ".tflite": "a TensorFlow Lite program: give the checkpoint it was made from",
}
# Names of the classes that a pickle asks for -> whose checkpoint it is.
_ULTRALYTICS = "an ultralytics checkpoint (YOLOv8 or later)"
_YOLOV5 = "a YOLOv5 checkpoint"
_PROGRAMS = {
    "ultralytics.": _ULTRALYTICS,
    "models.yolo.DetectionModel": _YOLOV5,
    "models.yolo.SegmentationModel": _YOLOV5,
    "models.yolo.ClassificationModel": _YOLOV5,
    "models.common.C3": _YOLOV5,
    "models.common.Focus": _YOLOV5,
    "mmengine.": "an OpenMMLab checkpoint",
    "detectron2.": "a detectron2 checkpoint",
    "pytorch_lightning.": "a Lightning checkpoint (save its state_dict alone)",
    "lightning.": "a Lightning checkpoint (save its state_dict alone)",
}


def describe_file(path: Path) -> str:
    """What ``path``, no zip archive, is instead of a checkpoint.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "the file is empty: a download or a save that did not end"
    if path.suffix.lower() in _SUFFIXES:
        return _SUFFIXES[path.suffix.lower()]
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, such as an error or login page saved under this name: download the file itself"
    return next((words for start, words in _BEGINNINGS if head.startswith(start)), f"it is not {_OWN_FORM}")


def missing_words(path: Path) -> str:
    """What is wrong with a ``path`` that is no file; of a run's folder, which of its files is meant."""
    if not path.is_dir():
        return "no such file"
    best = next((file for file in (path / "weights" / "best.pt", path / "best.pt") if file.is_file()), None)
    return f"a folder; did you mean {best}?" if best else "a folder, not a file of weights"


def describe_program(kinds: Iterable[str]) -> str:
    """Whose checkpoint asks for classes of these dotted names, and that it cannot be used; '' for nobody's known."""
    for kind in kinds:
        for start, program in _PROGRAMS.items():
            if kind.startswith(start):
                return f"{program}: another network, none of whose weights fit a YOLOv7 model"
    return ""


def asked_classes(data: bytes) -> list[str]:
    """Dotted names of what a pickle asks for, as far as it can be read. Nothing is imported or run."""
    names: list[str] = []
    words: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(words[-2:]))
            elif isinstance(argument, str):
                words.append(argument)
    except (ValueError, LookupError, OverflowError, MemoryError):  # damaged from here on
        pass
    return names
