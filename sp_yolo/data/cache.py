"""Resized images kept in memory, as far as they fit, or on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

MEMORY_SHARE = 0.5  # of the free memory: the rest is the model's and the page cache's
AUTO_SHARE = 0.1  # below this share of the free memory nobody needs to be asked
_GIB = 2**30
UNKNOWN_MEMORY = 2 * _GIB  # where the system does not say (Windows)

Load = Callable[[int], np.ndarray]


def free_memory() -> int:
    """Bytes that can be taken without swapping: the kernel's estimate, within the limit of the control group."""
    if not hasattr(os, "sysconf"):
        return UNKNOWN_MEMORY
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, StopIteration, ValueError):
        return free
    return min(free, int(limit) - used) if limit.isdecimal() else free


class MemoryCache:
    """The first images of a dataset that fit into ``budget`` bytes, loaded at once by threads; the others on demand.

    ``load(index)`` makes the image; ``sizes`` are the bytes of each. ``note`` says in one line what was kept,
    ``complete`` whether that is all.
    """

    def __init__(self, load: Load, sizes: Sequence[int], budget: int) -> None:
        total = np.cumsum(np.asarray(sizes, np.int64))
        count = int(np.searchsorted(total, budget, side="right"))
        self._load = load
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            self._images = list(pool.map(load, range(count)))
        need = int(total[-1]) if len(total) else 0
        self.complete = count == len(sizes)
        self.note = f"{count} images cached in memory ({need / _GIB:.2f} GiB)"
        if not self.complete:
            self.note = (
                f"images need {need / _GIB:.2f} GiB, {budget / _GIB:.2f} GiB of memory may be used: "
                f"{count} of {len(sizes)} cached"
            )

    def __call__(self, index: int) -> np.ndarray:
        return self._images[index] if index < len(self._images) else self._load(index)


class DiskCache:
    """One npy file per image in ``folder``, written when first used. The name holds the source file's size and time
    and ``variant`` (how it was resized), so that a changed image is never taken from the cache."""

    def __init__(self, load: Load, paths: Sequence[str], sizes: Sequence[int], folder: Path, variant: str) -> None:
        self._load, self._paths, self._folder, self._variant = load, paths, folder, variant
        need = int(sum(sizes))
        self.note = f"images are cached in {folder} ({need / _GIB:.2f} GiB)"
        self._usable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fits = os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 1.1 * need
        except OSError:
            fits = False
        if not fits:
            self.note = f"{folder}: not writable, or less than {need / _GIB:.2f} GiB free: images are not cached"
            self._usable = False

    def __call__(self, index: int) -> np.ndarray:
        if not self._usable:
            return self._load(index)
        try:
            status = os.stat(self._paths[index])
        except OSError:
            return self._load(index)  # which says what is the matter
        key = f"{self._paths[index]}|{status.st_size}|{status.st_mtime_ns}|{self._variant}"
        kept = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        try:
            return np.load(kept, allow_pickle=False)
        except (OSError, ValueError, EOFError):  # absent, or damaged: made again
            image = self._load(index)
            self._store(kept, image)
            return image

    def _store(self, kept: Path, image: np.ndarray) -> None:
        """Written beside and renamed: workers race, and a half-written file must never be read. A full disk is no
        reason to stop: the image was loaded."""
        try:
            descriptor, temporary = tempfile.mkstemp(dir=self._folder, suffix=".part")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    np.save(file, image)
                os.replace(temporary, kept)
            except OSError:
                os.unlink(temporary)
        except OSError:
            self._usable = False
