"""Which device, which precision, which memory layout: probed once, said once."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import dataclass

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
    """The device of ``--device``: '' picks CUDA when there is one, 'cpu', an index ('0', 'cuda:1'), 'mps'.

    Of several ``processes`` each takes the GPU at its ``local_rank``, of the list ('0,1') or of all.

    Raises:
        UserError: words that name no device, or not one for each process. EnvironmentFault: the device is not there.
    """
    name = text.strip().lower().removeprefix("cuda:")
    if name == "cpu" or (name == "" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise EnvironmentFault("--device mps: no Apple GPU is available to torch")
        return torch.device("mps")
    indices = name.split(",")
    if name in ("", "cuda"):
        indices = [str(index) for index in range(torch.cuda.device_count() if processes > 1 else 1)]
    if not all(index.isdecimal() for index in indices):
        raise UserError(f"--device {text}: expected cpu, mps, or a GPU number such as 0")
    if processes == 1 and len(indices) > 1:
        start = f"python -m torch.distributed.run --nproc-per-node {len(indices)} train_sp.py"
        raise UserError(f"--device {text}: each GPU needs a process of its own, start them with: {start}")
    if local_rank >= len(indices):
        raise UserError(f"--device {text}: {len(indices)} GPUs, none for process {local_rank} of this machine")
    index = int(indices[local_rank])
    if index >= torch.cuda.device_count():
        raise EnvironmentFault(f"--device {text}: {torch.cuda.device_count()} CUDA devices are available to torch")
    return torch.device("cuda", index)


def select_compute(device_text: str, amp_text: str, local_rank: int = 0, processes: int = 1) -> Compute:
    """Device and autocast type for ``--device`` and ``--amp auto|off|bf16|fp16``."""
    device = select_device(device_text, local_rank, processes)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for libraries that are not told
        torch.backends.cudnn.benchmark = True  # the sizes of a run's batches are few: each is worth a search
        fast: torch.dtype | None = (
            torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        )
        where = torch.cuda.get_device_name(device)
    else:
        keep_freed_memory()
        fast = torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else None
        where = f"{device.type}, {torch.get_num_threads()} threads"
    if amp_text == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16: needs a CUDA device, this run uses {device.type}")
    amp: torch.dtype | None = {"auto": fast, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp_text]
    words = "float32" if amp is None else f"autocast {str(amp).removeprefix('torch.')}"
    return Compute(device, amp, f"{where}, {words}, channels_last")
