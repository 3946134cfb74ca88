"""A few words on the device that the host changes from step to step, without waiting for the device."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

# Copies that a CUDA graph may hold: made before, as no pinned memory should be asked for while one is captured.
SPARE = 4


class Live:
    """``words`` int64 on the device, ``numbers`` the same memory as float64, what ``send`` has last put there.

    The host writes to pinned memory and the device copies from there when it comes to it; until then another piece of
    pinned memory is written to. A captured copy reads its piece at every replay, so that nobody writes there again; and
    as a replay may come at any time, every step sends its words from then on.
    """

    def __init__(self, words: int, device: torch.device) -> None:
        self.words = torch.zeros(words, dtype=torch.int64, device=device)
        self.numbers = self.words.view(torch.float64)
        self.sent = b""
        self.on_gpu = device.type == "cuda"
        # Pieces of pinned memory, with what has happened when the last copy from there is done.
        self.pieces: list[tuple[Tensor, Any]] = []
        self.spare = [self._piece() for _ in range(SPARE)] if self.on_gpu else []
        self.captured: list[Tensor] = []

    def _piece(self) -> Tensor:
        return torch.empty(self.words.numel(), dtype=torch.int64, pin_memory=self.on_gpu)

    def send(self, content: bytes) -> None:
        """Bring the words to the device, in the order of the stream; nothing where they are there."""
        capturing = self.on_gpu and torch.cuda.is_current_stream_capturing()
        if content == self.sent and not capturing and not self.captured:
            return
        self.sent = content
        if capturing:
            piece, done = self.spare.pop(), None
            self.captured.append(piece)
        else:
            piece, done = self._free()
        ctypes.memmove(piece.data_ptr(), content, len(content))
        self.words.copy_(piece, non_blocking=True)
        if done is not None:
            done.record()

    def _free(self) -> tuple[Tensor, Any]:
        """A piece that no copy is to read any more."""
        self.spare += [self._piece() for _ in range(SPARE - len(self.spare))] if self.on_gpu else []
        for piece, done in self.pieces:
            if done is None or done.query():
                return piece, done
        self.pieces.append((self._piece(), torch.cuda.Event() if self.on_gpu else None))
        return self.pieces[-1]
