"""Checkpoints: tensors, numbers and words only, written so that a crash at any moment leaves a whole file."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from sp_yolo.errors import StorageError, UserError

FORMAT = "sp-yolo"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to a temporary file beside ``path``, flush it to the disk, then rename it over ``path``.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the file at ``path`` is then the previous one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({**content, "format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise StorageError(
            f"{path}: checkpoint could not be written ({reason}); the previous file is untouched"
        ) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours without running anything from it; tensors arrive on the CPU.

    Raises:
        UserError: no such file, or a file that is no checkpoint of this program.
        StorageError: the file is truncated or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares every entry with its checksum
        if damaged:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a checkpoint of this program (use it as --weights to start from it)") from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise StorageError(f"{path}: the checkpoint is damaged ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this program (use it as --weights to start from it)")
    return content
