"""The small kernels of the Triton path: ``settle`` brings gamma up to date between the passes of ``triton_kernels.py``,
``secants`` adds up after them what the next step needs. Eq. numbers: docs/the-method.md.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from sp_yolo.optim.triton_layout import (
    BATCH_WORDS,
    BETA,
    CAP,
    CHUNK_FIRST,
    CHUNKS,
    CHUNKS_END,
    DECAY,
    FACTOR,
    FADE,
    FIRST,
    GROWTH,
    KEPT,
    L2,
    LANES,
    LATER,
    LEAST_SQUARED,
    LENGTH,
    LOG_KEPT,
    LR,
    LR_ADDRESS,
    MARK_NEWEST,
    MARK_STARTED,
    MARK_WORDS,
    MOVES,
    NEWEST,
    RATE_BETA,
    RATE_DECAY,
    RATE_L2,
    RATE_STEP,
    RATE_WORDS,
    REACH_SQUARED,
    SECANT,
    SMALL,
    SPAN,
    SPAN_WORDS,
    STEP_ADDRESS,
    TENSOR,
    TENSOR_WORDS,
    TENSORS_END,
    TINY,
    N,
)


@triton.jit
def _lr(live, numbers, span):
    address = tl.load(live + span + LR_ADDRESS)
    lr = tl.load(numbers + span + LR)
    if address != 0:
        lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return lr


@triton.jit
def _sum(table, first, last, column):
    """Of one of the secants' columns, over tensors."""
    total = tl.zeros((LANES,), tl.float64)
    for begin in range(first, last, LANES):
        tensor = begin + tl.arange(0, LANES)
        there = tensor < last
        address = tl.load(table + tensor * TENSOR_WORDS + SECANT, mask=there, other=0)
        total += tl.load(address.to(tl.pointer_type(tl.float64)) + column, mask=there, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["spans_at", "spans", "batches_at", "batches", "model_at"])
def settle(
    table, live, numbers, spans_at, spans, batches_at, batches, model_at,
    products, wrongs, averages, gamma, rates, marks,
):  # fmt: skip
    """gamma and its averages after this step's pair, eqs. (9) to (14), (21), and with them the rates of every group.

    One program. ``damping.damped_state`` is its torch form. ``marks``: whether all gradients are finite, then of each
    batch. Where they are not, nothing moves.
    """
    model = numbers + model_at
    zero = tl.full((), 0.0, tl.float64)
    lr_ref = zero
    for i in range(spans):
        lr_ref = tl.maximum(lr_ref, _lr(live, numbers, spans_at + i * SPAN_WORDS))
    reach = tl.load(model + REACH_SQUARED)
    ss, sy, sg, far, far_from_zero = zero, zero, zero, zero, zero
    wrong = 0
    for i in range(spans):
        span = spans_at + i * SPAN_WORDS
        first, last = tl.load(live + span + CHUNK_FIRST), tl.load(live + span + CHUNKS_END)
        now, bad = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.int32)
        for begin in range(first, last, LANES):
            chunk = begin + tl.arange(0, LANES)
            now += tl.load(products + chunk, mask=chunk < last, other=0.0)
            bad += tl.load(wrongs + chunk, mask=chunk < last, other=0)
        wrong += tl.sum(bad, 0)
        lr = _lr(live, numbers, span)
        if lr > 0.0:
            first, last = tl.load(live + span + TENSOR), tl.load(live + span + TENSORS_END)
            slope, squares = tl.sum(now, 0), _sum(table, first, last, 1)
            ss += lr_ref / lr * _sum(table, first, last, 0)
            sy += slope - _sum(table, first, last, 2) + tl.load(numbers + span + L2) * squares
            sg += slope
            far += squares - reach * _sum(table, first, last, 3)
            least = tl.load(model + LEAST_SQUARED)
            far_from_zero += squares - reach * least * _sum(table, first, last, 4)
    finite = wrong == 0
    new = tl.load(gamma)
    if (tl.load(live + model_at + MOVES) != 0) & finite:
        new = _damp(model, averages, new, lr_ref, ss, sy, sg, tl.minimum(far, far_from_zero))
        tl.store(gamma, new)
    for i in range(spans):
        span, rate = numbers + spans_at + i * SPAN_WORDS, rates + i * RATE_WORDS
        step = _lr(live, numbers, spans_at + i * SPAN_WORDS) * new
        tl.store(rate + RATE_BETA, tl.load(span + BETA).to(tl.float32))
        tl.store(rate + RATE_L2, tl.load(span + L2).to(tl.float32))
        tl.store(rate + RATE_DECAY, (step * tl.load(span + DECAY)).to(tl.float32))
        tl.store(rate + RATE_STEP, (step * tl.load(span + FACTOR)).to(tl.float32))
    tl.store(marks, finite.to(tl.float32))
    for i in range(batches):
        _mark(live, numbers, batches_at + i * BATCH_WORDS, model, marks + 1 + i * MARK_WORDS, finite)


