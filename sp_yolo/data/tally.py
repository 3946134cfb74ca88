"""What became of every image and every labelled object of a split: counted by reason, in one line, judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

FEW = 0.05  # of the objects or images: more of them lost is no slip of an annotator any more
PICTURES = 4  # of a reason that are kept as examples
# Reasons that more than one file of this package counts by.
BEYOND_NC, DUPLICATE, NO_FILE = "class beyond nc", "duplicate", "no such file"
UNREAD_IMAGE, UNKNOWN_CLASS = "image unread", "unknown class"


@dataclass
class Tally:
    """``labelled``, ``background`` (an empty label file), ``no_label_file`` and ``unread`` (picture or labels, by
    reason) add up to the images found; ``boxes``, ``ignored`` and ``dropped`` (by reason) to the objects labelled.

    ``orphans``: label files without an image. ``notes``: what was odd and kept. ``examples``: per reason the first
    place in words; ``pictures``: per reason the first images that it is about.
    """

    labelled: int = 0
    background: int = 0
    no_label_file: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    boxes: int = 0
    ignored: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    orphans: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, list[str]] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return self.labelled + self.background + self.no_label_file

    @property
    def found(self) -> int:
        return self.used + self.unread.total()

    @property
    def lost(self) -> int:
        """Dropped objects that are not there a second time."""
        return self.dropped.total() - self.dropped[DUPLICATE]

    def example(self, reason: str, words: str, picture: str = "") -> None:
        """Keep ``words`` if they are the first for ``reason``, and ``picture`` if it is among the first few."""
        self.examples.setdefault(reason, words)
        kept = self.pictures.setdefault(reason, [])
        if picture and len(kept) < PICTURES:
            kept.append(picture)

    def line(self) -> str:
        """The split in one line; every count is there even where it is zero, so that lines can be compared."""
        images = (
            f"{self.found} images found: {self.labelled} with labels, {self.background} background, "
            f"{self.no_label_file} without label file, {self.unread.total()} unread{_reasons(self.unread)}"
        )
        boxes = f"{self.boxes} boxes, {self.dropped.total()} dropped{_reasons(self.dropped)}, {self.ignored} ignored"
        more = "".join(f"; {count} {note}" for note, count in self.notes.items())
        return f"{images}; {boxes}{more}" + (f"; {self.orphans} label files without image" if self.orphans else "")

    def losses(self) -> list[str]:
        """What nobody would train on unasked, each with its first place; empty where next to nothing is lost."""
        told = []
        beyond, lost = self.dropped[BEYOND_NC], self.lost
        objects = self.boxes + self.ignored + lost
        if beyond or lost > FEW * objects:
            reasons = Counter({reason: count for reason, count in self.dropped.items() if reason != DUPLICATE})
            told.append(f"{lost} of {objects} boxes would be lost{_reasons(reasons)}{self._first(reasons)}")
        if self.unread.total() > FEW * self.found:
            told.append(
                f"{self.unread.total()} of {self.found} images unread{_reasons(self.unread)}{self._first(self.unread)}"
            )
        if min(self.orphans, self.no_label_file) > FEW * self.found:
            places = [self.examples.get(reason, "") for reason in ("no label file", "label file without image")]
            told.append(
                f"{self.no_label_file} of {self.found} images have no label file while {self.orphans} label files have "
                f"no image, {'; '.join(places)}"
            )
        return told

    def _first(self, reasons: Mapping[str, int]) -> str:
        often = sorted(reasons, key=lambda reason: -reasons[reason])
        told = [self.examples[reason] for reason in often if reason in self.examples and reason != UNREAD_IMAGE]
        return f", first: {'; '.join(told[:2])}" if told else ""

    def counts(self) -> Counter[str]:
        """Everything in one flat counter."""
        missing = self.unread[NO_FILE]
        flat = {
            "images": self.used,
            "boxes": self.boxes,
            "background": self.background + self.no_label_file,
            "missing label files": self.no_label_file,
            "ignored": self.ignored,
            "missing images": missing,
            "broken images": self.unread.total() - missing,
            "label files without image": self.orphans,
        }
        return Counter({key: value for key, value in {**flat, **self.dropped, **self.notes}.items() if value})


def _reasons(counter: Mapping[str, int]) -> str:
    """ " (2 zero area, 1 duplicate)", the most frequent first; '' where there is none."""
    ordered = sorted((-count, reason) for reason, count in counter.items() if count)
    return f" ({', '.join(f'{-count} {reason}' for count, reason in ordered)})" if ordered else ""
