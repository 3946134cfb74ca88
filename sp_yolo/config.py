"""Everything a run is told: strict YAML, hyperparameters, dataset descriptions, the frozen run configuration.

Nothing here imports another part of the package but the errors; each builder of the engine gets its slice, never all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sp_yolo.errors import UserError

CHECKOUT = Path(__file__).resolve().parent.parent
INSTALLED = Path(sys.prefix) / "share" / "sp-yolo"  # where setup.cfg puts the recipes of an installed package


# ---------------------------------------------------------------------------------------------------------------- YAML
class YamlDict(dict[Any, Any]):
    """A top-level YAML mapping that remembers its file and the line of each key.

    ``path`` is the file, ``line(key)`` the 1-based line of a top-level key (1 for an absent key).
    """

    def __init__(self, values: Mapping[Any, Any], path: Path, lines: Mapping[Any, int]) -> None:
        super().__init__(values)
        self.path = path
        self._lines = dict(lines)

    def line(self, key: Any) -> int:
        return self._lines.get(key, 1)

    def where(self, key: Any) -> str:
        """``file:line`` of ``key``, for error messages."""
        return f"{self.path}:{self.line(key)}"


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 without tags and duplicate keys, and with ``1e-3`` read as the number everybody means."""


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _construct_strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            repeated = key in result
        except TypeError:
            raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark) from None
        if repeated:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} appears twice", problem_mark=key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _construct_strict_mapping)


def _refuse_tags(loader: _StrictLoader, suffix: str, node: yaml.Node) -> Any:
    raise yaml.MarkedYAMLError(problem=f"tag {node.tag!r} is not allowed here", problem_mark=node.start_mark)


_StrictLoader.add_multi_constructor("", _refuse_tags)


