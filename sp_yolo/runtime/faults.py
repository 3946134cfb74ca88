"""What torch and the system raise -> one line of ours with its exit code (docs/faults.md)."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence

import torch

from sp_yolo.errors import EnvironmentFault, StorageError

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_MACHINE = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}
# Neither has a type of its own in torch.
_MEMORY_WORDS = ("can't allocate memory", "out of memory", "not enough memory", "ALLOC_FAILED", "Insufficient memory")
_NOT_DETERMINISTIC = " does not have a deterministic implementation"
_RANK_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextlib.contextmanager
def explained(batch_size: int, image_size: int, processes: int) -> Iterator[None]:
    """Turn memory, storage and lost processes into our errors; anything else passes as it is.

    ``batch_size`` images over all ``processes``, ``image_size`` px: what the user can lower.
    """
    try:
        yield
    except MemoryError as error:
        raise EnvironmentFault(_memory_words(batch_size, image_size, str(error))) from None
    except OSError as error:
        if error.errno in _STORAGE:
            raise StorageError(f"{error.filename or 'a file of the run'}: {error.strerror}") from None
        if error.errno in _MACHINE:
            raise EnvironmentFault(f"the system refuses: {error.strerror}; try fewer --workers") from None
        if processes > 1 and isinstance(error, ConnectionError):
            raise EnvironmentFault(_rank_words(str(error))) from None
        raise
    except RuntimeError as error:  # torch.OutOfMemoryError and torch.distributed's errors are such
        text = str(error)
        if is_out_of_memory(error):
            raise EnvironmentFault(_memory_words(batch_size, image_size, text)) from None
        if _NOT_DETERMINISTIC in text:
            raise EnvironmentFault(
                f"--deterministic: {text.partition(_NOT_DETERMINISTIC)[0]}: torch has no such form"
            ) from None
        if "Duplicate GPU detected" in text:
            raise EnvironmentFault("two processes were given one GPU: start as many as there are GPUs") from None
        if processes > 1 and any(word in text for word in _RANK_WORDS):
            raise EnvironmentFault(_rank_words(text)) from None
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: the machine's, the GPU's, that of a library on it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _MEMORY_WORDS)


def out_of_memory_words(error: BaseException, flags: Sequence[str]) -> str:
    """One line about ``error``, of a command that needs less memory with a smaller value of one of its ``flags``."""
    advice = f": try a smaller {' or '.join(flags)}" if flags else ""
    return f"out of memory{_asked_for(str(error))}{advice}"


def _memory_words(batch_size: int, image_size: int, text: str) -> str:
    smaller = f"--batch-size {batch_size // 2}" if batch_size > 1 else f"--img-size {max(image_size // 64 * 32, 32)}"
    return f"out of memory at --batch-size {batch_size} and --img-size {image_size}{_asked_for(text)}: try {smaller}"


def _asked_for(text: str) -> str:
    asked = text.partition("ried to allocate ")[2].partition(". ")[0]
    return f" (asked for {asked})" if asked else ""


def _rank_words(text: str) -> str:
    reason = text.strip().splitlines()[0][:160] if text.strip() else "no answer"
    return f"another process of this run ended, so this one ends too; its own message says why ({reason})"
