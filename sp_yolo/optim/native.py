"""The dense update as C, compiled when the process first asks for it; where that fails, the torch path runs instead.

One pass over the gradient for <s, g>, one over everything for the update: nine words of memory traffic per parameter,
eleven in the Fisher metric, against seven of AdamW's fused kernel. Only float32 on a CPU; no compiler is needed to
install or to train.
"""

from __future__ import annotations

import ctypes
import functools
import os
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

from sp_yolo.optim.damping import FISHER_FLOOR
from sp_yolo.optim.saliency import FISHER_DECAY, rank_inside
from sp_yolo.optim.update import CARRIED, Batch, is_dense, like_parameter, next_square_weight

# Elements that are worth another thread.
SHARE = 1 << 20

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#define LANES 32
#define SPAN 4096   /* elements summed in float32 lanes before they go to float64 */
#define STRETCH (1 << 18)   /* elements read in order: shorter, and the processor's prefetching suffers */
#define GLANCE 64   /* elements looked at together for one inside the bracket */
typedef struct { int64_t x, v, s, mask, h, n; } tensor;
typedef struct { float beta, l2, shrink, step, sign, decay, floor; int32_t nesterov, fisher; } settings;

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
    const settings c, float weight, int fisher, float *norm, float *ss, float *sg)
{
    float gradient = c.sign * g[i], before = x[i];
    float steered = gradient + c.l2 * before;
    float moved = c.beta * v[i] + steered;
    float direction = c.nesterov ? steered + c.beta * moved : moved;
    float square = 0.0f, metric = 1.0f;   /* metric: 1 / D */
    if (h) h[i] = square = c.decay * h[i] + (1.0f - c.decay) * gradient * gradient;
    if (fisher) metric = (sqrtf(square / weight) + c.floor) / (1.0f - c.beta);
    float after = c.shrink * before - c.step * (fisher ? direction / metric : direction);
    if (mask) after *= (float)mask[i];
    float displacement = after - before;
    x[i] = after; v[i] = moved; s[i] = displacement;
    float squared = displacement * displacement;
    if (fisher) *norm += squared * metric;
    *ss += squared;
    *sg += displacement * gradient;
}

static inline __attribute__((always_inline)) void run(
    float *restrict x, const float *restrict g, float *restrict v, float *restrict s,
    const uint8_t *restrict mask, float *restrict h, int64_t n, const settings c, float weight, int fisher,
    double *out)
{
    float norms[LANES] = {0}, squares[LANES] = {0}, products[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            element(x, g, v, s, mask, h, i + j, c, weight, fisher, norms + j, squares + j, products + j);
    for (; i < n; i++) element(x, g, v, s, mask, h, i, c, weight, fisher, norms, squares, products);
    out[0] += reduce(fisher ? norms : squares); out[1] += reduce(squares); out[2] += reduce(products);
}

static void update(const tensor *t, const float *g, int64_t begin, int64_t end, const settings *c, float weight,
                   double *out) {
    float *h = (float *)t->h;
    const uint8_t *mask = (const uint8_t *)t->mask;
    for (int64_t i = begin; i < end; i += SPAN) {
        int64_t n = i + SPAN < end ? SPAN : end - i;
        float *x = (float *)t->x + i, *v = (float *)t->v + i, *s = (float *)t->s + i;
        /* constants in each branch: the compiler drops the tests from the loops */
        if (c->fisher && mask) run(x, g + i, v, s, mask + i, h + i, n, *c, weight, 1, out);
        else if (c->fisher)    run(x, g + i, v, s, 0, h + i, n, *c, weight, 1, out);
        else if (mask && h)    run(x, g + i, v, s, mask + i, h + i, n, *c, weight, 0, out);
        else if (mask)         run(x, g + i, v, s, mask + i, 0, n, *c, weight, 0, out);
        else if (h)            run(x, g + i, v, s, 0, h + i, n, *c, weight, 0, out);
        else                   run(x, g + i, v, s, 0, 0, n, *c, weight, 0, out);
    }
}

/* Backwards, in stretches: the gradients and displacements that sp_products read last are still in cache. weights: of
   each tensor's average h. */
void sp_update(const tensor *tensors, const int64_t *gradients, int64_t count, int64_t first, int64_t last,
               const settings *c, const float *weights, double *out) {
    int64_t before = 0;
    for (int64_t t = 0; t < count; t++) before += tensors[t].n;
    for (int64_t t = count - 1; t >= 0; t--) {
        int64_t n = tensors[t].n;
        before -= n;
        int64_t begin = first > before ? first - before : 0, end = last < before + n ? last - before : n;
        while (begin < end) {
            int64_t start = end - begin > STRETCH ? end - STRETCH : begin;
            update(tensors + t, (const float *)gradients[t], start, end, c, weights[t], out + 3 * t);
            end = start;
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
        if (mask) code *= mask[i];
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
        for (int i = 0; i < size; i += GLANCE) {
            int end = i + GLANCE < size ? i + GLANCE : size;
            uint8_t any = 0;
            for (int j = i; j < end; j++) any |= codes[j];
            for (int j = i; j < end && (any & 1); j++)
                if (codes[j] == 1) {
                    values[found] = 0.5f * (h ? xs[j] * xs[j] * hs[j] : xs[j] * xs[j]);
                    places[found++] = start + j;
                }
            for (int j = i; j < end; j++) codes[j] >>= 1;
        }
    }
    return found;
}
"""


class Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("beta", "l2", "shrink", "step", "sign", "decay", "floor")),
        *((name, ctypes.c_int32) for name in ("nesterov", "fisher")),
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
        # -fno-math-errno: a square root that sets errno is not vectorised.
        flags = ["-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC"]
        command = [compiler, *flags, "-o", str(shared), str(source), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            kernels = ctypes.CDLL(str(shared))
        except (OSError, subprocess.SubprocessError):
            return None
    kernels.sp_bracket.restype = ctypes.c_int64
    kernels.sp_products.restype = ctypes.c_double
    return kernels


def supports(batch: Batch) -> bool:
    """Plain parameters with float32 gradients; D = 1 or the Fisher metric."""
    first = batch.params[0]  # a batch is of one device and dtype
    if batch.damping == "diagonal" or first.device.type != "cpu" or first.dtype != torch.float32:
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
            FISHER_FLOOR,
            int(batch.nesterov),
            int(batch.damping == "fisher"),
        )
        weights = (ctypes.c_float * len(self.sizes))(*[next_square_weight(batch, state) for state in batch.states])

        def call(first: int, last: int) -> list[float]:
            sums = (ctypes.c_double * (3 * len(self.sizes)))()
            self.kernels.sp_update(*self._arguments(first, last), ctypes.byref(settings), weights, sums)
            return list(sums)

        parts = self._share_out(call)
        sums = parts[0] if len(parts) == 1 else [sum(column) for column in zip(*parts, strict=True)]
        for state, *own in zip(batch.states, sums[0::3], sums[1::3], sums[2::3], strict=True):
            state.update(zip(CARRIED, own, strict=True))


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
