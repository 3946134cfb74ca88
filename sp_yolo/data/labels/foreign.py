"""Annotation files of other programs that are not read here: recognised, with the way to a format that is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from sp_yolo.data.files import is_system_name

_HEAD = 65536  # bytes at both ends of a file: pictures may be packed into the middle
_FILES, _FOLDERS, _DEPTH = 200, 100, 2  # of a folder, in all, and how far down one is looked for
_TABLE = "a table of boxes: convert it to COCO json or to one YOLO .txt per image"

# What stands in a file (all of it, whatever the case) -> what it is, and what to do.
_MARKS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (".xml", ("<annotations", "<version>1."), "CVAT's XML: export the task again as 'COCO 1.0' or 'YOLO 1.1'"),
    (".xml", ("<dataset", "<box "), "dlib's imglab XML: convert it to Pascal VOC"),
    (".json", ('"shapes"', '"imagepath"'), "labelme's json: convert it with labelme2coco"),
    (".json", ('"from_name"', '"to_name"'), "Label Studio's json: export it as COCO or YOLO"),
    (".json", ('"rectanglelabels"',), "Label Studio's json: export it as COCO or YOLO"),
    (".json", ('"_via_',), "VIA's project: choose Annotation > Export Annotations (COCO format)"),
    (".json", ('"regions"', '"shape_attributes"'), "VIA's json: choose Annotation > Export Annotations (COCO format)"),
    (".json", ('"coordinates"', '"label"', '"image"'), "CreateML's json: convert it to COCO, e.g. with Roboflow"),
    (".json", ('"frames"', '"tags"'), "VoTT's json: export as Pascal VOC"),
    (".json", ('"dm_format_version"',), "Datumaro's json: export it as COCO (datum convert -f coco)"),
    (".json", ('"classtitle"', '"exterior"'), "Supervisely's json: export it as COCO, YOLO or Pascal VOC"),
    (".csv", ("xmin", "ymin"), _TABLE),
    (".csv", ("x_min", "y_min"), _TABLE),
    (".csv", ("region_shape_attributes",), "VIA's table: choose Annotation > Export Annotations (COCO format)"),
    (".csv", ("image_id", "bbox"), _TABLE),
)
_NUMBER = r"-?\d+(?:\.\d+)?"
# What the lines of a file look like, from the first on that says anything.
_LINES: tuple[tuple[str, re.Pattern[str], str], ...] = (
    (".csv", re.compile(rf"[^,]+\.\w{{2,5}}(?:,{_NUMBER}){{4}},[^,]+$"), _TABLE),
    (
        ".txt",
        re.compile(r"\S.*?\.\w{2,5}(?: \d+,\d+,\d+,\d+,\d+)+$"),
        "boxes of all images in one list (Roboflow's 'YOLO v4 PyTorch'): export as YOLOv7",
    ),
    (".txt", re.compile(rf"[A-Za-z_]+(?: {_NUMBER}){{14,15}}$"), "KITTI's labels: convert them to YOLO or COCO"),
    (".txt", re.compile(rf"(?:{_NUMBER} ){{8}}\S+ [012]$"), "DOTA's labels in px: convert them to YOLO or COCO"),
    (".txt", re.compile(r"(?:-?\d+,){7}-?\d+,?$"), "VisDrone's labels in px: convert them to YOLO or COCO"),
)


def foreign_words(path: str | os.PathLike[str]) -> str:
    """What ``path`` is and what to do with it, where it is known not to be readable here; else ''."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".xml", ".json", ".csv", ".txt"):
        return ""
    try:
        with open(path, "rb") as file:
            data = file.read(_HEAD)
            if os.fstat(file.fileno()).st_size > 2 * _HEAD:
                file.seek(-_HEAD, os.SEEK_END)
                data += file.read()
    except OSError:
        return ""
    text = data.decode("utf-8-sig", "replace")
    lowered = text.lower()
    for kind, marks, words in _MARKS:
        if kind == suffix and all(mark in lowered for mark in marks):
            return words
    lines = [line.strip() for line in text[:_HEAD].splitlines()[:5]]  # DOTA's begin with two lines about the picture
    return next((words for kind, form, words in _LINES if kind == suffix and any(map(form.match, lines))), "")


def find_foreign(folders: Iterable[Path]) -> str:
    """``file: words`` of the first file of another program in one of ``folders`` or not far below; '' for none."""
    waiting = [(folder, 0) for folder in folders]
    seen: set[Path] = set()
    while waiting and len(seen) < _FOLDERS:
        folder, depth = waiting.pop(0)
        if folder in seen:
            continue
        seen.add(folder)
        try:
            names = sorted(name for name in os.listdir(folder) if not is_system_name(name))
        except OSError:
            continue
        for name in names[:_FILES]:
            if words := foreign_words(folder / name):
                return f"{folder / name}: {words}"
            if depth < _DEPTH and os.path.isdir(folder / name):
                waiting.append((folder / name, depth + 1))
    return ""
