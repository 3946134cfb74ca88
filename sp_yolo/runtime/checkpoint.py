"""Checkpoints: tensors, numbers and words only, written so that a crash at any moment leaves a whole file."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from sp_yolo.errors import StorageError, UserError
from sp_yolo.models import read_checkpoint

FORMAT = "sp-yolo"
LAST, PREVIOUS = "last.pt", "last.prev.pt"
_FOREIGN = "not a checkpoint of this program (use it as --weights to start from it)"


def save_checkpoint(path: Path, content: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, read it back, then rename it over ``path``.

    With ``keep_previous`` the file that was at ``path`` stays as ``last.prev.pt``, if it is whole.

    Raises:
        StorageError: disk full or damaged, or the folder cannot be written; the files are then the previous ones.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(_on_cpu({**content, "format": FORMAT}), file)
            file.flush()
            os.fsync(file.fileno())
        _verify(temporary, from_disk=True)
        if keep_previous:
            _keep(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch hides what the disk said
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause).splitlines()[0]
        raise StorageError(
            f"{path}: checkpoint could not be written ({reason}); the previous file is untouched"
        ) from None
    finally:  # also after a second Ctrl-C
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _on_cpu(content: Any) -> Any:
    """``content`` without a word of the device it lived on: torch.load opens the file on any machine."""
    if isinstance(content, torch.Tensor):
        return content.cpu()
    if isinstance(content, dict):
        return {key: _on_cpu(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_on_cpu(value) for value in content)
    return content


def _verify(path: Path, *, from_disk: bool = False) -> None:
    """Compare every entry of an archive with its checksum; ``from_disk``: past the page cache, where the system can.

    Raises:
        zipfile.BadZipFile: it is damaged. OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def _keep(path: Path) -> None:
    """Give the file at ``path`` its second name. A damaged one must not replace the whole one before it."""
    try:
        _verify(path)
    except (OSError, zipfile.BadZipFile):  # absent or damaged
        return
    link = path.with_name(f".{PREVIOUS}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)  # a link and not a rename: ``path`` is there at every moment
        os.replace(link, path.with_name(PREVIOUS))
        link.unlink(missing_ok=True)  # renaming a file over itself leaves both names
    except OSError:  # a file system without hard links
        os.replace(path, path.with_name(PREVIOUS))


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders; NTFS keeps a journal of its own
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours without running anything from it; tensors arrive on the CPU.

    Raises:
        UserError: no such file, or a file that is no checkpoint of this program.
        StorageError: the file is truncated or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        _verify(path)
        content = read_checkpoint(path)
    except UserError:
        raise UserError(f"{path}: {_FOREIGN}") from None
    except StorageError:
        raise
    except Exception as error:  # zipfile raises almost anything on a damaged file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise StorageError(f"{path}: the checkpoint is damaged ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: {_FOREIGN}")
    return content


def load_last_whole(path: Path) -> tuple[dict[str, Any], str]:
    """The checkpoint at ``path``, or the previous one where ``last.pt`` is damaged or gone; a line to say or "".

    Raises:
        UserError, StorageError: as :func:`load_checkpoint`, of ``path``, when there is no whole previous one.
    """
    try:
        return load_checkpoint(path), ""
    except (StorageError, UserError) as fault:
        previous = path.with_name(PREVIOUS)
        if path.name != LAST or not previous.is_file() or (isinstance(fault, UserError) and path.exists()):
            raise
        try:
            content = load_checkpoint(previous)
        except (StorageError, UserError):
            raise fault from None
        return content, f"{fault}; going on from the previous one, {PREVIOUS}"


def newest_checkpoint(folder: Path) -> Path:
    """The newest ``last*.pt`` below ``folder``, for ``--resume`` without a path.

    Raises:
        UserError: there is none.
    """
    found = [path for path in folder.resolve().glob("**/last*.pt") if path.parent.name == "weights" and path.is_file()]
    if not found:
        raise UserError(f"--resume: no weights/last.pt below {folder}")
    newest = max(found, key=lambda path: (path.stat().st_mtime_ns, path.name == LAST))
    return newest.with_name(LAST) if newest.name == PREVIOUS else newest


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had half-written into ``folder``."""
    for leftover in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()
