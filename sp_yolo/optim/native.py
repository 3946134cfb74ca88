"""The dense update as C, compiled when the process first asks for it; where that fails, the torch path runs instead.

One pass over the gradient for <s, g>, one over everything for the update: nine words of memory traffic per parameter,
against seven of AdamW's fused kernel. Only float32 on a CPU; no compiler is needed to install or to train.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sp_yolo.optim.saliency import FISHER_DECAY, SAMPLE, bracket, rank_inside, saliency
from sp_yolo.optim.update import CARRIED, Batch, flat, is_dense, like_parameter

# Elements that are worth another thread.
SHARE = 1 << 20

SOURCE = r"""
#include <stdint.h>
#define LANES 32
#define SPAN 4096   /* elements summed in float32 lanes before they go to float64 */
typedef struct { int64_t x, v, s, mask, h, n; } tensor;
typedef struct { float beta, l2, shrink, step, sign, decay; int32_t nesterov; } settings;

static double reduce(const float *lanes) {
    double total = 0.0;
    for (int j = 0; j < LANES; j++) total += lanes[j];
    return total;
}

static double product(const float *restrict s, const float *restrict g, int64_t n) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += s[i + j] * g[i + j];
    for (; i < n; i++) lanes[0] += s[i] * g[i];
    return reduce(lanes);
}

/* <s, g> over the elements first to last of all tensors in a row. */
double sp_products(const tensor *tensors, const int64_t *gradients, int64_t count, int64_t first, int64_t last) {
    double total = 0.0;
    int64_t before = 0;
    for (int64_t t = 0; t < count; before += tensors[t++].n) {
        const float *s = (const float *)tensors[t].s, *g = (const float *)gradients[t];
        int64_t begin = first > before ? first - before : 0;
        int64_t end = last < before + tensors[t].n ? last - before : tensors[t].n;
        for (int64_t i = begin; i < end; i += SPAN)
            total += product(s + i, g + i, i + SPAN < end ? SPAN : end - i);
    }
    return total;
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
    float squares[LANES] = {0}, products[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) element(x, g, v, s, mask, h, i + j, c, squares + j, products + j);
    for (; i < n; i++) element(x, g, v, s, mask, h, i, c, squares, products);
    out[0] += reduce(squares); out[1] += reduce(products);
}

/* Backwards: the gradients and displacements that sp_products read last are still in cache. */
void sp_update(const tensor *tensors, const int64_t *gradients, int64_t count, int64_t first, int64_t last,
               const settings *c, double *out) {
    int64_t before = 0;
    for (int64_t t = 0; t < count; t++) before += tensors[t].n;
    for (int64_t t = count - 1; t >= 0; t--) {
        int64_t n = tensors[t].n;
        before -= n;
        int64_t begin = first > before ? first - before : 0, end = last < before + n ? last - before : n;
        while (begin < end) {
            int64_t size = end - begin < SPAN ? end - begin : SPAN, i = end - size;
            end = i;
            float *x = (float *)tensors[t].x + i, *v = (float *)tensors[t].v + i, *s = (float *)tensors[t].s + i;
            float *h = (float *)tensors[t].h;
            const float *g = (const float *)gradients[t] + i;
            const uint8_t *mask = (const uint8_t *)tensors[t].mask;
            /* constants in each branch: the compiler drops the tests from the loops */
            if (mask && h) run(x, g, v, s, mask + i, h + i, size, *c, out + 2 * t);
            else if (mask) run(x, g, v, s, mask + i, 0, size, *c, out + 2 * t);
            else if (h)    run(x, g, v, s, 0, h + i, size, *c, out + 2 * t);
            else           run(x, g, v, s, 0, 0, size, *c, out + 2 * t);
        }
    }
}

static inline __attribute__((always_inline)) int64_t classify(
    const float *restrict x, const float *restrict h, const uint8_t *restrict mask, int n,
    float low, float high, uint8_t *restrict keep)
{
    int32_t below = 0;
    for (int i = 0; i < n; i++) {
        float saliency = x[i] * x[i];
        if (h) saliency *= h[i];
        saliency *= 0.5f;
        /* 0: at most low, or held; 1: inside; 2: above, or NaN */
        uint8_t code = (uint8_t)!(saliency <= low) + (uint8_t)!(saliency <= high);
        if (mask) code = mask[i] ? code : 0;
        keep[i] = code;
        below += code == 0;
    }
    return below;
}

/* keep: saliency above high. Those in (low, high] go to values and places; returns their number. at_most_low counts the
   others, held ones among them. */
