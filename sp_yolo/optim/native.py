"""The dense update as C, compiled when the process first asks for it; where that fails, the torch path runs instead.

One pass over the gradient for <s, g>, one over everything for the update: nine words of memory traffic per parameter,
against seven of AdamW's fused kernel. Only float32 on a CPU; no compiler is needed to install or to train.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from sp_yolo.optim.saliency import FISHER_DECAY
from sp_yolo.optim.saliency import keep_masks as select
from sp_yolo.optim.update import CARRIED, Batch, flat, is_dense, like_parameter

# Elements per piece of work: what two threads share out between them.
PIECE = 1 << 20
_COLUMNS = 7
_BINS = 1 << 14

SOURCE = r"""
#include <stdint.h>
#define LANES 32
#define BINS 16384
#define SPAN 4096   /* elements summed in float32 lanes before they go to float64 */
typedef struct { int64_t x, g, v, s, mask, h, n; } piece;
typedef struct { float beta, l2, shrink, step, sign, decay; int32_t nesterov; } settings;

static double reduce(const float *lanes) {
    double total = 0.0;
    for (int j = 0; j < LANES; j++) total += lanes[j];
    return total;
}

void sp_products(const piece *pieces, int64_t count, double *out) {
    for (int64_t p = 0; p < count; p++) {
        const float *restrict s = (const float *)pieces[p].s, *restrict g = (const float *)pieces[p].g;
        double total = 0.0;
        for (int64_t i = 0; i < pieces[p].n; ) {
            int64_t end = i + SPAN < pieces[p].n ? i + SPAN : pieces[p].n;
            float lanes[LANES] = {0};
            for (; i + LANES <= end; i += LANES)
                for (int j = 0; j < LANES; j++) lanes[j] += s[i + j] * g[i + j];
            for (; i < end; i++) lanes[0] += s[i] * g[i];
            total += reduce(lanes);
        }
        out[p] = total;
    }
}

static inline __attribute__((always_inline)) void element(
    float *x, const float *g, float *v, float *s, const uint8_t *mask, float *h, int64_t i,
    const settings c, float *ss, float *sg)
{
    float gradient = c.sign * g[i], before = x[i];
    float steered = gradient + c.l2 * before;
    float moved = c.beta * v[i] + steered;
    float direction = c.nesterov ? steered + c.beta * moved : moved;
    float after = c.shrink * before - c.step * direction;
    if (mask) after *= (float)mask[i];
    float displacement = after - before;
    x[i] = after; v[i] = moved; s[i] = displacement;
    if (h) h[i] = c.decay * h[i] + (1.0f - c.decay) * gradient * gradient;
    *ss += displacement * displacement;
    *sg += displacement * gradient;
}

static inline __attribute__((always_inline)) void run(
    float *restrict x, const float *restrict g, float *restrict v, float *restrict s,
    const uint8_t *restrict mask, float *restrict h, int64_t n, const settings c, double *out)
{
    double ss = 0.0, sg = 0.0;
    for (int64_t i = 0; i < n; ) {
        int64_t end = i + SPAN < n ? i + SPAN : n;
        float squares[LANES] = {0}, products[LANES] = {0};
        for (; i + LANES <= end; i += LANES)
            for (int j = 0; j < LANES; j++) element(x, g, v, s, mask, h, i + j, c, squares + j, products + j);
        for (; i < end; i++) element(x, g, v, s, mask, h, i, c, squares, products);
        ss += reduce(squares); sg += reduce(products);
    }
    out[0] = ss; out[1] = sg;
}

static inline int32_t bin_of(float saliency) {
    union { float value; int32_t bits; } word = { saliency };
    /* exponent and six bits of mantissa, ordered as the floats are; a NaN of either sign comes last */
    return (word.bits >> 17) & (BINS - 1);
}

static inline float saliency_of(float x, const float *h, int64_t i) {
    float squared = x * x;
    if (h) squared *= h[i];
    return 0.5f * squared;
}

/* Weights per bin, the held ones in a bin of their own. No branches, which would be mispredicted; four tables, because
   neighbours fall into one bin and an increment waits for the one before it. */
