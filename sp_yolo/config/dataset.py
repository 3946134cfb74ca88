"""Dataset descriptions: the original's YAML keys and ours, checked and made absolute."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sp_yolo.config.files import CHECKOUT, YamlDict, find_file, read_yaml
from sp_yolo.errors import UserError

SPLITS = ("train", "val", "test")
_DATASET_KEYS = {*SPLITS, "nc", "names", "root", "path", "format", "images", "download", "generate"}


@dataclass(frozen=True)
class DatasetConfig:
    """What a dataset YAML says.

    ``train``/``val``/``test``: entries of each split: absolute paths of image folders, list files or COCO json
    files; for ``format: voc`` the names of splits (``train`` or ``VOC2007/trainval``) below ``root``. ``images``:
    image folder of each COCO json split. ``names``: class names, index = class. ``generate``: a generator to run
    first ("toy").
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

    def class_names(self, single_class: bool) -> tuple[str, ...]:
        """``names``, or the one name that every class goes by under ``--single-cls``."""
        return ("item",) if single_class and len(self.names) != 1 else self.names

    def entries(self, split: str) -> tuple[str, ...]:
        """The entries of one split; raises UserError where the YAML has none."""
        found: tuple[str, ...] | None = getattr(self, split)
        if not found:
            raise UserError(f"{self.path}: no '{split}' split is given")
        return found


def _path(text: str, where: str) -> Path:
    """``text`` as a path, ``~`` expanded.

    Raises:
        UserError: the system takes it for no path, or may not look at it.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: {repr(text)[:80]} cannot be used as a path: {reason}") from None
    return path


def _dataset_names(source: YamlDict) -> tuple[str, ...]:
    names = source.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise UserError(f"{source.where('names')}: names must be numbered 0..{len(names) - 1} without gaps")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{source.where('names')}: names must be a list of class names")
    for name in names:
        if not isinstance(name, str | int | float) or isinstance(name, bool):
            raise UserError(f"{source.where('names')}: class name {name!r} is not a word (quote it)")
    words = tuple(str(name) for name in names)
    if len(set(words)) != len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise UserError(f"{source.where('names')}: class name {twice!r} appears twice")
    count = source.get("nc", len(words))
    if count != len(words):
        raise UserError(f"{source.where('nc')}: nc = {count!r}, but {len(words)} names are given")
    return words


def _dataset_root(source: YamlDict, override: str | None) -> Path:
    variable = f"{source.path.stem.upper().replace('-', '_')}_ROOT"
    given = override or os.environ.get(variable)
    if given:
        where = "--set root" if override else f"environment {variable}"
        root = _path(given, where)
    else:
        text = source.get("root", source.get("path", "."))
        if not isinstance(text, str):
            raise UserError(f"{source.where('root')}: root must be a path, not {text!r}")
        where = source.where("root" if "root" in source else "path")
        root = _path(text, where)
        if not root.is_absolute() and not root.exists():
            # The original reads paths from the working directory; a checkout elsewhere is the second guess.
            beside = [base / root for base in (CHECKOUT, source.path.resolve().parent)]
            root = next((candidate for candidate in beside if candidate.exists()), root)
    if not root.is_dir() and "generate" not in source:
        raise UserError(f"{where}: dataset root {str(root)!r} is no folder (set root: in the YAML or {variable})")
    return root.resolve()


def _split_entries(source: YamlDict, split: str, root: Path, voc: bool) -> tuple[str, ...] | None:
    value = source.get(split)
    if value is None or value == []:
        return None
    entries = value if isinstance(value, list) else [value]
    resolved = []
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise UserError(f"{source.where(split)}: {split} must be a path or a list of paths, not {entry!r}")
        path = root / _path(entry, source.where(split))
        if not voc and not path.exists() and "generate" not in source:
            raise UserError(f"{source.where(split)}: {split}: no such file or folder: {path}")
        resolved.append(entry if voc else str(path))
    return tuple(resolved)


def load_dataset_config(path: str | os.PathLike[str], root: str | None = None) -> DatasetConfig:
    """Read a dataset YAML: the original's keys (train, val, test, nc, names) and ours (root, format, images, generate).

    ``root`` overrides the YAML's, as does the environment variable ``<FILE STEM>_ROOT``; relative entries start there.

    Raises:
        UserError: unknown keys, bad names, missing folders; names file and line.
    """
    source = read_yaml(find_file(path, "data"))
    for key in source:
        if key not in _DATASET_KEYS:
            near = difflib.get_close_matches(str(key), _DATASET_KEYS, n=1)
            raise UserError(
                f"{source.where(key)}: unknown key {key!r}{f' (did you mean {near[0]!r}?)' if near else ''}"
            )
    kind = source.get("format", "auto")
    if kind not in ("auto", "yolo", "coco", "voc"):
        raise UserError(f"{source.where('format')}: format = {kind!r}: must be auto, yolo, coco or voc")
    if source.get("generate") not in (None, "toy"):
        raise UserError(f"{source.where('generate')}: generate = {source['generate']!r}: only 'toy' is known")
    base = _dataset_root(source, root)
    images = source.get("images", {})
    images = {split: images for split in SPLITS} if isinstance(images, str) else images
    if not isinstance(images, dict) or not set(images) <= set(SPLITS):
        raise UserError(f"{source.where('images')}: images must be a folder or a mapping of splits to folders")
    folders = {}
    for split, folder in images.items():
        folders[split] = base / _path(str(folder), source.where("images"))
        if not folders[split].is_dir() and "generate" not in source and source.get(split):
            raise UserError(f"{source.where('images')}: images: no such folder: {folders[split]}")
    splits = {split: _split_entries(source, split, base, kind == "voc") for split in SPLITS}
    if not splits["train"] and not splits["val"] and not splits["test"]:
        raise UserError(f"{source.path}: none of train, val and test is given")
    return DatasetConfig(
        source.path,
        base,
        _dataset_names(source),
        format=kind,
        images=folders,
        generate=source.get("generate"),
        **splits,
    )
