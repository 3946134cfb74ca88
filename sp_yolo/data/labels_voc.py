"""Pascal VOC: ImageSets/Main splits and one XML file per image, read without ever expanding an entity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np

from sp_yolo.data.labels import DIFFICULT, BadRow, LabelFile, clip_box, empty_labels, shorten
from sp_yolo.errors import UserError


@dataclass
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
        lines = listed.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{listed}: cannot be read as text: {error}") from None
    names = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = line.split()[0]
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
        tree = _parse_xml(Path(path).read_bytes())
    except FileNotFoundError:
        return result
    except OSError as error:
        result.problems.add(str(path), "unreadable label file", str(error.strerror))
        return result
    except _XmlRefused as refused:
        result.problems.add(f"{path}:{refused.line}", "malformed XML", refused.detail)
        return result
    truth: list[tuple[float, ...]] = []
    for element in tree.children:
        if element.tag != "object":
            continue
        try:
            row = _object_row(element, class_index, width, height)
            if row in truth:
                raise BadRow("duplicate", "the same object stands above")
            truth.append(row)
        except BadRow as bad:
            result.problems.add(f"{path}:{element.line}", bad.reason, bad.detail)
    declared = tree.child("size")
    if declared and declared.value("width") not in ("", "0", str(width)):
        detail = f"{shorten(declared.value('width'))} wide, the image is {width} px; boxes kept"
        result.problems.add(f"{path}:{declared.line}", "declared size differs", detail)
    if truth:
        result.truth = np.array(truth, np.float64)
        kept = result.truth[result.truth[:, 6] == 0]
        centre_wh = np.concatenate((kept[:, 1:3] + kept[:, 3:5] / 2, kept[:, 3:5]), 1) / [width, height, width, height]
        result.labels = np.concatenate((kept[:, :1], centre_wh), 1).astype(np.float32)
    return result


def _object_row(element: _Element, class_index: Mapping[str, int], width: int, height: int) -> tuple[float, ...]:
    """(class, x, y, w, h, area, ignore) of an <object>."""
    name = element.value("name")
    if not name:
        raise BadRow("missing field", "an object without <name>")
    if name not in class_index:
        raise BadRow("unknown class", f"{shorten(name)} is not among the names")
    bounds = element.child("bndbox")
    if bounds is None:
        raise BadRow("missing field", f"{shorten(name)} without <bndbox>")
    box = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = bounds.value(tag)
        if not text:
            raise BadRow("missing field", f"{shorten(name)} without <{tag}>")
        try:
            box.append(float(text))
        except ValueError:
            raise BadRow("not a number", f"<{tag}> {shorten(text)}") from None
    x1, y1, x2, y2 = clip_box(box, width, height)
    area = (x2 - x1) * (y2 - y1)
    ignored = DIFFICULT if element.value("difficult") == "1" else 0.0
    return (class_index[name], x1, y1, x2 - x1, y2 - y1, area, ignored)


class _XmlRefused(ValueError):
    def __init__(self, line: int, detail: str) -> None:
        super().__init__(line, detail)
        self.line, self.detail = line, detail


def _parse_xml(data: bytes) -> _Element:
    """The tree below the root element with line numbers. A document type (the home of entities) is refused."""
    parser = expat.ParserCreate()
    root = _Element("", 0)
    stack = [root]

    def start(tag: str, attributes: dict[str, str]) -> None:
        element = _Element(tag, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def end(tag: str) -> None:
        stack.pop()

    def text(characters: str) -> None:
        stack[-1].text += characters

    def refuse(*declaration: object) -> None:
        raise _XmlRefused(parser.CurrentLineNumber, "a document type or entity is not allowed")

    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise _XmlRefused(error.lineno, expat.errors.messages[error.code]) from None
    except _XmlRefused:
        raise
    except (ValueError, LookupError) as error:  # an encoding that Python does not have, or not as a one-byte table
        raise _XmlRefused(1, str(error)) from None
    return root.children[0]
