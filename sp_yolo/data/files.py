"""The one place that lists the files of a folder: what people mean by "the pictures in there"."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from sp_yolo.data.images import is_image_name

# Copies and leftovers of file managers, notebooks, archives and network drives; all else of the kind begins with a dot.
_SYSTEM = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"})


@dataclass
class Listing:
    """``images``, and ``others``, which are no pictures: sorted paths. Left out: ``hidden`` pictures, in hidden or
    system places or so named; ``seen``, links to folders that were listed already."""

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """A line for each kind of thing that was left out."""
        lines = []
        if self.hidden:
            lines.append(f"{len(self.hidden)} pictures in hidden or system folders left out, e.g. {self.hidden[0]}")
        if self.seen:
            lines.append(f"{len(self.seen)} links to folders that are listed already left out, e.g. {self.seen[0]}")
        return lines


def is_system_name(name: str) -> bool:
    """Hidden (``.ipynb_checkpoints``, ``.Trash-1000``, ``._x.jpg``), or a folder that systems make."""
    return name.startswith(".") or name.lower() in _SYSTEM


def list_images(folder: str | os.PathLike[str]) -> Listing:
    """The pictures below ``folder`` to any depth, sorted as strings. Links are followed, each folder once: real ones
    come before links to them, and a link back into itself ends."""
    found = Listing()
    visited: set[str] = set()
    waiting, links = [os.fspath(folder)], list[str]()
    while waiting or links:
        linked = not waiting
        current = waiting.pop() if waiting else links.pop(0)
        real = os.path.realpath(current)
        if real in visited:
            found.seen.append(current)
            continue
        visited.add(real)
        for entry in sorted(_entries(current), key=lambda entry: entry.name):
            if entry.is_dir():
                if is_system_name(entry.name):
                    found.hidden += _pictures_below(entry.path)
                else:
                    (links if linked or entry.is_symlink() else waiting).append(entry.path)
            elif is_image_name(entry.path):
                (found.hidden if is_system_name(entry.name) else found.images).append(entry.path)
            else:
                found.others.append(entry.path)
    found.images.sort()
    found.others.sort()
    return found


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # may not be looked at; the pictures that are missed show in the count
        return []


def _pictures_below(folder: str) -> list[str]:
    """The pictures in a hidden folder, only to be counted: links are not followed."""
    names = (os.path.join(where, name) for where, _, files in os.walk(folder) for name in sorted(files))
    return [name for name in names if is_image_name(name)]


def image_by_stem(folder: Path) -> dict[str, str]:
    """Name without extension -> name, of the pictures right in ``folder``; empty where there is no such folder."""
    names = sorted(entry.name for entry in _entries(str(folder)) if not is_system_name(entry.name))
    return {os.path.splitext(name)[0]: name for name in names if is_image_name(folder / name)}
