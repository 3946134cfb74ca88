"""Pascal VOC: ImageSets/Main splits and one XML file per image, read without ever expanding an entity."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np

from sp_yolo.config.text import LABEL_BYTES, NotText, decode, read_text
from sp_yolo.data.labels.annotation import (
    DIFFICULT,
    FAR_OUTSIDE,
    MOST_OBJECTS,
    BadRow,
    LabelFile,
    clip_box,
    empty_labels,
    far_outside,
    fault_words,
    shorten,
    too_many,
)
from sp_yolo.errors import UserError

_SECOND_COLUMN = re.compile(r"\s+-?[01]$")
_DECLARED = re.compile(rb"\s*<\?xml[^>]{0,100}?encoding\s*=\s*[\"']([A-Za-z0-9._-]{1,40})[\"']")
_BARE_AMPERSAND = re.compile(r"&(?!(?:[A-Za-z]+|#[0-9]+|#x[0-9A-Fa-f]+);)")


MOST_ELEMENTS = 1_000_000  # of one file; an object has some ten
_MOST_TEXT = 4096  # characters of an element that are kept: names and numbers are shorter


@dataclass(slots=True)
class _Element:
    tag: str
    line: int
    text: str = ""
    children: list[_Element] = field(default_factory=list)

    def child(self, tag: str) -> _Element | None:
        return next((element for element in self.children if element.tag == tag), None)

    def value(self, tag: str) -> str:
        """The text of a direct child, '' where it is absent."""
        element = self.child(tag)
        return element.text.strip() if element else ""

    def objects(self) -> Iterator[_Element]:
        """The outermost <object> elements, at whatever depth, in order: parts of an object are none."""
        waiting = [self]
        while waiting:
            element = waiting.pop()
            if element.tag == "object":
                yield element
            else:
                waiting += reversed(element.children)


def voc_split(entry: str, root: Path) -> tuple[Path, str, Path]:
    """(VOC folder, split name, list file) of ``train``, ``VOC2007/trainval`` or the path of a list in ImageSets/Main.

    Raises:
        UserError: there is no such list file.
    """
    path = Path(entry)
    listed = path if path.is_absolute() else root / path
    if listed.suffix == ".txt" and listed.parent.parent.name == "ImageSets":
        folder = listed.parent.parent.parent
    else:
        folder = listed.parent
        listed = folder / "ImageSets" / "Main" / f"{listed.name}.txt"
    if not listed.is_file():
        raise UserError(f"{listed}: no such file (the VOC split {listed.stem!r})")
    return folder, listed.stem, listed


def read_voc_list(listed: Path) -> list[tuple[int, str]]:
    """(line, image name without extension) per image of a split's list; a second column of 1/-1 is allowed.

    Raises:
        UserError: unreadable, or a name that leads out of the dataset.
    """
    try:
        lines = read_text(listed).split("\n")
    except (OSError, NotText) as error:
        raise UserError(f"{listed}: cannot be read as text: {fault_words(error)}") from None
    names = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # a name may hold blanks; what stands behind them is the kit's second column only where it looks like one
        name = _SECOND_COLUMN.sub("", line.strip()).strip("\"'")
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{listed}:{number}: {shorten(name)} leads out of the dataset folder")
        names.append((number, name))
    return names


def read_voc(path: str | Path, class_index: Mapping[str, int], size_wh: tuple[int, int]) -> LabelFile:
    """Read one annotation file; boxes are (xmin, ymin, xmax, ymax) px without the 1-pixel shift of the VOC kit.

    ``difficult`` objects are left out of ``labels`` and kept in ``truth``. An object with a missing
    field, an unknown name or a box of no area is dropped and reported; a file that is no XML is reported as a whole.
    """
    width, height = size_wh
    result = LabelFile(empty_labels(), truth=np.zeros((0, 7)))
    try:
        data = _whole_file(path)
        tree = _parse_xml(data)
    except FileNotFoundError:
        return result
    except OSError as error:
        result.give_up(str(path), "unreadable label file", fault_words(error), 0)
        return result
    except _XmlRefused as refused:
        result.give_up(f"{path}:{refused.line}", "malformed XML", refused.detail, data.count(b"<object>"))
        return result
    objects = list(tree.objects())
    if len(objects) > MOST_OBJECTS:
        result.give_up(f"{path}:{objects[MOST_OBJECTS].line}", *too_many(len(objects)), len(objects))
        return result
    truth: dict[tuple[float, ...], None] = {}
    for element in objects:
        where = f"{path}:{element.line}"
        try:
            row = _object_row(element, class_index, width, height)
            if row in truth:
                raise BadRow("duplicate", "the same object stands above")
            truth[row] = None
            if words := far_outside(_corners(element, ""), width, height):
                result.problems.note(where, FAR_OUTSIDE, words)
        except BadRow as bad:
            result.problems.add(where, bad.reason, bad.detail)
    declared = tree.child("size")
    if declared and declared.value("width") not in ("", "0", str(width)):
        detail = f"{shorten(declared.value('width'))} wide, the image is {width} px; boxes kept"
        result.problems.note(f"{path}:{declared.line}", "declared size differs", detail)
    if truth:
        result.truth = np.array(list(truth), np.float64)
        kept = result.truth[result.truth[:, 6] == 0]
        centre_wh = np.concatenate((kept[:, 1:3] + kept[:, 3:5] / 2, kept[:, 3:5]), 1) / [width, height, width, height]
        result.labels = np.concatenate((kept[:, :1], centre_wh), 1).astype(np.float32)
    return result


def names_in(paths: Sequence[str | Path]) -> list[str]:
    """The class names of annotation files, sorted; files that cannot be read have none."""
    names: set[str] = set()
    for path in paths:
        try:
            names |= {element.value("name") for element in _parse_xml(_whole_file(path)).objects()}
        except (OSError, _XmlRefused):
            continue
    return sorted(names - {""})


def _object_row(element: _Element, class_index: Mapping[str, int], width: int, height: int) -> tuple[float, ...]:
    """(class, x, y, w, h, area, ignore) of an <object>."""
    name = element.value("name")
    if not name:
        raise BadRow("missing field", "an object without <name>")
    if name not in class_index:
        raise BadRow("unknown class", f"{shorten(name)} is not among the names{_case_hint(name, class_index)}")
    x1, y1, x2, y2 = clip_box(_corners(element, shorten(name)), width, height)
    area = (x2 - x1) * (y2 - y1)
    ignored = DIFFICULT if element.value("difficult").lower() in ("1", "true") else 0.0
    return (class_index[name], x1, y1, x2 - x1, y2 - y1, area, ignored)


def _case_hint(name: str, class_index: Mapping[str, int]) -> str:
    near = next((known for known in class_index if known.strip().lower() == name.lower()), None)
    return f" ({shorten(near)} is: same letters, other case)" if near else ""


def _corners(element: _Element, shown: str) -> tuple[float, float, float, float]:
    """xmin, ymin, xmax, ymax of an <object>: of its <bndbox>, swapped corners put right, else the extent of its
    <polygon> or of its <robndbox> (roLabelImg: centre, size, angle in radians)."""
    bounds = element.child("bndbox")
    if bounds is not None:
        x1, y1, x2, y2 = (_number(bounds, tag, shown) for tag in ("xmin", "ymin", "xmax", "ymax"))
        return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
    if (turned := element.child("robndbox")) is not None:
        cx, cy, w, h, angle = (_number(turned, tag, shown) for tag in ("cx", "cy", "w", "h", "angle"))
        if math.isfinite(angle):
            cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
            half_w, half_h = (w * cosine + h * sine) / 2, (w * sine + h * cosine) / 2
            return cx - half_w, cy - half_h, cx + half_w, cy + half_h
    if (polygon := element.child("polygon")) is not None:
        holders = [polygon, *polygon.children]  # x1, y1, x2, ... or <pt><x>, <y>
        xs, ys = (
            [_number(holder, leaf.tag, shown) for holder in holders for leaf in holder.children if leaf.tag[:1] == axis]
            for axis in "xy"
        )
        if xs and ys:
            return min(xs), min(ys), max(xs), max(ys)
    raise BadRow("missing field", f"{shown} without <bndbox>")


def _number(holder: _Element, tag: str, shown: str) -> float:
    text = holder.value(tag)
    if not text:
        raise BadRow("missing field", f"{shown} without <{tag}>")
    try:
        return float(text)
    except ValueError:
        raise BadRow("not a number", f"<{tag}> {shorten(text)}") from None


def _whole_file(path: str | Path) -> bytes:
    """Raises OSError: it cannot be read, or is larger than any annotation of one image."""
    if (size := os.stat(path).st_size) > LABEL_BYTES:
        raise OSError(f"{size} bytes, at most {LABEL_BYTES} are read")
    return Path(path).read_bytes()


class _XmlRefused(ValueError):
    def __init__(self, line: int, detail: str) -> None:
        super().__init__(line, detail)
        self.line, self.detail = line, detail


def _parse_xml(data: bytes) -> _Element:
    """The tree below the root element with line numbers. A document type with declarations of its own (the home of
    entities) is refused; one that is only named is not fetched."""
    before, text = _xml_text(data)
    parser = expat.ParserCreate("utf-8")
    root = _Element("", 0)
    stack, count = [root], 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if count > MOST_ELEMENTS:
            raise _XmlRefused(before + parser.CurrentLineNumber, f"more than {MOST_ELEMENTS} elements")
        element = _Element(tag, before + parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def end(tag: str) -> None:
        stack.pop()

    def characters(words: str) -> None:
        if (room := _MOST_TEXT - len(stack[-1].text)) > 0:
            stack[-1].text += words[:room]

    def doctype(name: str, system: str | None, public: str | None, has_declarations: int) -> None:
        if has_declarations:
            refuse()

    def refuse(*declaration: object) -> None:
        raise _XmlRefused(before + parser.CurrentLineNumber, "a document type or entity is not allowed")

    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, characters
    parser.StartDoctypeDeclHandler, parser.EntityDeclHandler = doctype, refuse
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as error:
        raise _XmlRefused(before + error.lineno, expat.errors.messages[error.code]) from None
    except ValueError as error:
        raise error if isinstance(error, _XmlRefused) else _XmlRefused(1, str(error)) from None
    return root.children[0]


def _xml_text(data: bytes) -> tuple[int, str]:
    """(lines before the first element, the text from there on): what people's tools write, though XML forbids it.

    The declared encoding is Python's to decode (expat knows four); text without one that is no UTF-8 is taken byte by
    byte: only paths and class names can suffer, and an unknown name is reported. A bare & is meant as it stands.
    """
    declared = _DECLARED.match(data)
    try:
        text = data.decode(declared[1].decode()) if declared else decode(data)
    except NotText:
        text = data.decode("latin-1")
    except (UnicodeDecodeError, LookupError) as error:
        raise _XmlRefused(1, f"encoding {declared[1].decode() if declared else ''}: {error}") from None
    body = text.lstrip("\ufeff \t\r\n")
    lines_before = text[: len(text) - len(body)].count("\n")
    return lines_before, _BARE_AMPERSAND.sub("&amp;", body)
