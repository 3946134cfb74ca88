"""Dataset descriptions: the original's YAML keys and ours, checked and made absolute."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sp_yolo.config.files import CHECKOUT, YamlDict, find_file, read_yaml
from sp_yolo.config.lookup import as_path, find_place, missing_words
from sp_yolo.config.text import NotText, read_text
from sp_yolo.errors import UserError

SPLITS = ("train", "val", "test")
_DATASET_KEYS = {*SPLITS, "nc", "names", "root", "path", "format", "images", "download", "generate", "kpt_shape"}
_FETCHED = ("coco", "voc")  # YAMLs in data/ whose data `sp-yolo download` fetches


@dataclass(frozen=True)
class DatasetConfig:
    """What a dataset YAML says.

    ``train``/``val``/``test``: entries of each split: absolute paths of image folders, list files or COCO json
    files; for ``format: voc`` the names of splits (``train`` or ``VOC2007/trainval``) below ``root``. ``images``:
    image folder of each COCO json split. ``names``: class names, index = class. ``generate``: a generator to run
    first ("toy"). ``keypoints``: columns behind the box in the label rows of pose data (kpt_shape). ``held_out``:
    ``train`` and ``val`` are the same entries, and a share of their images is for validation. ``notes``: how the
    description was read where that is not as it stands, a line each.
    """

    path: Path
    root: Path
    names: tuple[str, ...]
    train: tuple[str, ...] | None = None
    val: tuple[str, ...] | None = None
    test: tuple[str, ...] | None = None
    format: str = "auto"
    images: Mapping[str, Path] = field(default_factory=dict)
    generate: str | None = None
    keypoints: int = 0
    held_out: bool = False
    notes: tuple[str, ...] = ()

    def class_names(self, single_class: bool) -> tuple[str, ...]:
        """``names``, or the one name that every class goes by under ``--single-cls``."""
        return ("item",) if single_class and len(self.names) != 1 else self.names

    def entries(self, split: str) -> tuple[str, ...]:
        """The entries of one split; raises UserError where the YAML has none."""
        found: tuple[str, ...] | None = getattr(self, split)
        if not found:
            raise UserError(f"{self.path}: no '{split}' split is given")
        return found


def _dataset_names(source: YamlDict) -> tuple[str, ...]:
    names = source.get("names")
    where = source.where("names")
    if isinstance(names, str):
        names = _names_of_file(names, source)
    if isinstance(names, dict):
        names = _numbered(names, where)
    if not isinstance(names, list) or not names:
        raise UserError(
            f"{where}: names must be a list of class names{'' if 'names' in source else ' (there is none)'}"
        )
    for name in names:
        if not isinstance(name, str | int | float) or isinstance(name, bool):
            raise UserError(f"{where}: class name {name!r} is not a word (quote it)")
    words = tuple(str(name) for name in names)
    if len(set(words)) != len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise UserError(f"{where}: class name {twice!r} appears twice")
    count = source.get("nc", len(words))
    if str(count).strip() != str(len(words)):
        raise UserError(f"{source.where('nc')}: nc = {count!r}, but {len(words)} names are given")
    return words


def _numbered(names: dict[Any, Any], where: str) -> list[Any]:
    """The values of {0: a, 1: b} or {'0': a, '1': b} in order; the keys of {a: 0, b: 1}."""
    if all(type(number) is int and not str(name).isdecimal() for name, number in names.items()):
        names = {number: name for name, number in names.items()}
    numbers = {int(key) if isinstance(key, str) and key.strip().isdecimal() else key: key for key in names}
    if set(numbers) == set(range(1, len(names) + 1)):
        raise UserError(f"{where}: names are numbered 1..{len(names)}, but class ids count from 0: number them from 0")
    if len(numbers) != len(names) or set(numbers) != set(range(len(names))):
        raise UserError(f"{where}: names must be numbered 0..{len(names) - 1} without gaps")
    return [names[numbers[index]] for index in range(len(names))]


def _names_of_file(text: str, source: YamlDict) -> list[str]:
    """The lines of a file such as obj.names or classes.txt.

    Raises:
        UserError: there is none; a single class has to be a list too.
    """
    where = source.where("names")
    place = find_place(text, where, [source.path.resolve().parent, Path.cwd()])
    if not place or not place[0].is_file():
        raise UserError(f"{where}: names must be a list of class names: [{text[:40]}] for one class, or name a file")
    return read_names(place[0])


def read_names(path: Path) -> list[str]:
    """Class names, one per line.

    Raises:
        UserError: it cannot be read as text.
    """
    try:
        return [line.strip() for line in read_text(path).split("\n") if line.strip()]
    except (OSError, NotText) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None


def _lies_below(home: Path, source: YamlDict) -> bool:
    """Whether the training and validation entries are found in the folder of the YAML, whose ``path`` is elsewhere."""
    entries = [entry for split in ("train", "val") for entry in _as_list(source.get(split)) if entry]
    words = [entry for entry in entries if isinstance(entry, str) and Path(entry).parts]
    return bool(words) and len(words) == len(entries) and all(find_place(word, "", [home]) for word in words)


def _dataset_root(source: YamlDict, override: str | None, notes: list[str]) -> tuple[Path, bool]:
    """(the folder that relative entries start from, whether anybody named one)."""
    variable = f"{source.path.stem.upper().replace('-', '_')}_ROOT"
    given = override or os.environ.get(variable)
    if given:
        where = "--set root" if override else f"environment {variable}"
        root = as_path(given, where)
    else:
        text = source.get("root", source.get("path", "."))
        if not isinstance(text, str):
            raise UserError(f"{source.where('root')}: root must be a path, not {text!r}")
        where = source.where("root" if "root" in source else "path")
        root = as_path(text, where)
        home = source.path.resolve().parent
        if "generate" not in source and not root.is_absolute() and ("root" in source or "path" in source):
            # Exporters mean the YAML's folder, the original the working directory, our own YAMLs the checkout; what is
            # generated lies in the working directory, also beside a checkout that holds it already.
            text = text.replace("\\", "/")
            beside = [base / text for base in (home, Path.cwd(), CHECKOUT)]
            beside += [home.parent / text] if Path(text).parts[:1] == (home.name,) else []
            root = next((candidate for candidate in beside if candidate.exists()), root)
        if not root.is_dir() and _lies_below(home, source):
            notes.append(f"{where}: {str(root)!r} is no folder here, its entries are those below {home}")
            root = home
    if not root.is_dir() and "generate" not in source:
        words = _fetch_words(source) or f" (set root: in the YAML or {variable}, or give --root DIR)"
        raise UserError(f"{where}: dataset root {str(root)!r} is no folder{words}")
    return root.resolve(), bool(given) or "root" in source or "path" in source


def _fetch_words(source: YamlDict) -> str:
    """How to come by the data that `sp-yolo download` knows, and how to say where they lie; "" for others."""
    name = source.path.stem
    where = f"where they lie already is said by --root DIR or {name.upper()}_ROOT=DIR"
    return f" (`sp-yolo download {name}` fetches them; {where})" if name in _FETCHED else ""


def _split_entries(
    source: YamlDict, split: str, bases: list[Path], voc: bool, notes: list[str]
) -> tuple[str, ...] | None:
    value = source.get(split)
    if value is None or value == [] or value == "":
        return None
    entries = _as_list(value)
    where = source.where(split)
    resolved = []
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise UserError(f"{where}: {split} must be a path or a list of paths, not {entry!r}")
        found = find_place(entry, where, bases)
        if found:
            path, how = found
            if how:
                notes.append(f"{where}: {split}: {how}")
            resolved.append(str(path))
        elif voc:
            lists = [(base / entry).parent / "ImageSets" / "Main" / f"{Path(entry).name}.txt" for base in bases]
            home = next((base for base, listed in zip(bases, lists, strict=True) if listed.is_file()), None)
            resolved.append(str(home / entry) if home else entry)
        elif "generate" in source:
            resolved.append(str(bases[0] / entry))
        elif split == "test":  # Roboflow names one whether there is one or not, and training has no need of it
            notes.append(f"{where}: test left out: no such file or folder: {missing_words(entry, bases)}")
        else:
            words = f"{missing_words(entry, bases)}{_fetch_words(source)}"
            raise UserError(f"{where}: {split}: no such file or folder: {words}")
    return tuple(resolved) or None


def _names_own_folder(source: YamlDict) -> bool:
    """Whether the entries begin with the name of the folder that the YAML lies in, seen from above it."""
    entries = [entry for split in SPLITS for entry in _as_list(source.get(split)) if isinstance(entry, str)]
    own = source.path.resolve().parent.name
    return bool(entries) and all(entry.replace("\\", "/").split("/")[0] == own for entry in entries)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _foreign_keys(source: YamlDict) -> list[str]:
    """A line naming the keys that other programs use and this one does not.

    Raises:
        UserError: one is nearly a key of ours.
    """
    foreign = [key for key in source if key not in _DATASET_KEYS]
    for key in foreign:
        near = difflib.get_close_matches(str(key).lower(), _DATASET_KEYS, n=1, cutoff=0.75)
        if near:
            raise UserError(f"{source.where(key)}: unknown key {key!r} (did you mean {near[0]!r}?)")
    shown = ", ".join(repr(key)[:40] for key in foreign[:8])
    return [f"{source.where(foreign[0])}: keys not used here: {shown}"] if foreign else []


def _keypoint_columns(source: YamlDict) -> int:
    """Columns of kpt_shape: [points, 2 or 3]; 0 without it."""
    shape = source.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 10_000 for n in shape):
        raise UserError(f"{source.where('kpt_shape')}: kpt_shape = {shape!r:.80}: must be [points, 2 or 3]")
    return int(shape[0] * shape[1])


def _image_folders(source: YamlDict, bases: list[Path]) -> dict[str, Path]:
    """``images``: the image folder of each split's COCO json."""
    images = source.get("images", {})
    images = {split: images for split in SPLITS} if isinstance(images, str) else images
    where = source.where("images")
    if not isinstance(images, dict) or not set(images) <= set(SPLITS):
        raise UserError(f"{where}: images must be a folder or a mapping of splits to folders")
    folders = {}
    for split, folder in images.items():
        found = find_place(str(folder), where, bases)
        folders[split] = found[0] if found else bases[0] / str(folder)
        needed = split != "test" and "generate" not in source and source.get(split)
        if needed and not folders[split].is_dir():
            words = f"{missing_words(str(folder), bases)}{_fetch_words(source)}"
            raise UserError(f"{where}: images: no such folder: {words}")
    return folders


