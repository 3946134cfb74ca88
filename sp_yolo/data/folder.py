"""A folder instead of a dataset YAML: what is in it is looked for where people's tools put it."""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sp_yolo.config import SPLITS, DatasetConfig, load_dataset_config
from sp_yolo.config.dataset import read_names
from sp_yolo.config.text import LABEL_BYTES, NotText, encoding_of, read_text
from sp_yolo.data.candidates import COCO_NAME, list_candidates
from sp_yolo.data.files import is_system_name, list_images
from sp_yolo.data.images import EXTENSIONS, is_image_name
from sp_yolo.data.labels.coco import read_categories
from sp_yolo.data.labels.foreign import find_foreign, foreign_words
from sp_yolo.data.labels.voc import names_in
from sp_yolo.errors import UserError

_CALLED = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_NAME_FILES: tuple[str, ...] = ("classes.txt", "_classes.txt", "obj.names", "classes.names", "class.names")
_NAME_FILES += ("_darknet.labels", "predefined_classes.txt")
_MAX_CLASSES = 10_000


def describe_folder(folder: str | os.PathLike[str]) -> DatasetConfig:
    """The data set in a folder: its YAML, or the splits, labels and class names that are found there.

    Where there is no validation split, a share of the training images is held out by a hash of their names.

    Raises:
        UserError: no images or no labels, or only those of another program.
    """
    root = Path(folder).resolve()
    yaml = _yaml_of(root)
    if yaml:
        config = load_dataset_config(yaml)
        return dataclasses.replace(config, notes=(f"{folder}: described by {yaml}", *config.notes))
    entries = {split: entry for split in SPLITS if (entry := _entry_of(root, split))}
    if not entries and (inner := _only_folder(root)):
        config = describe_folder(inner)
        return dataclasses.replace(config, notes=(f"{folder}: all of it lies in {inner}", *config.notes))
    if "train" not in entries:
        if entries:
            raise UserError(f"{folder}: a {next(iter(entries))} split, but nothing called train")
        entries = {"train": _whole(root)}
    held_out = "val" not in entries
    if held_out:
        entries["val"] = entries["train"]
    config = DatasetConfig(root, root, ("?",), held_out=held_out)
    config = dataclasses.replace(config, **{split: (entry,) for split, entry in entries.items()})  # type: ignore[arg-type]
    names, source = _names(config, list(entries.values()))
    found = ", ".join(f"{split} = {os.path.relpath(entry, root)}" for split, entry in entries.items())
    notes = [f"{folder}: no YAML in it; {found}; {len(names)} classes {source}: {_few(names)}"]
    if held_out:
        notes.append(f"{folder}: no validation split: one image in ten, by a hash of its name, is held out for it")
    return dataclasses.replace(config, names=tuple(names), notes=tuple(notes))


def refuse_no_description(data: str) -> None:
    """Raises UserError where ``data`` is a file of another kind than a YAML, with what to give instead."""
    path = Path(data)
    suffix = path.suffix.lower()
    where = f"{data}: the data are described by a YAML or by their folder"
    if not os.path.isfile(path) or suffix in (".yaml", ".yml"):
        return
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"):
        raise UserError(f"{where}; this is an archive: unpack it and give the folder")
    if suffix in (".json", ".txt", ".xml", ".csv", ".data", ".names") or suffix in EXTENSIONS:
        raise UserError(f"{where}: give {path.parent}, or a YAML with train: and val: (docs/data.md)")


def _only_folder(root: Path) -> Path | None:
    """The one folder in a folder that holds nothing else to look at, as unpacked archives have it."""
    inner = [entry for entry in root.iterdir() if not is_system_name(entry.name)]
    folders = [entry for entry in inner if entry.is_dir()]
    kinds = (".txt", ".xml", ".json", ".csv")
    others = any(entry.is_file() and (is_image_name(entry) or entry.suffix.lower() in kinds) for entry in inner)
    return folders[0] if len(folders) == 1 and not others and _looks_like_data(folders[0]) else None


def _looks_like_data(folder: Path) -> bool:
    """Whether a folder is a data set of its own rather than the images of one."""
    return bool(_yaml_of(folder)) or any(_entry_of(folder, split) for split in SPLITS)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _yaml_of(root: Path) -> Path | None:
    """The dataset YAML right in ``root``: of the usual name, or the only one that names classes."""
    named = [root / name for name in _YAMLS if (root / name).is_file()]
    if named:
        return named[0]
    files = sorted(file for file in root.iterdir() if file.suffix in (".yaml", ".yml") and file.is_file())
    described = []
    for file in files:
        try:
            described += [file] if "names:" in read_text(file, _MAX_CLASSES * 100) else []
        except (OSError, NotText):
            continue
    return described[0] if len(described) == 1 else None


