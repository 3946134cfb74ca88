"""List files: one image path per line, as editors, exporters and other machines leave them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from sp_yolo.config.text import NotText, read_text
from sp_yolo.data.files import image_by_stem
from sp_yolo.data.images import is_image_name
from sp_yolo.data.labels.annotation import fault_words, shorten
from sp_yolo.errors import UserError

Stems = Callable[[Path], dict[str, str]]
LIST_BYTES = 512 * 2**20  # some five million paths
_COLUMNS_BEHIND = re.compile(r"(.+?\.\w{2,5})[\"']?[\s,;]")


def read_list(path: Path, root: Path, notes: list[str]) -> tuple[list[str], str]:
    """(images of a list file sorted, in words what stands in it); what was odd is added to ``notes``.

    Raises:
        UserError: it cannot be read as text, or a path leads out of the dataset.
    """
    try:
        lines = read_text(path, LIST_BYTES).split("\n")
    except (OSError, NotText) as error:
        raise UserError(f"{path}: expected one image path per line: {fault_words(error)}") from None
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    images, others, moved = list[str](), list[str](), list[tuple[str, str]]()
    stems = cache(image_by_stem)  # of a folder, which is listed once
    for number, line in rows:
        name, is_moved = _listed_path(line, f"{path}:{number}", path.parent, root, stems)
        if is_moved:
            moved.append((line, name))
        (images if is_image_name(name) else others).append(name if is_image_name(name) else line)
    if moved:
        example = f"{shorten(moved[0][0], 80)} taken as {moved[0][1]}"
        notes.append(f"{path}: {len(moved)} paths lead nowhere as they stand, e.g. {example}")
    if others and images:
        notes.append(f"{path}: {len(others)} lines name no image, e.g. {shorten(others[0])}")
    if len(set(images)) < len(images):
        notes.append(f"{path}: {len(images) - len(set(images))} images stand there more than once")
    return sorted(images), "the list is empty" if not rows else f"{len(rows)} lines, e.g. {shorten(rows[0][1])}"


def _listed_path(line: str, where: str, folder: Path, root: Path, stems: Stems) -> tuple[str, bool]:
    """(the image that a line names, whether it lies elsewhere than the line says).

    A line may be quoted, have backslashes or columns behind the path, or lack the extension. The first reading that
    exists is taken, else the line as it stands.
    """
    bare = line.strip("\"'")
    readings = [line, bare, bare.replace("\\", "/")]
    readings += [match[1].rstrip("\"'") for reading in readings if (match := _COLUMNS_BEHIND.match(reading))]
    paths = [_from(reading, where, folder, root) for reading in dict.fromkeys(readings) if reading]
    for path in paths:
        if os.path.isfile(path):
            return path, False
    for path in paths:
        name = stems(Path(path).parent).get(os.path.basename(path)) if not is_image_name(path) else None
        if name:
            return os.path.join(os.path.dirname(path), name), False
    moved = _moved(readings[-1].replace("\\", "/"), (folder, root))
    return (moved, True) if moved else (paths[0], False)


def _moved(line: str, homes: Sequence[Path]) -> str:
    """The image of a path of another machine, or of another folder (CVAT's ``data/obj_train_data/x.jpg``): as much of
    its end as leads to a file below one of ``homes``; '' where nothing does."""
    parts = [part for part in line.split("/") if part not in ("", ".")]
    for start in range(1, len(parts)):
        for home in homes:
            path = home.joinpath(*parts[start:])
            if ".." not in parts[start:] and os.path.isfile(path):  # Path's raises at a name too long
                return os.path.abspath(path)
    return ""


def _from(line: str, where: str, folder: Path, root: Path) -> str:
    """``./x`` is relative to the list file's folder; other relative paths start at the working directory, the root or
    the list's folder. An absolute path is followed; a relative one with ``..`` must end below the root or the list's
    folder.

    Raises:
        UserError: it leads out of both.
    """
    bases: list[str | Path] = [folder] if line.startswith("./") else ["", root, folder]
    fallback = folder if line.startswith("./") else root
    base = next((base for base in bases if os.path.exists(os.path.join(base, line))), fallback)
    path = os.path.abspath(os.path.join(base, line))  # whole, so that its label is found beside ``images``
    if ".." in Path(line).parts and not os.path.isabs(line):
        homes = (os.path.abspath(root), os.path.abspath(folder))
        if not any(Path(path).is_relative_to(home) for home in homes):
            raise UserError(
                f"{where}: {shorten(line)} leads out of the dataset root {root} and of the list's folder: "
                "write an absolute path, or set root:"
            )
    return path