int64_t sp_bracket(const float *x, const float *h, const uint8_t *mask, int64_t n, float low, float high,
                   uint8_t *keep, float *values, int64_t *places, int64_t *at_most_low) {
    int64_t found = 0;
    for (int64_t start = 0; start < n; start += SPAN) {
        int size = start + SPAN < n ? SPAN : (int)(n - start);
        const float *xs = x + start, *hs = h ? h + start : 0;
        uint8_t *codes = keep + start;
        if (mask && h) *at_most_low += classify(xs, hs, mask + start, size, low, high, codes);
        else if (mask) *at_most_low += classify(xs, 0, mask + start, size, low, high, codes);
        else if (h)    *at_most_low += classify(xs, hs, 0, size, low, high, codes);
        else           *at_most_low += classify(xs, 0, 0, size, low, high, codes);
        for (int i = 0; i < size; i++) {
            if (codes[i] == 1) {
                values[found] = 0.5f * (h ? xs[i] * xs[i] * hs[i] : xs[i] * xs[i]);
                places[found++] = start + i;
            }
            codes[i] >>= 1;
        }
    }
    return found;
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
    kernels.sp_bracket.restype = ctypes.c_int64
    kernels.sp_products.restype = ctypes.c_double
    return kernels


def plain(tensor: Tensor) -> bool:
    """What the kernels read: float32 on a CPU, dense in memory."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and is_dense(tensor)


def supports(batch: Batch) -> bool:
    """Plain parameters with float32 gradients, without the diagonal."""
    first = batch.params[0]  # a batch is of one device and dtype
    if batch.diagonal or first.device.type != "cpu" or first.dtype != torch.float32:
        return False
    return all(map(is_dense, batch.params)) and all(g.dtype == torch.float32 for g in batch.grads)


class Native:
    """The native path: tables of addresses for the kernels. Holds the gradients whose addresses it has taken."""

    name = "native"

    def __init__(self, batch: Batch, kernels: ctypes.CDLL) -> None:
        self.batch, self.kernels = batch, kernels
        self.grads = [like_parameter(grad, param) for param, grad in zip(batch.params, batch.grads, strict=True)]
        self.sizes = [param.numel() for param in batch.params]
        rows: list[int] = []
        for param, state, size in zip(batch.params, batch.states, self.sizes, strict=True):
            mask, square = state.get("mask"), state.get("square_avg")
            rows += (
                param.data_ptr(),
                state["momentum_buffer"].data_ptr(),
                state["displacement"].data_ptr(),
                0 if mask is None else mask.data_ptr(),
                0 if square is None else square.data_ptr(),
                size,
            )
        self.tensors = (ctypes.c_int64 * len(rows))(*rows)
        self.gradients = (ctypes.c_int64 * len(self.grads))(*[g.data_ptr() for g in self.grads])

    def _share_out(self, call: Callable[[int, int], Any]) -> list[Any]:
        """``call(first, last)`` for about equal parts of all elements in a row, one per torch thread."""
        elements = sum(self.sizes)
        threads = max(min(torch.get_num_threads(), elements // SHARE), 1)
        bounds = [elements * part // threads for part in range(threads + 1)]
        if threads == 1:
            return [call(0, elements)]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(call, bounds, bounds[1:]))

    def _arguments(self, first: int, last: int) -> tuple[Any, ...]:
        return self.tensors, self.gradients, *map(ctypes.c_int64, (len(self.sizes), first, last))

    def products(self) -> list[float]:
        """Parts of the sum of <s, g> over all tensors."""
        parts = self._share_out(lambda first, last: self.kernels.sp_products(*self._arguments(first, last)))
        return [-part for part in parts] if self.batch.maximize else parts

    def update(self, r_gamma: Tensor, gamma: Tensor, finite: Tensor) -> None:
        """One step of every tensor, as the single-tensor path."""
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

        def call(first: int, last: int) -> list[float]:
            sums = (ctypes.c_double * (2 * len(self.sizes)))()
            self.kernels.sp_update(*self._arguments(first, last), ctypes.byref(settings), sums)
            return list(sums)

        parts = self._share_out(call)
        sums = parts[0] if len(parts) == 1 else [sum(column) for column in zip(*parts, strict=True)]
        norm, square, gradient = CARRIED
        for state, squared, product in zip(batch.states, sums[0::2], sums[1::2], strict=True):
            state[norm] = state[square] = squared
            state[gradient] = product


def keep_masks(
    kernels: ctypes.CDLL, params: list[Tensor], squares: list[Tensor | None], masks: list[Tensor | None], count: int
) -> tuple[list[Tensor], Tensor] | None:
    """``saliency.keep_masks`` of 0.5 h x^2, held weights first, without storing it: the masks as rows in memory order.

    None if the bracket missed, or no more than the held weights are to be zero.
    """
    n = sum(p.numel() for p in params)
    sample = _sample(params, squares, masks, max(n // SAMPLE, 1))
    low, high = bracket(sample, count / n) if n > SAMPLE else (-math.inf, math.inf)
    # Room for all, of which the system gives what is used.
    values, places = torch.empty(n), torch.empty(n, dtype=torch.int64)
    at_most_low = ctypes.c_int64(0)
    found = [0]
    keep = [torch.empty(p.numel(), dtype=torch.bool) for p in params]
    for param, square, mask, kept in zip(params, squares, masks, keep, strict=True):
        row = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in (param, square, mask)]
        ends = (kept.data_ptr(), values.data_ptr() + 4 * found[-1], places.data_ptr() + 8 * found[-1])
        more = kernels.sp_bracket(
            *row,
            ctypes.c_int64(param.numel()),
            ctypes.c_float(low),
            ctypes.c_float(high),
            *map(ctypes.c_void_p, ends),
            ctypes.byref(at_most_low),
        )
        found.append(found[-1] + more)
    ranked = rank_inside(values[: found[-1]], count - at_most_low.value)
    if ranked is None:
        return None
    for kept, begin, end in zip(keep, found, found[1:], strict=False):
        kept[places[begin:end]] = ranked[0][begin:end]
    return keep, ranked[1]


def _sample(params: list[Tensor], squares: list[Tensor | None], masks: list[Tensor | None], stride: int) -> Tensor:
    """The saliency of one weight in ``stride``; -1 for held ones."""
    parts = []
    for param, square, mask in zip(params, squares, masks, strict=True):
        part = saliency(flat(param)[::stride], None if square is None else flat(square)[::stride])
        parts.append(part if mask is None else part.where(flat(mask)[::stride], -1.0))
    return torch.cat(parts)
