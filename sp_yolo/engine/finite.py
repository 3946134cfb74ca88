"""Notices the first loss or gradient that is not finite, without making a GPU wait for the question."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from sp_yolo.data import Batch

LAG = 4  # iterations that a GPU may be behind before the loop waits for an answer


@dataclass(frozen=True)
class _Look:
    names: Sequence[str]
    values: torch.Tensor  # on the host, filled once ``done`` has happened
    done: torch.cuda.Event
    iteration: int
    batch: Batch


class FiniteWatch:
    """``on_fault(names, iteration, batch)`` is called with what was not finite, and must raise.

    On a CPU :meth:`look` judges at once. On a GPU the numbers travel to the host while it works on, and are judged a
    few iterations later, at the latest by :meth:`drain`, which must come before anything is saved.
    """

    def __init__(self, on_fault: Callable[[list[str], int, Batch], NoReturn]) -> None:
        self._on_fault = on_fault
        self._pending: deque[_Look] = deque()

    def look(self, names: Sequence[str], values: torch.Tensor, iteration: int, batch: Batch) -> None:
        """``values`` [n]: one number per name, not finite where anything behind it is not."""
        if not values.is_cuda:
            self._judge(names, values, iteration, batch)
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._pending.append(_Look(names, host, done, iteration, batch))
        while self._pending and (len(self._pending) > LAG or self._pending[0].done.query()):
            self._settle()

    def drain(self) -> None:
        """Wait for and judge every look."""
        while self._pending:
            self._settle()

    def _settle(self) -> None:
        look = self._pending.popleft()
        look.done.synchronize()
        self._judge(look.names, look.values, look.iteration, look.batch)

    def _judge(self, names: Sequence[str], values: torch.Tensor, iteration: int, batch: Batch) -> None:
        bad = [name for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)]
        if bad:
            self._on_fault(bad, iteration, batch)


def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[n] the norm of each tensor: not finite where an entry is not, or where entries beyond 1e19 overflow it."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))])