@triton.jit
def _damp(model, averages, gamma, lr_ref, ss, sy, sg, far):
    one = tl.full((), 1.0, tl.float64)
    accepted = ss > tl.load(model + TINY)
    ess, esy, esg = tl.load(averages), tl.load(averages + 1), tl.load(averages + 2)
    weight = tl.where(ess > 0.0, tl.load(model + LATER), one)
    ess = tl.where(accepted, (one - weight) * ess + weight * ss, ess)
    esy = tl.where(accepted, (one - weight) * esy + weight * sy, esy)
    esg = tl.where(accepted, (one - weight) * esg + weight * sg, esg)
    tl.store(averages, ess)
    tl.store(averages + 1, esy)
    tl.store(averages + 2, esg)
    allowed = tl.load(model + SMALL) + ess * tl.load(model + CAP) / tl.maximum(lr_ref, tl.load(model + TINY))
    free = tl.minimum(esg, far) <= 0.0
    factor = tl.where(accepted, tl.where(free, tl.load(model + GROWTH), tl.load(model + FADE)), one)
    return tl.minimum(allowed / tl.maximum(esy, allowed), factor * gamma)


@triton.jit
def _mark(live, numbers, batch, model, mark, finite):
    """The weight of g^2 in its mean, eq. (19): 1 until there was a finite gradient."""
    newest = tl.load(numbers + batch + NEWEST)
    address = tl.load(live + batch + STEP_ADDRESS)
    if address != 0:
        step = address.to(tl.pointer_type(tl.float64))
        kept, count = tl.load(model + KEPT), tl.load(step)
        one = tl.full((), 1.0, tl.float64)
        newest = (one - kept) / (one - kept * tl.exp(count * tl.load(model + LOG_KEPT)))
        tl.store(step, count + finite.to(tl.float64))
    started = tl.load(mark + MARK_STARTED)
    tl.store(mark + MARK_NEWEST, tl.where(started > 0.0, newest.to(tl.float32), 1.0))
    tl.store(mark + MARK_STARTED, tl.maximum(started, finite.to(tl.float32)))


@triton.jit(do_not_specialize=["spans_at"])
def secants(table, numbers, spans_at, marks, sums):
    """Of each tensor: the sums of its chunks, scaled up, and its elements; 0, no pair, where nothing moved."""
    row = table + tl.program_id(0) * TENSOR_WORDS
    first = tl.load(row + FIRST)
    count = tl.load(row + CHUNKS)
    n = tl.load(row + N).to(tl.float64)
    scale = n / tl.maximum(tl.load(row + LENGTH), 1).to(tl.float64)
    factor = tl.load(numbers + spans_at + tl.load(row + SPAN) * SPAN_WORDS + FACTOR)
    zeros = tl.zeros((128,), tl.float64)
    ss, squares, sg, xx = zeros, zeros, zeros, zeros
    for begin in range(0, count, 128):
        chunk = begin + tl.arange(0, 128)
        there = chunk < count
        own = sums + (first + chunk) * 4
        ss += tl.load(own, mask=there, other=0.0)
        squares += tl.load(own + 1, mask=there, other=0.0)
        sg += tl.load(own + 2, mask=there, other=0.0)
        xx += tl.load(own + 3, mask=there, other=0.0)
    secant = tl.load(row + SECANT).to(tl.pointer_type(tl.float64))
    tl.store(secant, tl.sum(ss, 0) * scale / factor)
    tl.store(secant + 1, tl.sum(squares, 0) * scale)
    tl.store(secant + 2, tl.sum(sg, 0) * scale)
    tl.store(secant + 3, tl.sum(xx, 0) * scale)
    tl.store(secant + 4, n * tl.load(marks).to(tl.float64))