def _entry_of(root: Path, split: str) -> str | None:
    """The entry of one split, as it would stand in a YAML, absolute."""
    for name in _CALLED[split]:
        listed = root / "ImageSets" / "Main" / f"{name}.txt"
        if listed.is_file() and (root / "Annotations").is_dir():
            return str(listed)
        for holder in (root, root / "annotations"):
            for file in sorted(holder.glob(f"*{name}*.json")) if holder.is_dir() else []:
                if file.stem.rpartition("_")[2].rstrip("0123456789") == name and _is_coco(file):
                    return str(file)
        below_images = [place for top in _folders(root, "images") for place in _folders(top, name, bare=True)]
        for place in (*_folders(root, name), *_folders(root, name, bare=True), *below_images):
            if (place / COCO_NAME).is_file():
                return str(place / COCO_NAME)
            inner = next(iter(_folders(place, "images")), place)
            if list_images(inner).images:
                return str(inner)
        for file in sorted(root.glob("*.txt")):
            if _bare(file.stem) == name and not is_system_name(file.name):
                return str(file)
    return None


def _folders(parent: Path, name: str, *, bare: bool = False) -> list[Path]:
    """Folders right in ``parent`` that are called ``name`` in whatever case; ``bare``: train2017, images_train too."""
    called = _bare if bare else str.lower
    try:
        return sorted(entry for entry in parent.iterdir() if called(entry.name) == name and entry.is_dir())
    except OSError:
        return []


def _bare(name: str) -> str:
    """The split that a name is about: train of train2017, images_train, Train-Set."""
    return re.sub(r"images?|imgs?|set|\d+|[\W_]+", "", name.lower())


def _whole(root: Path) -> str:
    """The one entry of a folder without splits."""
    lists = [root / "ImageSets" / "Main" / f"{name}.txt" for name in ("trainval", "default")]
    for listed in lists:
        if listed.is_file() and (root / "Annotations").is_dir():
            return str(listed)
    files = [file for place in (root, root / "annotations") if place.is_dir() for file in sorted(place.glob("*.json"))]
    coco = [file for file in files if _is_coco(file)]
    if len(coco) == 1:
        return str(coco[0])
    if coco:
        names = ", ".join(file.name for file in coco[:4])
        raise UserError(f"{root}: {len(coco)} COCO files ({names}), none called train: write a YAML that names them")
    for name in ("images", "jpegimages", "img", "imgs"):
        for place in _folders(root, name):
            if list_images(place).images:
                return str(place)
    if list_images(root).images:
        return str(root)
    raise UserError(f"{root}: no dataset YAML and no image in this folder")


def _is_coco(file: Path) -> bool:
    if is_system_name(file.name) or foreign_words(file):
        return False
    words = ('"images"', '"categories"', '"file_name"')
    try:  # not parsed, nor read in: it may be large, and is parsed soon enough
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            encoding = encoding_of(data[:4])[1]
            return all(data.find(word.encode(encoding)) >= 0 for word in words)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return False


def _names(config: DatasetConfig, entries: Sequence[str]) -> tuple[list[str], str]:
    """(class names, where from): of the COCO files, of a file of names, of the XML files, or numbers.

    Raises:
        UserError: there are no labels.
    """
    if all(entry.endswith(".json") for entry in entries):
        return read_categories(entries), "of the COCO file"
    labels = [
        Path(one.annotation)
        for split in ("train", "val")
        for one in list_candidates(config, split).images
        if isinstance(one.annotation, str) and os.path.isfile(one.annotation)
    ]
    for file in _name_files(config.root, labels):
        if names := read_names(file):
            return names, f"of {os.path.relpath(file, config.root)}"
    xmls = [label for label in labels if label.suffix.lower() == ".xml"]
    if xmls:
        return names_in(xmls), "of the XML files"
    if not labels:
        foreign = find_foreign((config.root, *(Path(entry) for entry in entries)))
        raise UserError(f"{config.root}: images without labels{f'; {foreign}' if foreign else ''}")
    return _numbers(labels), "(no file of names: called by number)"


def _name_files(root: Path, labels: Sequence[Path]) -> Iterator[Path]:
    """Files of class names, in the folder, in the folders of the labels and in the two above those."""
    homes = {label.parent: None for label in labels}
    above = [upper for home in homes if home != root for upper in (home.parent, home.parent.parent)]
    places = dict.fromkeys((root, *homes, *sorted(above, key=lambda place: -len(place.parts))))
    for place in places:
        yield from (place / name for name in _NAME_FILES if (place / name).is_file())
    yield from sorted(root.glob("*.names"))


def _numbers(labels: Sequence[Path]) -> list[str]:
    """ "0", "1", ... up to the largest class of the label files."""
    largest = 0
    for label in labels:
        try:
            firsts = [line.split()[0] for line in read_text(label, LABEL_BYTES).split("\n") if line.strip()]
        except (OSError, NotText):
            continue
        numbers = [float(word) for word in firsts if word.replace(".", "", 1).isdecimal()]
        largest = max(largest, *(int(number) for number in numbers if number < _MAX_CLASSES), 0)
    return [str(number) for number in range(largest + 1)]