void sp_histogram(const float *x, const float *h, const uint8_t *mask, int64_t n, int64_t *counts) {
    for (int64_t i = 0; i < n; i++) {
        int32_t own = bin_of(saliency_of(x[i], h, i)), available = !mask || mask[i];
        counts[(i & 3) * (BINS + 1) + (available ? own : BINS)]++;
    }
}

/* keep: above the bin. The bin's own go to values and places, which need one entry to spare; returns their number. */
int64_t sp_collect(const float *x, const float *h, const uint8_t *mask, int64_t n, int32_t bin,
                   uint8_t *keep, float *values, int64_t *places) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        float saliency = saliency_of(x[i], h, i);
        int32_t own = bin_of(saliency), available = !mask || mask[i];
        keep[i] = available & (own > bin);
        values[found] = saliency;
        places[found] = i;
        found += available & (own == bin);
    }
    return found;
}

void sp_update(const piece *pieces, int64_t count, const settings *c, double *out) {
    for (int64_t p = 0; p < count; p++) {
        piece t = pieces[p];
        float *x = (float *)t.x, *v = (float *)t.v, *s = (float *)t.s, *h = (float *)t.h;
        const float *g = (const float *)t.g;
        const uint8_t *mask = (const uint8_t *)t.mask;
        /* constants in each branch: the compiler drops the tests from the loops */
        if (mask && h) run(x, g, v, s, mask, h, t.n, *c, out + 2 * p);
        else if (mask) run(x, g, v, s, mask, 0, t.n, *c, out + 2 * p);
        else if (h)    run(x, g, v, s, 0, h, t.n, *c, out + 2 * p);
        else           run(x, g, v, s, 0, 0, t.n, *c, out + 2 * p);
    }
}
"""


class Settings(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("beta", "l2", "shrink", "step", "sign", "decay")] + [
        ("nesterov", ctypes.c_int32)
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None: no compiler, or one that refuses. Compiled once per process, kept nowhere."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform == "win32":
        return None
    with tempfile.TemporaryDirectory(prefix="sp-yolo-") as folder:
        source, shared = Path(folder) / "sp.c", Path(folder) / "sp.so"
        source.write_text(SOURCE)
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(shared), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            kernels = ctypes.CDLL(str(shared))
        except (OSError, subprocess.SubprocessError):
            return None
    kernels.sp_collect.restype = ctypes.c_int64
    return kernels


def plain(tensor: Tensor) -> bool:
    """What the kernels read: float32 on a CPU, dense in memory."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and is_dense(tensor)


def supports(batch: Batch) -> bool:
    """Plain parameters with float32 gradients, without the diagonal."""
    if batch.diagonal:
        return False
    return all(plain(p) and g.dtype == p.dtype for p, g in zip(batch.params, batch.grads, strict=True))


