"""The dense update as C (``kernels.c``); where it cannot be compiled or loaded, the torch path runs instead.

Only float32 on a CPU. No compiler is needed to install or to train.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.batch import Batch, is_dense, like_parameter
from sp_yolo.optim.damping import FISHER_FLOOR
from sp_yolo.optim.saliency import rank_inside

SOURCE = Path(__file__).with_name("kernels.c")
# -fno-math-errno: a square root that sets errno is not vectorised.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
# Elements that are worth another thread.
SHARE = 1 << 20
SUMS = 4


class Common(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("sign", "newest", "floor")),
        *((name, ctypes.c_int32) for name in ("nesterov", "fisher")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None: no compiler, or one that refuses.

    Built once per user, source, compiler and processor (-march=native), kept in the user's cache folder, or for this
    process alone where none can be written. ``CC`` names the compiler, with arguments if need be.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        folder = _cache_folder()
        shared = folder / f"kernels-{_key(compiler)}.so"
        if not shared.exists():
            _build(compiler, shared)
        kernels = ctypes.CDLL(str(shared))
    except (OSError, RuntimeError):  # the latter: the user has no home
        with tempfile.TemporaryDirectory(prefix="sp-yolo-") as own:
            try:
                kernels = ctypes.CDLL(str(_build(compiler, Path(own) / "kernels.so")))
            except (OSError, subprocess.SubprocessError):
                return None
    except subprocess.SubprocessError:
        return None
    kernels.sp_bracket.restype = ctypes.c_int64
    kernels.sp_finite.restype = ctypes.c_int64
    return kernels


def _compiler() -> list[str] | None:
    if sys.platform == "win32":
        return None
    named = shlex.split(os.environ.get("CC", ""))
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return named or (None if found is None else [found])


def _cache_folder() -> Path:
    """The user's own, made so that nobody else can put a library there.

    Raises:
        OSError: it cannot be made, or belongs to somebody else or can be written by others.
    """
    base = Path.home() / "Library/Caches" if sys.platform == "darwin" else Path.home() / ".cache"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or base) / "sp-yolo"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _key(compiler: Sequence[str]) -> str:
    """What the library depends on: source, flags, the compiler file and the processor's instructions."""
    binary = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    about = binary.stat()
    parts = [*compiler, *FLAGS, str(binary), str(about.st_size), str(about.st_mtime_ns), platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        parts += [next(line for line in lines if line.startswith(("flags", "Features")))]
    except (OSError, StopIteration):
        parts += [platform.processor()]
    return hashlib.sha256(SOURCE.read_bytes() + "\0".join(parts).encode()).hexdigest()[:16]


def _build(compiler: Sequence[str], shared: Path) -> Path:
    """Compile next to ``shared`` and rename: another process never loads half a file."""
    with tempfile.TemporaryDirectory(dir=shared.parent) as folder:
        made = Path(folder) / "kernels.so"
        subprocess.run(
            [*compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"], check=True, capture_output=True, timeout=300
        )
        made.replace(shared)
    return shared


def supports(batch: Batch) -> bool:
    """Dense float32 parameters on a CPU."""
    first = batch.params[0]  # a batch is of one device and dtype
    return first.device.type == "cpu" and first.dtype == torch.float32 and all(map(is_dense, batch.params))


class Native:
    """The native path: tables of addresses for the kernels, made once for a batch."""

    name = "native"

    def __init__(self, batch: Batch, kernels: ctypes.CDLL) -> None:
        self.batch, self.kernels = batch, kernels
        self.count, self.elements = len(batch.params), sum(batch.sizes)
        self.columns = 9
        rows: list[int] = []
        for param, state, size, length in zip(batch.params, batch.states, batch.sizes, batch.lengths, strict=True):
            addresses = [state[n].data_ptr() if n in state else 0 for n in ("square_avg", "mask", "displacement")]
            rows += (param.data_ptr(), state["momentum_buffer"].data_ptr(), *addresses, size, 0, length, 0)
        self.table = (ctypes.c_int64 * len(rows))(*rows)
        self.scales = torch.tensor(batch.scales, dtype=torch.float64)
        self.sizes = torch.tensor(batch.sizes, dtype=torch.float64)
        self.spans = batch.spans
        self.settings = (ctypes.c_float * (4 * self.count))()
        self.strides = [param.stride() for param in batch.params]
        self.grads: list[Tensor] = []
        self.addresses: Any = None

    def products(self, check: bool) -> tuple[Tensor, bool]:
        """<s, g> of each tensor, float64, and whether all gradients are finite (True when not to ``check``)."""
        batch = self.batch
        self.grads = [
            g if g.stride() == stride and g.dtype == torch.float32 else like_parameter(g.float(), p)
            for g, p, stride in zip(batch.grads, batch.params, self.strides, strict=True)
        ]
        self.addresses = (ctypes.c_int64 * self.count)(*[g.data_ptr() for g in self.grads])
        self._fill(6, batch.starts(-1))
        found = torch.empty(self.count, dtype=torch.float64)
        self.kernels.sp_products(
            self.table, self.addresses, ctypes.c_int64(self.count), ctypes.c_void_p(found.data_ptr())
        )
        finite = True
        if check:
            finite = all(self._share_out(lambda first, last: self.kernels.sp_finite(*self._arguments(first, last))))
        found.mul_(self.scales)
        return (found.neg_() if batch.maximize else found), finite

    def update(self, gamma: Tensor) -> None:
        """One step of every tensor, as the single-tensor path."""
        batch = self.batch
        self._fill(8, batch.starts(0))
        common = Common(
            -1.0 if batch.maximize else 1.0,
            float(batch.newest_weight()),
            FISHER_FLOOR,
            int(batch.nesterov),
            int(batch.fisher),
        )
        settings = self._settings(gamma.item())

        def call(first: int, last: int) -> Tensor:
            sums = torch.zeros(self.count, SUMS, dtype=torch.float64)
            self.kernels.sp_update(
                *self._arguments(first, last), settings, ctypes.byref(common), ctypes.c_void_p(sums.data_ptr())
            )
            return sums

        parts = self._share_out(call)
        sums = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        batch.secants[:, :SUMS] = sums.mul_(self.scales[:, None])
        for group, first, last in self.spans if batch.fisher else ():
            batch.secants[first:last, 0] /= 1.0 - group["momentum"]
        batch.secants[:, SUMS] = self.sizes
        self.grads = []

    def _fill(self, column: int, values: list[int]) -> None:
        self.table[column :: self.columns] = values  # type: ignore[assignment]

    def _settings(self, gamma: float) -> Any:
        """Table of (momentum, L2 decay, factor of decoupled decay, lr gamma), one row a tensor."""
        for group, first, last in self.spans:
            lr, decay = float(group["lr"]) * gamma, float(group["weight_decay"])
            own = (0.0, 1.0 - lr * decay) if self.batch.decoupled else (decay, 1.0)
            self.settings[4 * first : 4 * last] = [float(group["momentum"]), *own, lr] * (last - first)
        return self.settings

    def _share_out(self, call: Callable[[int, int], Any]) -> list[Any]:
        """``call(first, last)`` for about equal parts of all elements in a row, one per torch thread."""
        threads = max(min(torch.get_num_threads(), self.elements // SHARE), 1)
        bounds = [self.elements * part // threads for part in range(threads + 1)]
        if threads == 1:
            return [call(0, self.elements)]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(call, bounds, bounds[1:]))

    def _arguments(self, first: int, last: int) -> tuple[Any, ...]:
        return self.table, self.addresses, *map(ctypes.c_int64, (self.count, first, last))


def keep(
    kernels: ctypes.CDLL,
    tensors: Sequence[tuple[Tensor, Tensor | None, Tensor | None]],
    n: int,
    count: int,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor] | None:
    """``saliency.keep_blocks`` of 0.5 h x^2, held weights first, from float32 rows (x, h or None, mask or None)."""
    keep = torch.empty(n, dtype=torch.bool)
    # Room for all, of which the system gives what is used.
    values, places = torch.empty(n), torch.empty(n, dtype=torch.int64)
    at_most_low, found, offset = ctypes.c_int64(0), 0, 0
    for row in tensors:
        size = row[0].numel()
        ends = (keep.data_ptr() + offset, values.data_ptr() + 4 * found, places.data_ptr() + 8 * found)
        more = kernels.sp_bracket(
            *[ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in row],
            ctypes.c_int64(size),
            ctypes.c_float(low),
            ctypes.c_float(high),
            *map(ctypes.c_void_p, ends),
            ctypes.byref(at_most_low),
        )
        places[found : found + more] += offset
        found, offset = found + more, offset + size
    ranked = rank_inside(values[:found], count - at_most_low.value)
    if ranked is None:
        return None
    keep[places[:found]] = ranked[0]
    return keep, ranked[1]