def read_yaml(path: str | os.PathLike[str]) -> YamlDict:
    """Read one YAML file whose top level is a mapping.

    Raises:
        UserError: the file is missing, unreadable, not YAML, has a tag or a duplicate key, or is no mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    try:
        loader = _StrictLoader(text)
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise UserError(f"{path}:1: expected 'key: value' lines at the top level")
            values = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    return YamlDict(values, path, {key.value: key.start_mark.line + 1 for key, _ in node.value})


def find_file(name: str | os.PathLike[str], folder: str) -> Path:
    """The file ``name`` as given, or with that name below ``folder`` ("hyp", "data") of the working directory, the
    checkout or the installed package.

    Raises:
        UserError: nowhere; names near misses.
    """
    given = Path(name)
    shelves = [Path.cwd() / folder, CHECKOUT / folder, INSTALLED / folder]
    candidates = [given, CHECKOUT / given, *(shelf / given.name for shelf in shelves)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted({file.name for shelf in shelves if shelf.is_dir() for file in shelf.glob("*.yaml")})
    near = difflib.get_close_matches(given.name, known, n=3) or known
    raise UserError(f"{given}: no such file (known in {folder}/: {', '.join(near)})")


# ----------------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Rule:
    """What one hyperparameter may be: its default, bounds (inclusive), and the words allowed instead of a number."""

    default: float | str
    low: float = -math.inf
    high: float = math.inf
    words: tuple[str, ...] = ()
    whole: bool = False

    def check(self, value: Any) -> float | int | str:
        """``value`` as the type the key has; raises ValueError with the rule that it breaks."""
        if isinstance(value, str) and value in self.words:
            return value
        number_allowed = not self.words or self.low != -math.inf or self.high != math.inf
        text = " or ".join(repr(word) for word in self.words)
        if not number_allowed:
            raise ValueError(f"must be {text}")
        kind = "a whole number" if self.whole else "a number"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be {kind}{' or ' + text if text else ''}")
        if not math.isfinite(value) or (self.whole and value != int(value)):
            raise ValueError(f"must be {kind}{' or ' + text if text else ''}")
        if not self.low <= value <= self.high:
            raise ValueError(f"must lie in [{self.low:g}, {self.high:g}]")
        return int(value) if self.whole else float(value)


_AUTO = ("auto",)

# The original's keys with the meaning of the functional specification §4.11, then ours.
HYP_RULES: dict[str, Rule] = {
    "lr0": Rule(0.01, 0.0, 100.0),
    "lrf": Rule(0.1, 0.0, 1.0),
    "momentum": Rule(0.937, 0.0, 0.9999),
    "weight_decay": Rule(0.0005, 0.0, 1.0),
    "warmup_epochs": Rule(3.0, 0.0, 1e4, _AUTO),
    "warmup_momentum": Rule(0.8, 0.0, 0.9999),
    "warmup_bias_lr": Rule(0.1, 0.0, 100.0),
    "box": Rule(0.05, 0.0, 1e3),
    "cls": Rule(0.5, 0.0, 1e3),
    "cls_pw": Rule(1.0, 0.0, 1e3),
    "obj": Rule(1.0, 0.0, 1e3),
    "obj_pw": Rule(1.0, 0.0, 1e3),
    "iou_t": Rule(0.2, 0.0, 1.0),
    "anchor_t": Rule(4.0, 1.0, 100.0),
    "anchors": Rule(0, 0, 20, whole=True),
    "fl_gamma": Rule(0.0, 0.0, 10.0),
    "label_smoothing": Rule(0.0, 0.0, 0.9999),
    "hsv_h": Rule(0.015, 0.0, 1.0),
    "hsv_s": Rule(0.7, 0.0, 1.0),
    "hsv_v": Rule(0.4, 0.0, 1.0),
    "degrees": Rule(0.0, 0.0, 180.0),
    "translate": Rule(0.1, 0.0, 1.0),
    "scale": Rule(0.5, 0.0, 1.0),
    "shear": Rule(0.0, 0.0, 89.0),
    "perspective": Rule(0.0, 0.0, 0.01),
    "flipud": Rule(0.0, 0.0, 1.0),
    "fliplr": Rule(0.5, 0.0, 1.0),
    "mosaic": Rule(1.0, 0.0, 1.0),
    "mixup": Rule(0.0, 0.0, 1.0),
    "copy_paste": Rule(0.0, 0.0, 1.0),
    "paste_in": Rule(0.0, 0.0, 1.0),
    "loss_ota": Rule(1, 0, 1, whole=True),
    "nominal_batch": Rule("auto", 1, 65536, _AUTO, whole=True),
    "ema_decay": Rule("auto", 0.0, 1.0, _AUTO),
    "ema_ramp": Rule("auto", 1.0, 1e6, _AUTO),
    "clip_norm": Rule(0.0, 0.0, 1e9),
    "sp_mode": Rule("robust", words=("robust", "paper")),
    "sp_damping": Rule("none", words=("none", "diagonal")),
    "sp_saliency": Rule("fisher", words=("fisher", "damping")),
    "sp_sigma_backbone": Rule(0.0, 0.0, 0.99),
    "sp_sigma_head": Rule(0.0, 0.0, 0.99),
    "sp_every": Rule(10, 1, 1e6, whole=True),
    "sp_start": Rule(0.1, 0.0, 1.0),
    "sp_end": Rule(0.65, 0.0, 1.0),
    "sp_rho": Rule(0.9, 0.0, 0.9999),
    "sp_rcap": Rule(0.0, 0.0, 2.0),
    "sp_gamma_start": Rule(0.01, 1e-6, 1.0),
}

Hyp = Mapping[str, Any]


def _check_hyp(key: str, value: Any, where: str) -> Any:
    if key not in HYP_RULES:
        near = difflib.get_close_matches(str(key), HYP_RULES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{where}: unknown hyperparameter {key!r}{hint}")
    try:
        return HYP_RULES[key].check(value)
    except ValueError as error:
        raise UserError(f"{where}: {key} = {value!r}: {error}") from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["lr0=0.1", ...]`` of the command line's ``--set`` as a dict; values are read like YAML scalars.

    Raises:
        UserError: an item is not of the form KEY=VALUE.
    """
    result: dict[str, Any] = {}
    for item in assignments:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"--set {item}: expected KEY=VALUE")
        result[key] = text
        if key != "root":  # a path, whatever it looks like
            with contextlib.suppress(yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
                result[key] = yaml.load(text, Loader=_StrictLoader)
    return result


def load_hyp(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The hyperparameters of a recipe file, completed by defaults, with ``overrides`` (of ``--set``) on top.

    Raises:
        UserError: unknown or duplicate key, a value of the wrong type or out of its bounds; names file and line.
    """
    source = read_yaml(find_file(path, "hyp"))
    hyp: dict[str, Any] = {key: rule.default for key, rule in HYP_RULES.items()}
    for key, value in source.items():
        hyp[key] = _check_hyp(key, value, source.where(key))
    for key, value in (overrides or {}).items():
        hyp[key] = _check_hyp(key, value, "--set")
    if hyp["sp_start"] >= hyp["sp_end"]:
        raise UserError(f"{source.path}: sp_start = {hyp['sp_start']} must be below sp_end = {hyp['sp_end']}")
    return hyp


# -------------------------------------------------------------------------------------------------------------- dataset
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

    def entries(self, split: str) -> tuple[str, ...]:
        """The entries of one split; raises UserError where the YAML has none."""
        found: tuple[str, ...] | None = getattr(self, split)
        if not found:
            raise UserError(f"{self.path}: no '{split}' split is given")
        return found


def _dataset_names(source: YamlDict) -> tuple[str, ...]:
    names = source.get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
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
        root, where = Path(given).expanduser(), "--set root" if override else f"environment {variable}"
    else:
        text = source.get("root", source.get("path", "."))
        if not isinstance(text, str):
            raise UserError(f"{source.where('root')}: root must be a path, not {text!r}")
        root, where = Path(text).expanduser(), source.where("root" if "root" in source else "path")
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
        path = root / Path(entry).expanduser()
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
        folders[split] = base / Path(str(folder)).expanduser()
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


# ------------------------------------------------------------------------------------------------------------------ run
OPTIMIZERS = ("sp", "sgd", "adam", "adamw")


@dataclass(frozen=True)
class Config:
    """One training run: the original's flags under their own names, then ours; `train_sp.py --help` explains each."""

    weights: str = ""
    cfg: str | Mapping[str, Any] = ""
    data: str = "data/toy.yaml"
    hyp: str = ""
    epochs: int = 0
    batch_size: int = 0
    img_size: tuple[int, int] = (0, 0)
    rect: bool = False
    resume: str | bool = False
    nosave: bool = False
    notest: bool = False
    noautoanchor: bool = False
    cache_images: str = ""
    image_weights: bool = False
    device: str = ""
    multi_scale: bool = False
    single_cls: bool = False
    sync_bn: bool = False
    workers: int = 8
    project: str = "runs/train"
    name: str = "exp"
    exist_ok: bool = False
    quad: bool = False
    linear_lr: bool = False
    label_smoothing: float = 0.0
    save_period: int = -1
    freeze: tuple[int, ...] = (0,)
    optimizer: str = "sp"
    patience: int = 0
    seed: int = 0
    amp: str = "auto"
    compile: bool = False
    quiet: bool = False
    compat: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, as written to opt.yaml; ``Config(**as_dict())`` gives the same run back."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def load_config(**options: Any) -> Config:
    """A checked :class:`Config` from the names of its fields; lists become tuples.

    Raises:
        UserError: an unknown option, or a value outside its rule.
    """
    known = {entry.name for entry in dataclasses.fields(Config)}
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"unknown option {key!r}{f' (did you mean {near[0]!r}?)' if near else ''}")
    for key in ("img_size", "freeze"):
        if isinstance(options.get(key), int):
            options[key] = (options[key],)
        if key in options:
            options[key] = tuple(options[key])
    if len(options.get("img_size", ())) == 1:
        options["img_size"] *= 2
    if options.get("compat") and "optimizer" not in options:
        options["optimizer"] = "sgd"
    if options.get("optimizer", "").lower() in OPTIMIZERS:
        options["optimizer"] = options["optimizer"].lower()  # SGD is ours with its momentum, not torch's bare one
    config = Config(**options)
    rules = [
        (config.epochs >= 0, "--epochs", config.epochs, "must be at least 1"),
        (config.batch_size >= 0, "--batch-size", config.batch_size, "must be at least 1"),
        (len(config.img_size) == 2, "--img-size", config.img_size, "takes one or two sizes (train, test)"),
        (all(0 <= size <= 8192 for size in config.img_size), "--img-size", config.img_size, "must lie in 32..8192"),
        (config.cache_images in ("", "ram", "disk"), "--cache-images", config.cache_images, "must be ram or disk"),
        (config.workers >= 0, "--workers", config.workers, "must be 0 or more"),
        (config.amp in ("auto", "off", "bf16", "fp16"), "--amp", config.amp, "must be auto, off, bf16 or fp16"),
        (config.patience >= 0, "--patience", config.patience, "must be 0 (off) or more"),
        (0 <= config.label_smoothing < 1, "--label-smoothing", config.label_smoothing, "must lie in [0, 1)"),
        (all(layer >= 0 for layer in config.freeze), "--freeze", config.freeze, "must be 0 or more"),
        (0 <= config.seed < 2**32, "--seed", config.seed, "must lie in 0..2^32-1"),
    ]
    for good, flag, value, rule in rules:
        if not good:
            raise UserError(f"{flag} {value}: {rule}")
    return config
