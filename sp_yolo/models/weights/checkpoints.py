"""Checkpoint files -> their content, without running anything they contain."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sp_yolo.errors import StorageError, UserError
from sp_yolo.models.weights.origins import asked_classes, describe_file, describe_program, missing_words
from sp_yolo.models.weights.pickles import PickleRefused, StandIn, StorageType, read_pickle
from sp_yolo.models.weights.tensors_file import read_tensors

MAX_PICKLE_BYTES = 1 << 26  # the pickle of the largest model has 1 MB; its numbers lie outside it
MAX_MODULES, MAX_DEPTH = 100_000, 32


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read a file written by ``torch.save`` (zip format) or a ``.safetensors`` file, on the CPU.

    Returns the saved object, usually a dict: numbers, text, containers, tensors, numpy arrays. Objects of model code
    (the original pickles whole modules) come as inert StandIn; see ``module_state``.

    Raises:
        UserError: no such file, not a checkpoint, or asking for code to be run (nothing was run).
        StorageError: the archive is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {missing_words(path)}")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not a checkpoint: {describe_file(path)}")
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path)
    except PickleRefused as error:
        raise UserError(f"{path}: refused, nothing in it was run: {error}") from None
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise StorageError(f"{path}: damaged checkpoint: {error}") from None


def _read_archive(archive: zipfile.ZipFile, path: Path) -> Any:
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise PickleRefused(f"it has {len(pickles)} entries data.pkl instead of one")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise PickleRefused("it is an exported TorchScript program, not a checkpoint")
    storages: dict[str, bytearray] = {}
    budget = path.stat().st_size

    def read(name: str, limit: int) -> bytearray:
        info = entries.get(name)
        if info is None:
            raise PickleRefused(f"it has no entry {name}")
        # torch stores, never compresses: so no entry can hold more than the file itself.
        if info.file_size != info.compress_size or info.file_size > limit:
            raise PickleRefused(f"its entry {name} claims {info.file_size} bytes")
        return bytearray(archive.read(info))

    if f"{prefix}byteorder" in entries and read(f"{prefix}byteorder", 16) != b"little":
        raise PickleRefused("its numbers are not little-endian")

    def load_storage(identity: Any) -> Tensor:
        nonlocal budget
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise PickleRefused("it refers to something that is not a storage")
        _, kind, key, _, count = identity
        if not isinstance(kind, StorageType) or type(key) is not str or type(count) is not int or count < 0:
            raise PickleRefused("it refers to a storage in an unknown form")
        if key not in storages:
            storages[key] = read(f"{prefix}data/{key}", budget)
            budget -= len(storages[key])
        if count * kind.dtype.itemsize > len(storages[key]):
            raise PickleRefused(f"storage {key} claims {count} numbers and has {len(storages[key])} bytes")
        if count == 0:
            return torch.empty(0, dtype=kind.dtype)
        return torch.frombuffer(storages[key], dtype=kind.dtype, count=count)

    data = bytes(read(pickles[0], MAX_PICKLE_BYTES))
    try:
        return read_pickle(data, load_storage)
    except PickleRefused as error:
        program = describe_program(asked_classes(data))
        raise PickleRefused(f"{program} ({error})" if program else str(error)) from None


def module_state(module: StandIn) -> dict[str, Tensor]:
    """The state_dict of a pickled module.

    Raises:
        PickleRefused: its parameters or submodules are not what a module has.
    """
    state: dict[str, Tensor] = {}
    pending: list[tuple[str, StandIn]] = [("", module)]
    visited = 0
    while pending:
        prefix, current = pending.pop()
        visited += 1
        if visited > MAX_MODULES or prefix.count(".") > MAX_DEPTH:  # modules that contain each other
            raise PickleRefused("its modules never end")
        for group in ("_parameters", "_buffers"):
            for name, value in _members(current, group):
                if value is not None and not isinstance(value, Tensor):
                    raise PickleRefused(f"{prefix}{name} is not a tensor")
                if value is not None:
                    state[prefix + name] = value
        children = [(f"{prefix}{name}.", child) for name, child in _members(current, "_modules") if child is not None]
        if not all(isinstance(child, StandIn) for _, child in children):
            raise PickleRefused(f"a part of {prefix or 'the model'} is not a module")
        pending.extend(reversed(children))
    return state


def classes_of(module: StandIn) -> list[str]:
    """Dotted class names of a pickled module and its parts, as far as they are modules."""
    kinds: list[str] = []
    pending = [module]
    while pending and len(kinds) < MAX_MODULES:
        current = pending.pop()
        kinds.append(current.kind)
        pending.extend(child for _, child in _members(current, "_modules") if isinstance(child, StandIn))
    return kinds


def _members(module: StandIn, group: str) -> list[tuple[str, Any]]:
    members = module.state.get(group)
    if members is None:
        return []
    if not isinstance(members, dict) or not all(isinstance(name, str) for name in members):
        raise PickleRefused(f"{module.kind} has no usable {group}")
    return list(members.items())
