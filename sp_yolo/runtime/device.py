"""Which device, which precision, which memory layout: probed once, said once."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from sp_yolo.errors import EnvironmentFault, UserError


@dataclass(frozen=True)
class Compute:
    """Where and how the numbers are computed. ``amp`` is the autocast dtype, None for full float32."""

    device: torch.device
    amp: torch.dtype | None
    words: str

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp)

    def peak_memory(self) -> int:
        """Peak bytes so far: of the GPU's allocator, or of this process on a CPU; 0 where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Stopwatch:
    """Seconds of the ``stages`` of a loop, a GPU's by events: it waits for none before :meth:`seconds`.

    A GPU's work is only queued when a call returns: a clock of the host would give it to the stage that waits for it.
    """

    def __init__(self, device: torch.device, *stages: str) -> None:
        self._stages = stages
        self._event: Any = {"cuda": torch.cuda.Event, "mps": torch.mps.Event}.get(device.type)
        self._marks: list[tuple[str, Any]] = []

    def mark(self, stage: str = "") -> None:
        """``stage`` ends here, and began at the mark before; "": what came before is nobody's."""
        moment: Any = time.perf_counter()
        if self._event:
            moment = self._event(enable_timing=True)
            moment.record()
        self._marks.append((stage, moment))

    def seconds(self) -> dict[str, float]:
        """By stage, all its turns together."""
        if self._event and self._marks:
            self._marks[-1][1].synchronize()
        sums = dict.fromkeys(self._stages, 0.0)
        for (_, begun), (stage, ended) in itertools.pairwise(self._marks):
            if stage:
                sums[stage] += begun.elapsed_time(ended) / 1000 if self._event else ended - begun
        return sums


def _cpu_has_bf16() -> bool:
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors free instead of giving it back to the kernel. True where that can be set.

    Every step frees and takes the same blocks again. glibc maps large ones anew each time, and the kernel then zeroes
    them page by page: a tenth of a training step on a CPU (docs/speed.md). The peak is not raised: what a step needed
    once it needs again. Elsewhere than in glibc nothing is done.
    """
    trim_threshold, most_mapped_blocks = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none that ctypes can open
        return False
    return bool(set_option(trim_threshold, 2**31 - 1) and set_option(most_mapped_blocks, 0))


def select_device(text: str, local_rank: int = 0, processes: int = 1) -> torch.device:
    """The device of ``--device``: '' picks CUDA when there is one, 'cpu', 'mps', GPUs ('0', 'cuda', 'cuda:1', '0, 1').

    Of several ``processes`` each takes the GPU at its ``local_rank``, of those named or of all; the one GPU that there
    is where a launcher shows each process its own.

    Raises:
        UserError: words that name no device, or not one for each process. EnvironmentFault: the device is not there.
    """
    names = [name.strip().removeprefix("cuda:") for name in text.lower().split(",")]
    if names == ["cpu"] or (names == [""] and not torch.cuda.is_available()):
        return torch.device("cpu")
    if names == ["mps"]:
        if processes > 1:
            raise UserError("--device mps: an Apple GPU serves one process")
        if not torch.backends.mps.is_available():
            raise EnvironmentFault("--device mps: no Apple GPU is available to torch")
        return torch.device("mps")
    present = torch.cuda.device_count()
    if names in ([""], ["cuda"]):
        names = [str(index) for index in range(present if processes > 1 else 1)]
    if not all(name.isdecimal() for name in names):
        raise UserError(f"--device {text}: expected cpu, mps, or a GPU number such as 0 (of those torch is shown)")
    if processes == 1 and len(names) > 1:
        start = f"python -m torch.distributed.run --nproc-per-node {len(names)} train_sp.py ..."
        raise UserError(f"--device {text}: a process takes one GPU; to train on all of them: {start}")
    if processes > 1 and present == 1:
        return torch.device("cuda", 0)  # two processes that share it in truth are found out by nccl
    if local_rank >= len(names):
        raise UserError(f"--device {text}: {len(names)} GPUs, none for process {local_rank} of this machine")
    index = int(names[local_rank])
    if index >= present:
        raise EnvironmentFault(f"--device {text}: {present} CUDA devices are available to torch")
    return torch.device("cuda", index)


def select_compute(
    device_text: str, amp_text: str, local_rank: int = 0, processes: int = 1, *, deterministic: bool = False
) -> Compute:
    """Device and autocast type for ``--device`` and ``--amp auto|off|bf16|fp16``.

    ``deterministic``: a GPU gives the same bits each time too, or refuses; see :func:`_make_deterministic`.
    """
    device = select_device(device_text, local_rank, processes)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for libraries that are not told
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)  # of this run, not of one before it in this process
        torch.backends.cudnn.benchmark = True  # but see searched_convolutions
        if deterministic:
            _make_deterministic()
        where = torch.cuda.get_device_name(device)
        fast = _fast_type(where)
    else:
        keep_freed_memory()
        fast = torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else None
        where = f"{device.type}, {torch.get_num_threads()} threads"
    if amp_text == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16: needs a CUDA device, this run uses {device.type}")
    amp: torch.dtype | None = {"auto": fast, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp_text]
    words = f"autocast {str(amp).removeprefix('torch.')}" if amp else _full_precision(device)
    same = ", deterministic" if deterministic and device.type == "cuda" else ""
    return Compute(device, amp, f"{where}, {words}, channels_last{same}")


def _fast_type(name: str) -> torch.dtype | None:
    """What ``--amp auto`` is on the GPU of this ``name``: float16 gives NaN in convolutions of the GTX 16 series."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return None if "GTX 16" in name else torch.float16


def _full_precision(device: torch.device) -> str:
    """What ``--amp off`` is. torch rounds what cuDNN multiplies to TF32 (10 bits) where the GPU has it; so be it."""
    rounds = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)
    return "float32 with TF32 convolutions" if rounds else "float32"


@contextlib.contextmanager
def searched_convolutions(shapes_repeat: bool) -> Iterator[None]:
    """Within it cuDNN tries all its algorithms on a shape that is new to it only if ``shapes_repeat``.

    A search costs many convolutions: worth it for the one shape of a training, not for each shape of rect batches.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before and shapes_repeat
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _make_deterministic() -> None:
    """Only operations that give the same bits each time; torch raises RuntimeError for one that has no such form.

    Source: https://pytorch.org/docs/stable/notes/randomness.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix is multiplied
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # its choice hangs on what was faster at the time
