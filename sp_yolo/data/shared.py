"""A block of bytes that loader processes share, however they are started."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any

import numpy as np
import torch


class SharedBlock:
    """``bytes`` uint8 [size]. Pickled it is a reference: who unpickles it sees the same memory.

    On Linux it is an anonymous file of memory, found through its maker's /proc entry: that needs no room in /dev/shm
    (64 MiB in a container that was told nothing), and the kernel frees it with its last user, however that one ends.
    Elsewhere it is a shared tensor of torch, which travels only to processes that are being started.

    Raises:
        OSError: the system refuses so much.
    """

    def __init__(self, size: int) -> None:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("sp-yolo")
            weakref.finalize(self, os.close, descriptor)
            os.ftruncate(descriptor, max(size, 1))
            self.__setstate__((f"/proc/{os.getpid()}/fd/{descriptor}", size))
        else:
            self.__setstate__((torch.empty(size, dtype=torch.uint8).share_memory_(), size))

    def __getstate__(self) -> tuple[Any, int]:
        return self._where, len(self.bytes)

    def __setstate__(self, state: tuple[Any, int]) -> None:
        self._where, size = state
        if isinstance(self._where, torch.Tensor):
            self.bytes = self._where.numpy()
            return
        with open(self._where, "r+b") as file:
            self.bytes = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)[:size]
