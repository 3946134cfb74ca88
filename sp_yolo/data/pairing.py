"""Which label file belongs to an image: where the original looks, and where people's tools put them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

_PICTURE_WORDS = frozenset({"images", "image", "imgs", "img", "jpegimages", "pictures", "photos"})
# In the order in which they are looked at.
_LABEL_WORDS = ("labels", "label", "annotations", "annotation", "xml", "xmls", "txt", "lbl", "lbls", "labeltxt")
_PICTURE_WORD = re.compile("images?|imgs?|pictures|photos", re.IGNORECASE)  # in a name: images_train, train-images
_PREFIX = re.compile(r"[0-9a-f]{8}-")  # Label Studio's, before the names of files that were uploaded
_HEAD = 4096  # bytes of a file that tell whether it is a label file


class LabelFinder:
    """Finds the label files of images; each folder is listed once.

    ``suffixes``: kinds of label files in order of preference (".txt", ".xml").
    """

    def __init__(self, suffixes: Sequence[str]) -> None:
        self._suffixes = suffixes
        self._listed: dict[str, dict[str, str]] = {}
        self._prefixed: dict[str, dict[str, list[str]]] = {}
        self._stems: dict[str, set[str]] = {}
        self._places: dict[str, list[str]] = {}
        self._inner: dict[Path, list[Path]] = {}
        self._taken: dict[str, dict[str, str]] = defaultdict(dict)  # folder -> label file -> the first image it is of
        self._shared: list[tuple[str, str, str]] = []
        self._renamed: list[tuple[str, str]] = []

    def find(self, image: str) -> str:
        """The label file of ``image``, or the path where the original would look for it if there is none."""
        folder, name = os.path.split(image)
        stem = os.path.splitext(name)[0]
        if folder not in self._places:
            self._places[folder] = [place for place in dict.fromkeys(self._candidates(folder)) if self._names(place)]
        for lookup in (self.in_folder, self._with_prefix):
            for suffix in self._suffixes:
                for place in self._places[folder]:
                    found = lookup(place, stem, suffix)
                    if not found or (lookup != self.in_folder and self._is_of_another(found, folder)):
                        continue
                    self._take(place, found, image)
                    if lookup != self.in_folder:
                        self._renamed.append((image, os.path.join(place, found)))
                    return os.path.join(place, found)
        return os.path.join(usual_folder(folder), stem + self._suffixes[0])

    def in_folder(self, folder: str, stem: str, suffix: str) -> str:
        """The file ``stem`` + ``suffix`` in ``folder``, as it is written there (``x.TXT``); '' where there is none."""
        return self._names(folder).get(os.path.normcase(stem) + suffix, "")

    def orphans(self) -> list[str]:
        """Label files to which no image was asked for, in folders where others were found, sorted."""
        found = []
        for place, taken in self._taken.items():
            rest = set(self._names(place).values()) - set(taken)
            paths = (os.path.join(place, name) for name in rest if name.lower().endswith(tuple(self._suffixes)))
            found += [path for path in paths if _holds_labels(path)]
        return sorted(found)

    def notes(self) -> list[str]:
        """What was odd about the names, a line each."""
        lines = []
        if self._renamed:
            image, label = self._renamed[0]
            words = "label files found behind the prefix that Label Studio puts before names"
            lines.append(f"{len(self._renamed)} {words}, e.g. {label} of {image}")
        if self._shared:
            label, first, second = self._shared[0]
            lines.append(f"{len(self._shared)} images share a label file with another, e.g. {label}: {first}, {second}")
        return lines

    def _take(self, place: str, name: str, image: str) -> None:
        first = self._taken[place].setdefault(name, image)
        if first != image and os.path.dirname(first) == os.path.dirname(image):
            self._shared.append((os.path.join(place, name), first, image))

    def _is_of_another(self, label: str, folder: str) -> bool:
        """Whether an image in ``folder`` has the whole name of ``label``."""
        if folder not in self._stems:
            pictures = (name for name in self._names(folder) if not name.endswith(tuple(self._suffixes)))
            self._stems[folder] = {os.path.splitext(name)[0] for name in pictures}
        return os.path.normcase(os.path.splitext(label)[0]) in self._stems[folder]

    def _with_prefix(self, folder: str, stem: str, suffix: str) -> str:
        """The one file of ``folder`` that has Label Studio's prefix before ``stem``."""
        if folder not in self._prefixed:
            behind: dict[str, list[str]] = defaultdict(list)
            for key, name in self._names(folder).items():
                if match := _PREFIX.match(key):
                    behind[key[match.end() :]].append(name)
            self._prefixed[folder] = behind
        names = self._prefixed[folder].get(os.path.normcase(stem) + suffix, [])
        return names[0] if len(names) == 1 else ""

    def _candidates(self, folder: str) -> Iterator[str]:
        """Label folders of an image folder, existing or not, the likeliest first."""
        yield usual_folder(folder)
        path = Path(folder)
        parts = path.parts
        for position in reversed(range(1, len(parts))):
            if parts[position].lower() in _PICTURE_WORDS:
                for sibling in self._label_folders(Path(*parts[:position])):
                    yield str(sibling.joinpath(*parts[position + 1 :]))
            elif _PICTURE_WORD.search(parts[position]):
                for word in (*_LABEL_WORDS, *map(str.capitalize, _LABEL_WORDS)):
                    sibling = Path(*parts[:position], _PICTURE_WORD.sub(word, parts[position], count=1))
                    yield str(sibling.joinpath(*parts[position + 1 :]))
        yield folder
        yield from map(str, self._label_folders(path))
        for holder in (path.parent, path.parent.parent):  # labels/x or labels beside x, or beside images/x
            for sibling in self._label_folders(holder):
                yield str(sibling / path.name)
                yield str(sibling)

    def _label_folders(self, folder: Path) -> list[Path]:
        """Folders right in ``folder`` that are called like labels, in whatever case; each folder is looked at once, as
        many folders of images may share one above them."""
        if folder not in self._inner:
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                names = []
            self._inner[folder] = [folder / name for word in _LABEL_WORDS for name in names if name.lower() == word]
        return self._inner[folder]

    def _names(self, folder: str) -> dict[str, str]:
        """The files of a folder by their names with a lower-case extension."""
        if folder not in self._listed:
            try:
                names = sorted(os.listdir(folder), reverse=True)  # x.txt counts before x.TXT
            except OSError:
                names = []
            split = ((os.path.splitext(name), name) for name in names if not name.startswith("."))
            self._listed[folder] = {os.path.normcase(stem) + suffix.lower(): name for (stem, suffix), name in split}
        return self._listed[folder]


def usual_folder(folder: str) -> str:
    """.../images/x -> .../labels/x: the first ``/images/``, or the last where that leads nowhere; else the same."""
    marker = f"{os.sep}images{os.sep}"
    whole = folder + os.sep
    first = whole.replace(marker, f"{os.sep}labels{os.sep}", 1)
    if whole.count(marker) > 1 and not os.path.isdir(first):
        before, _, after = whole.rpartition(marker)
        first = f"{before}{os.sep}labels{os.sep}{after}"
    return first[:-1]


def _holds_labels(path: str) -> bool:
    """Whether a file without an image is a label file, and no list, class list or readme."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    if path.lower().endswith(".xml"):
        return b"<annotation" in head
    try:
        return len([float(word) for word in head.lstrip(b"\xef\xbb\xbf \r\n").splitlines()[0].split()]) >= 5
    except (ValueError, IndexError):
        return False
