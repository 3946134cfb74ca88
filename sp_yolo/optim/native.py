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
        of_group = [index for index, (_, first, last) in enumerate(batch.spans) for _ in range(first, last)]
        rows: list[int] = []
        for i, (param, state) in enumerate(zip(batch.params, batch.states, strict=True)):
            addresses = [state[n].data_ptr() if n in state else 0 for n in ("square_avg", "mask", "displacement")]
            rows += (param.data_ptr(), state["momentum_buffer"].data_ptr(), *addresses)
            rows += (batch.sizes[i], of_group[i], batch.places[i], batch.lengths[i])
        self.table = (ctypes.c_int64 * len(rows))(*rows)
        self.settings = (ctypes.c_float * (4 * len(batch.spans)))()
        self.strides = [param.stride() for param in batch.params]
        self.found = torch.empty(self.count, dtype=torch.float64)
        self.grads: list[Tensor] = []
        self.addresses: Any = None

    def take(self, check: bool) -> bool:
        """Take this step's gradients; whether all are finite (True when not to ``check``)."""
        batch = self.batch
        self.grads = batch.grads
        if [g.stride() for g in self.grads] != self.strides or any(g.dtype != torch.float32 for g in self.grads):
            self.grads = [like_parameter(g.float(), p) for g, p in zip(batch.grads, batch.params, strict=True)]
        self.addresses = (ctypes.c_int64 * self.count)(*[g.data_ptr() for g in self.grads])
        if not check:
            return True
        return all(self._share_out(lambda first, last: self.kernels.sp_finite(*self._arguments(first, last))))

    def products(self) -> Tensor:
        """<s, g> on each tensor's run, float64."""
        count, turn = ctypes.c_int64(self.count), ctypes.c_int64(max(self.batch.step - 1, 0))
        found = ctypes.c_void_p(self.found.data_ptr())
        self.kernels.sp_products(self.table, self.addresses, count, turn, found)
        return self.found

    def update(self, gamma: float) -> None:
        """One step of every tensor, as the single-tensor path."""
        batch, turn = self.batch, ctypes.c_int64(self.batch.step)
        sign = -1.0 if batch.maximize else 1.0
        newest = float(batch.newest_weight())
        common = Common(sign, newest, FISHER_FLOOR, int(batch.nesterov), int(batch.fisher))
        settings = self._settings(gamma)

        def call(first: int, last: int, secants: Tensor) -> Tensor:
            out = ctypes.c_void_p(secants.data_ptr())
            self.kernels.sp_update(*self._arguments(first, last), turn, settings, ctypes.byref(common), out)
            return secants

        if self._threads() == 1:
            call(0, self.elements, batch.secants)
        else:
            parts = self._share_out(lambda first, last: call(first, last, torch.empty_like(batch.secants)))
            batch.secants.copy_(torch.stack(parts).sum(0))
        self.grads = []

    def _settings(self, gamma: float) -> Any:
        """Table of (momentum, L2 decay, factor of decoupled decay, lr gamma), one row a group."""
        rows: list[float] = []
        for group, _, _ in self.batch.spans:
            lr, decay = float(group["lr"]) * gamma, float(group["weight_decay"])
            own = (0.0, 1.0 - lr * decay) if self.batch.decoupled else (decay, 1.0)
            rows += [float(group["momentum"]), *own, lr]
        self.settings[:] = rows  # type: ignore[assignment]
        return self.settings

    def _threads(self) -> int:
        return max(min(torch.get_num_threads(), self.elements // SHARE), 1)

    def _share_out(self, call: Callable[[int, int], Any]) -> list[Any]:
        """``call(first, last)`` for about equal parts of all elements in a row, one per torch thread."""
        threads = self._threads()
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


def zero(kernels: ctypes.CDLL, x: Tensor, mask: Tensor) -> None:
    """x = 0 where the mask is False, in place. Dense float32 and bool of one memory order."""
    rows = map(ctypes.c_void_p, (x.data_ptr(), mask.data_ptr()))
    kernels.sp_zero(*rows, ctypes.c_int64(x.numel()))