def load_dataset_config(path: str | os.PathLike[str], root: str | None = None) -> DatasetConfig:
    """Read a dataset YAML: the original's keys (train, val, test, nc, names) and ours (root, format, images, generate).

    ``root`` overrides the YAML's, as does the environment variable ``<FILE STEM>_ROOT``. Relative entries are looked
    for below it, beside the YAML and from the working directory.

    Raises:
        UserError: keys nearly ours, bad names, missing folders; names file and line.
    """
    source = read_yaml(find_file(path, "data"))
    notes = _foreign_keys(source)
    kind = source.get("format", "auto")
    if kind not in ("auto", "yolo", "coco", "voc"):
        raise UserError(f"{source.where('format')}: format = {kind!r}: must be auto, yolo, coco or voc")
    if source.get("generate") not in (None, "toy"):
        raise UserError(f"{source.where('generate')}: generate = {source['generate']!r}: only 'toy' is known")
    base, given = _dataset_root(source, root, notes)
    beside = source.path.resolve().parent
    bases = list(dict.fromkeys([base, beside, Path.cwd()] if given else [beside, base]))
    bases += [beside.parent] if _names_own_folder(source) else []
    splits = {split: _split_entries(source, split, bases, kind == "voc", notes) for split in SPLITS}
    if not splits["train"] and not splits["val"] and not splits["test"]:
        raise UserError(f"{source.path}: none of train, val and test is given")
    return DatasetConfig(
        path=source.path,
        root=base,
        names=_dataset_names(source),
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        format=kind,
        images=_image_folders(source, bases),
        generate=source.get("generate"),
        keypoints=_keypoint_columns(source),
        notes=tuple(notes),
    )
