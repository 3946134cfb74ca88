"""Annotation files of other programs that are not read here: recognised, with the way to a format that is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_HEAD, LOOKED_AT = 65536, 500  # bytes of a file, files of a folder

# What stands in the head of a file (all of it) -> what it is, and what to do.
_MARKS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (".xml", ("<annotations", "<version>1."), "CVAT's XML: export the task again as 'COCO 1.0' or 'YOLO 1.1'"),
    (".xml", ("<dataset", "<box "), "dlib's imglab XML: convert it to Pascal VOC"),
    (".json", ('"shapes"', '"imagePath"'), "labelme's json: convert it with labelme2coco"),
    (".json", ('"from_name"', '"to_name"'), "Label Studio's json: export it as COCO or YOLO"),
    (".json", ('"_via_',), "VIA's project: choose Annotation > Export Annotations (COCO format)"),
    (".json", ('"regions"', '"shape_attributes"'), "VIA's json: choose Annotation > Export Annotations (COCO format)"),
    (".json", ('"coordinates"', '"label"', '"image"'), "CreateML's json: convert it to COCO, e.g. with Roboflow"),
    (".json", ('"frames"', '"tags"'), "VoTT's json: export as Pascal VOC"),
    (".csv", ("xmin", "ymin"), "a table of boxes: convert it to COCO json or to one YOLO .txt per image"),
    (".csv", ("x_min", "y_min"), "a table of boxes: convert it to COCO json or to one YOLO .txt per image"),
    (".csv", ("region_shape_attributes",), "VIA's table: choose Annotation > Export Annotations (COCO format)"),
    (".csv", ("image_id", "bbox"), "a table of boxes: convert it to COCO json or to one YOLO .txt per image"),
)


def foreign_words(path: str | os.PathLike[str]) -> str:
    """What ``path`` is and what to do with it, where it is known not to be readable here; else ''."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".xml", ".json", ".csv"):
        return ""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD).decode("utf-8", "replace")
    except OSError:
        return ""
    return next((words for kind, marks, words in _MARKS if kind == suffix and all(mark in head for mark in marks)), "")


def find_foreign(folders: Iterable[Path]) -> str:
    """``file: words`` of the first file of another program in one of ``folders``; '' where there is none."""
    for folder in folders:
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names[:LOOKED_AT]:
            if words := foreign_words(folder / name):
                return f"{folder / name}: {words}"
    return ""
