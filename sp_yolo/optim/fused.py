"""The dense update as Triton kernels (``triton_*.py``), for NVIDIA GPUs; where it does not apply, or Triton is
missing or does not work here, the multi-tensor path runs instead.

Four launches and a copy of a few thousand bytes per step, whatever the number of tensors. The host is not asked.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
import struct
from typing import Any

import torch
from torch import Tensor, nn

from sp_yolo.optim import damping
from sp_yolo.optim.batch import Batch, is_dense, like_parameter
from sp_yolo.optim.gamma import gamma_cap, moving_groups, open_gamma
from sp_yolo.optim.live import Live

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cuda",)
# What did not work once is not tried again.
_failed: set[Any] = set()


def supports(groups: list[dict[str, Any]]) -> bool:
    """Whether the Triton path may take the tensors that have a gradient: dense parameters of one NVIDIA GPU in single,
    bfloat16 or half precision, and rates that the device or the host knows without being asked."""
    first = groups[0]
    if first["native"] is False or first["foreach"] is not None:
        return False
    params = [p for group in groups for p in group["params"] if p.grad is not None and p.requires_grad]
    devices = {p.device for p in params}
    if len(devices) != 1 or params[0].device.type not in DEVICES or torch.version.hip is not None:
        return False
    (device,) = devices
    # Of a subclass (DTensor, FakeTensor) the address says nothing.
    plain = all(type(p) in (Tensor, nn.Parameter) and p.dtype in DTYPES and is_dense(p) for p in params)
    return plain and _key(params) not in _failed and all(_knows(group["lr"], device) for group in groups)


def _key(params: list[Tensor]) -> Any:
    return params[0].device, frozenset(p.dtype for p in params)


def _knows(lr: Any, device: torch.device) -> bool:
    return not isinstance(lr, Tensor) or lr.device.type == "cpu" or (lr.device == device and lr.dtype == torch.float32)


def fused_step(batches: list[Batch]) -> Fused | None:
    """The path for these tensors; None where their state is not of float32 (loaded from elsewhere), Triton is missing,
    or a kernel does not compile or run."""
    names = ("momentum_buffer", "square_avg", "displacement")
    states = [state[name] for batch in batches for state in batch.states for name in names if name in state]
    if any(value.dtype != torch.float32 for value in states):
        return None
    try:
        return Fused(batches)
    except (
        Exception
    ):  # no Triton, no compiler for its launcher, a card that it does not know: each fails in its own way
        _failed.add(_key([p for batch in batches for p in batch.params]))
        return None


class Fused:
    """The Triton path: tables of addresses for the kernels, made once for some batches."""

    name = "triton"

    def __init__(self, batches: list[Batch]) -> None:
        from sp_yolo.optim import triton_kernels, triton_layout, triton_settle

        self.batches, self.passes, self.scalars, self.layout = batches, triton_kernels, triton_settle, triton_layout
        self.device = batches[0].params[0].device
        on_gpu = self.device.type == "cuda"
        self.at_device = functools.partial(torch.cuda.device, self.device) if on_gpu else contextlib.nullcontext
        self.spans = [span for batch in batches for span in batch.spans]
        self.tensors = sum(len(batch.params) for batch in batches)
        self._make_tables()
        self.spans_at = self.tensors
        self.batches_at = self.spans_at + self.layout.SPAN_WORDS.value * len(self.spans)
        self.model_at = self.batches_at + self.layout.BATCH_WORDS.value * len(batches)
        self.format = f"={self.tensors}q" + "dqdddd4q" * len(self.spans) + "2qdq" * len(batches) + "q10d"
        self.live = Live(self.model_at + self.layout.MODEL_WORDS.value, self.device)
        self.rates = torch.zeros(len(self.spans) * self.layout.RATE_WORDS.value, device=self.device)
        # Whether all are finite; of each batch the weight of g^2 and whether it has had one.
        started = [[0.0, float(isinstance(batch.step, Tensor) or batch.step > 0)] for batch in batches]
        self.marks = torch.tensor([0.0, *itertools.chain(*started)], device=self.device)
        self.strides = [[p.stride() for p in batch.params] for batch in batches]
        self.grads: list[list[Tensor]] = []
        self.check, self.moves, self.cap = True, False, 0.0
        self.aligned = [self._is_aligned(i) for i in range(len(batches))]
        self._try()

    def _make_tables(self) -> None:
        """Rows of the tensors and of one without elements; the tensor of each chunk; room for the chunks' sums."""
        rows: list[int] = []
        chunks: list[int] = []
        size = self.layout.CHUNK.value
        self.first_chunks, self.bounds = [], []
        span = -1
        for batch in self.batches:
            starts = {first for _, first, _ in batch.spans}
            self.first_chunks.append(len(chunks))
            self.bounds.append([len(chunks)])
            for i, (param, state) in enumerate(zip(batch.params, batch.states, strict=True)):
                span += i in starts
                addresses = [state[n].data_ptr() if n in state else 0 for n in ("square_avg", "mask", "displacement")]
                count = -(-batch.sizes[i] // size)
                rows += (param.data_ptr(), state["momentum_buffer"].data_ptr(), *addresses)
                rows += (state["secant"].data_ptr(), batch.sizes[i], batch.lengths[i], batch.places[i], span)
                rows += (len(chunks), count)
                chunks += [len(rows) // self.layout.TENSOR_WORDS.value - 1] * count
                self.bounds[-1].append(len(chunks))
        options: dict[str, Any] = {"device": self.device, "dtype": torch.float64}
        self.scratch = torch.zeros(5, **options)
        rows += (0, 0, 0, 0, 0, self.scratch.data_ptr(), 0, 0, 1, 0, len(chunks), 0)
        self.table = torch.tensor(rows, device=self.device)
        self.chunks = torch.tensor([*chunks, self.tensors], dtype=torch.int32, device=self.device)
        self.count = len(chunks)
        self.products, self.sums = torch.zeros(self.count + 1, **options), torch.zeros(4 * (self.count + 1), **options)
        self.wrongs = torch.zeros(self.count + 1, dtype=torch.int32, device=self.device)

    def _is_aligned(self, index: int) -> bool:
        """Whether all of a batch's tensors but the gradients may be read 16 bytes at a time."""
        batch = self.batches[index]
        names = ("momentum_buffer", "square_avg", "mask")
        states = [state[name] for state in batch.states for name in names if name in state]
        return not functools.reduce(operator.or_, (t.data_ptr() for t in [*batch.params, *states]), 0) & 15

    def _try(self) -> None:
        """Every kernel once on the row without elements: what does not compile fails before anything has moved."""
        gamma, averages = torch.zeros((), dtype=torch.float64, device=self.device), self.scratch[:3]
        self.live.numbers.fill_(1.0)  # nothing is divided by 0
        with self.at_device():
            for index in range(len(self.batches)):
                self._look(index, self.count, 1, True, self.aligned[index])
                self._update(index, self.count, 1, self.aligned[index])
            self._settle(averages, gamma, 0, 0)
            self._secants(self.table[self.tensors * self.layout.TENSOR_WORDS.value :], 1)

    def take(self, check: bool) -> None:
        """Take this step's gradients. ``check``: they are to be looked at, as the caller has not."""
        self.check, self.moves, self.cap = check, False, 0.0
        self.grads = [self._dense(index, batch) for index, batch in enumerate(self.batches)]

    def damp(self, model: dict[str, Any]) -> None:
        """gamma is to be brought up to date; at the first step that moves it is, eq. (20)."""
        moving = moving_groups(self.batches, True)
        if moving and not model["open"]:
            open_gamma(model, self.batches)
        elif moving:
            self.moves, self.cap = True, gamma_cap(moving)

    def update(self, model: dict[str, Any]) -> None:
        """One step of every tensor, and of gamma."""
        own = [[g.data_ptr() for g in grads] for grads in self.grads]
        self.live.send(struct.pack(self.format, *itertools.chain(*own), *self._numbers(model)))
        fits = [a and not functools.reduce(operator.or_, row, 0) & 15 for a, row in zip(self.aligned, own, strict=True)]
        ends = [*self.first_chunks[1:], self.count]
        parts = list(zip(self.first_chunks, ends, fits, strict=True))
        with self.at_device():
            for index, (first, end, aligned) in enumerate(parts):
                self._look(index, first, end - first, self.check, aligned)
            self._settle(model["averages"], model["gamma"], len(self.spans), len(self.batches))
            for index, (first, end, aligned) in enumerate(parts):
                self._update(index, first, end - first, aligned)
            self._secants(self.table, self.tensors)
        self.grads = []

    def _numbers(self, model: dict[str, Any]) -> list[float]:
        """The words that follow the gradients' addresses, in the order of the kernels' names for them."""
        words: list[float] = []
        tensor = 0
        for batch, bounds in zip(self.batches, self.bounds, strict=True):
            for group, first, last in batch.spans:
                lr, momentum, decay = group["lr"], float(group["momentum"]), float(group["weight_decay"])
                there = isinstance(lr, Tensor) and lr.device.type != "cpu"
                words += (0.0, lr.data_ptr()) if there else (float(lr), 0)
                words += (momentum, *((0.0, decay) if batch.decoupled else (decay, 0.0)))
                words += (1.0 - momentum if batch.fisher else 1.0, tensor + first, tensor + last)
                words += (bounds[first], bounds[last])
            tensor += len(batch.params)
        for batch in self.batches:
            if isinstance(batch.step, Tensor):
                words += (0, 0, 0.0, batch.step.data_ptr())
            else:
                words += (batch.step, max(batch.step - 1, 0), float(batch.newest_weight()), 0)
        words += (int(self.moves), self.cap, 1.0 - model["rho"], model["growth"], damping.FADE)
        words += (damping.REACH**2, damping.SMALLEST_WEIGHT**2, damping.TINY, damping.SMALL)
        words += (damping.FISHER_DECAY, math.log(damping.FISHER_DECAY))
        return words

    def advance(self) -> None:
        """Count the step. Where the count is on the device, a kernel has done so."""
        for batch in self.batches:
            if not isinstance(batch.step, Tensor):
                batch.advance()

    def _dense(self, index: int, batch: Batch) -> list[Tensor]:
        """A batch's gradients in its parameters' memory order."""
        grads, dtype = batch.grads, batch.params[0].dtype
        strides = [g.stride() for g in grads]
        if strides == self.strides[index] and all(g.dtype == dtype for g in grads):
            return grads
        dense = [like_parameter(g.to(dtype), p) for g, p in zip(grads, batch.params, strict=True)]
        if all(a.data_ptr() == b.data_ptr() for a, b in zip(dense, grads, strict=True)):
            self.strides[index] = strides  # another name of the same order
        return dense

    def _look(self, index: int, first: int, chunks: int, check: bool, aligned: bool) -> None:
        batch = self.batches[index]
        if chunks:
            self.passes.look[(chunks,)](
                self.table, self.chunks, self.live.words, self._batch_at(index), first, self.products, self.wrongs,
                DTYPE=self._dtype(batch), ALIGNED=aligned, LOOK=check, MAXIMIZE=batch.maximize,
            )  # fmt: skip

    def _settle(self, averages: Tensor, gamma: Tensor, spans: int, batches: int) -> None:
        self.scalars.settle[(1,)](
            self.table, self.live.words, self.live.numbers, self.spans_at, spans, self.batches_at, batches,
            self.model_at, self.products, self.wrongs, averages, gamma, self.rates, self.marks,
        )  # fmt: skip

    def _update(self, index: int, first: int, chunks: int, aligned: bool) -> None:
        batch, mark_at = self.batches[index], 1 + self.layout.MARK_WORDS.value * index
        if chunks:
            self.passes.update[(chunks,)](
                self.table, self.chunks, self.live.words, self._batch_at(index), first, mark_at, self.rates,
                self.marks, self.sums, DTYPE=self._dtype(batch), ALIGNED=aligned, FISHER=batch.fisher,
                NESTEROV=batch.nesterov, MAXIMIZE=batch.maximize,
                SQUARES=any("square_avg" in state for state in batch.states),
                MASKS=any("mask" in state for state in batch.states),
            )  # fmt: skip

    def _secants(self, table: Tensor, tensors: int) -> None:
        self.scalars.secants[(tensors,)](table, self.live.numbers, self.spans_at, self.marks, self.sums)

    def _batch_at(self, index: int) -> int:
        return int(self.batches_at + self.layout.BATCH_WORDS.value * index)

    def _dtype(self, batch: Batch) -> Any:
        return self.layout.OF_DTYPE[batch.params[0].dtype]