class Native:
    """The native path: a batch cut into pieces for the kernels. Holds the tensors whose addresses it has taken."""

    name = "native"

    def __init__(self, batch: Batch, kernels: ctypes.CDLL) -> None:
        self.batch, self.kernels = batch, kernels
        self.owners: list[int] = []
        self._kept: list[Tensor] = []
        rows: list[int] = []
        for index, (param, grad, state) in enumerate(zip(batch.params, batch.grads, batch.states, strict=True)):
            aligned = like_parameter(grad, param)
            self._kept.append(aligned)
            mask, square = state.get("mask"), state.get("square_avg")
            starts = [t.data_ptr() for t in (param, aligned, state["momentum_buffer"], state["displacement"])]
            flags, squares = (0 if t is None else t.data_ptr() for t in (mask, square))
            for offset in range(0, param.numel(), PIECE):
                rows += [start + 4 * offset for start in starts]
                rows += [flags and flags + offset, squares and squares + 4 * offset, min(PIECE, param.numel() - offset)]
                self.owners.append(index)
        self.table = (ctypes.c_int64 * len(rows))(*rows)

    def _share_out(self, call: Callable[[int, int], None]) -> None:
        """``call(first, count)`` for runs of pieces of about equal size, one per torch thread."""
        sizes = self.table[_COLUMNS - 1 :: _COLUMNS]
        threads = min(torch.get_num_threads(), max(sum(sizes) // PIECE, 1))
        if threads == 1:
            call(0, len(sizes))
            return
        bounds, done, target = [0], 0, sum(sizes) / threads
        for index, size in enumerate(sizes):
            done += size
            if done >= target * len(bounds) and len(bounds) < threads:
                bounds.append(index + 1)
        bounds.append(len(sizes))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(call, bounds, [b - a for a, b in itertools.pairwise(bounds)]))

    def products(self) -> list[float]:
        """<s, g> of each tensor, as ``single_products``."""
        out = (ctypes.c_double * len(self.owners))()

        def call(first: int, count: int) -> None:
            self.kernels.sp_products(self._address(first), ctypes.c_int64(count), ctypes.byref(out, 8 * first))

        self._share_out(call)
        sign = -1.0 if self.batch.maximize else 1.0
        return [sign * total for total in self._per_tensor(list(out))]

    def update(self, r_gamma: Tensor, gamma: Tensor, finite: Tensor) -> None:
        """One step of every tensor, as ``single_update``."""
        if not finite:
            return
        batch = self.batch
        settings = Settings(
            batch.momentum,
            batch.l2,
            batch.shrink,
            float(batch.lr) * gamma.item(),
            -1.0 if batch.maximize else 1.0,
            FISHER_DECAY,
            int(batch.nesterov),
        )
        out = (ctypes.c_double * (2 * len(self.owners)))()

        def call(first: int, count: int) -> None:
            self.kernels.sp_update(
                self._address(first), ctypes.c_int64(count), ctypes.byref(settings), ctypes.byref(out, 16 * first)
            )

        self._share_out(call)
        squares, products = self._per_tensor(out[0::2]), self._per_tensor(out[1::2])
        for state, square, product in zip(batch.states, squares, products, strict=True):
            state.update(zip(CARRIED, (square, square, product), strict=True))

    def _address(self, first: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(ctypes.addressof(self.table) + 8 * _COLUMNS * first)

    def _per_tensor(self, values: list[float]) -> list[float]:
        totals = [0.0] * len(self.batch.params)
        for owner, value in zip(self.owners, values, strict=True):
            totals[owner] += value
        return totals


def keep_masks(
    kernels: ctypes.CDLL, params: list[Tensor], squares: list[Tensor | None], masks: list[Tensor | None], count: int
) -> tuple[list[Tensor], Tensor] | None:
    """``saliency.keep_masks`` of 0.5 h x^2 without storing it: a histogram over the floats' leading bits, then an exact
    selection inside one bin. Ties by index in memory. None if no more than the held weights are to be zero."""
    rows = [
        [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in row] + [ctypes.c_int64(row[0].numel())]
        for row in zip(params, squares, masks, strict=True)
    ]
    tables = torch.zeros(4, _BINS + 1, dtype=torch.int64)
    for row in rows:
        kernels.sp_histogram(*row, ctypes.c_void_p(tables.data_ptr()))
    counts = tables.sum(0)
    rank = count - int(counts[_BINS])
    if rank <= 0:
        return None
    cumulative = counts[:_BINS].cumsum(0)
    chosen = int(torch.searchsorted(cumulative, rank))
    size = int(counts[chosen])
    values, places = torch.empty(size + 1), torch.empty(size + 1, dtype=torch.int64)
    sizes: list[int] = []
    keep: list[Tensor] = []
    for param, row in zip(params, rows, strict=True):
        kept = torch.empty_like(param, dtype=torch.bool)
        offset = sum(sizes)
        ends = (kept.data_ptr(), values.data_ptr() + 4 * offset, places.data_ptr() + 8 * offset)
        sizes.append(kernels.sp_collect(*row, ctypes.c_int32(chosen), *map(ctypes.c_void_p, ends)))
        keep.append(kept)
    inner, threshold = select([values[:size]], rank - int(cumulative[chosen]) + size)
    for kept, place, stay in zip(keep, places[:size].split(sizes), inner[0].split(sizes), strict=True):
        flat(kept)[place] = stay
    return keep, threshold
