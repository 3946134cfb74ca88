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

from sp_yolo.data.shared import SharedBlock

MEMORY_SHARE = 0.5  # of the free memory: the rest is the model's and the page cache's
AUTO_SHARE = 0.1  # below this share of the free memory, or disk, nobody needs to be asked
FOLDER = ".image_cache"
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

    ``load(index)`` makes the image, uint8 [h, w, 3]; ``sizes_wh`` [n, 2] px says how large each is. They lie in one
    block that every loader process sees. ``note`` says in one line what was kept, ``complete`` whether that is all.
    """

    def __init__(self, load: Load, sizes_wh: np.ndarray, budget: int) -> None:
        self._load, self._sizes_wh = load, sizes_wh
        ends = np.cumsum(_bytes_each(sizes_wh))
        count = int(np.searchsorted(ends, budget, side="right"))
        self._starts = np.concatenate(([0], ends[:count]))
        self._block = SharedBlock(int(self._starts[-1]))
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            list(pool.map(self._fill, range(count)))
        need = int(ends[-1]) if len(ends) else 0
        self.complete = count == len(ends)
        self.note = f"{count} images cached in memory ({need / _GIB:.2f} GiB)"
        if not self.complete:
            self.note = (
                f"images need {need / _GIB:.2f} GiB, {budget / _GIB:.2f} GiB of memory may be used: "
                f"{count} of {len(ends)} cached"
            )

    def __call__(self, index: int) -> np.ndarray:
        if index >= len(self._starts) - 1:
            return self._load(index)
        image = self._view(index)
        image.flags.writeable = False  # every process sees it, in every epoch
        return image

    def _fill(self, index: int) -> None:
        self._view(index)[:] = self._load(index)

    def _view(self, index: int) -> np.ndarray:
        width, height = self._sizes_wh[index]
        start, end = self._starts[index : index + 2]
        return self._block.bytes[start:end].reshape(height, width, 3)


class DiskCache:
    """One npy file per image in ``folder``, written when first used. The name holds the source file's size and time
    and ``variant`` (how it was resized), so that a changed image is never taken from the cache."""

    def __init__(self, load: Load, paths: Sequence[str], need: int, folder: Path, variant: str) -> None:
        self._load, self._paths, self._folder, self._variant = load, paths, folder, variant
        self.note = f"images are cached in {folder} ({need / _GIB:.2f} GiB)"
        self._usable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fits = os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 1.1 * (need - bytes_in(folder))
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


def open_cache(
    kind: bool | str,
    load: Load,
    paths: Sequence[str],
    sizes_wh: np.ndarray,
    root: Path,
    variant: str,
    *,
    processes: int,
    often: bool,
) -> MemoryCache | DiskCache | str:
    """The cache of a split's resized images, or why there is none, in one line.

    ``kind``: True (memory, as far as it fits), "disk", or "auto": memory where that takes a tenth of what is free;
    else, for a split whose images are wanted ``often``, the disk where that takes a tenth of what is free there and
    half of the free memory, as files that are not held in memory are read more slowly than JPEGs are decoded.
    ``processes`` on this machine keep images in memory each for themselves. ``root``: the dataset's folder.
    """
    need, free = int(_bytes_each(sizes_wh).sum()), free_memory()
    if kind is True or (kind == "auto" and need <= AUTO_SHARE * free / processes):
        return MemoryCache(load, sizes_wh, int(MEMORY_SHARE * free / processes))
    folder = cache_folder(root) / hashlib.sha256(variant.encode()).hexdigest()[:8]
    if kind == "auto":
        if not often:
            return ""
        if need > MEMORY_SHARE * free or need - bytes_in(folder) > AUTO_SHARE * _free_disk(folder):
            return f"images are not cached: resized they take {need / _GIB:.2f} GiB (--cache disk keeps them on disk)"
    return DiskCache(load, paths, need, folder, variant)


def cache_folder(root: Path) -> Path:
    """Where resized images of the data in ``root`` are kept: beside them or, where nothing can be written, in the
    user's cache folder."""
    beside = root / FOLDER
    if os.access(beside if beside.exists() else root, os.W_OK):
        return beside
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sp-yolo" / "images" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]


def bytes_in(folder: Path) -> int:
    """Of the files that are in a folder; 0 where there is none."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries)
    except OSError:
        return 0


def _free_disk(folder: Path) -> int:
    """Of the file system that ``folder`` is or would be on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _bytes_each(sizes_wh: np.ndarray) -> np.ndarray:
    return 3 * np.asarray(sizes_wh, np.int64).reshape(-1, 2).prod(1)
