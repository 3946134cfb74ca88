"""The kernels of the Triton path (``fused.py`` launches them). The only file that imports triton.

Two passes over everything: ``look`` asks whether all gradients are finite and forms <s, g>; ``update`` takes the step.
Between them ``settle`` brings gamma up to date in one program, and after them ``secants`` adds up what the next step
needs. Words of memory traffic per parameter: one of g, seven of g, v, h, x and of the new v, h, x, two sixteenths of s.
Each program works on CHUNK elements of one tensor, so that one launch serves hundreds of tensors, found by their
addresses in a table. Eq. numbers: docs/the-method.md.
"""
# mypy: ignore-errors
# ruff: noqa: SIM108 - Triton compiles statements; a conditional expression of tensors is another thing to it.

import torch
import triton
import triton.language as tl

OF_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

CHUNK = tl.constexpr(4096)  # elements of a program
BLOCK = tl.constexpr(1024)  # of them at once
LANES = tl.constexpr(1024)  # of the sums over programs and tensors
# Words of a tensor's row in the table: addresses of x, v, h, mask, s and the secant; elements; the run's length and
# how many places it has; the row of its settings; its first chunk and how many it has.
X, V, H, MASK, S, SECANT, N, LENGTH, PLACES, SPAN, FIRST, CHUNKS, TENSOR_WORDS = map(tl.constexpr, range(13))
# Words that change from step to step: of tensors of one group, lr or its address (not 0), momentum, L2 decay, decoupled
# decay, 1 - momentum in the metric, else 1; which tensors and chunks.
LR, LR_ADDRESS, BETA, L2, DECAY, FACTOR, TENSOR, TENSORS_END, CHUNK_FIRST, CHUNKS_END, SPAN_WORDS = map(
    tl.constexpr, range(11)
)
# Of a batch: the turn of the run, now and at the last step; the weight of g^2, or the address of the step (not 0).
TURN, LAST_TURN, NEWEST, STEP_ADDRESS, BATCH_WORDS = map(tl.constexpr, range(5))
# Of the model: whether gamma moves; its numbers.
MOVES, CAP, LATER, GROWTH, FADE, REACH_SQUARED, LEAST_SQUARED, TINY, SMALL, KEPT, LOG_KEPT, MODEL_WORDS = map(
    tl.constexpr, range(12)
)
# What ``settle`` leaves for ``update``: of each span; of each batch the weight of g^2, and whether it ever had one.
RATE_BETA, RATE_L2, RATE_DECAY, RATE_STEP, RATE_WORDS = map(tl.constexpr, range(5))
MARK_NEWEST, MARK_STARTED, MARK_WORDS = map(tl.constexpr, range(3))
FLOOR = tl.constexpr(1e-8)  # damping.FISHER_FLOOR


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:  # loads of 16 bytes
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _start(row, turn):
    """Where the run begins, eq. (22)."""
    length = tl.load(row + LENGTH)
    return tl.minimum(turn % tl.load(row + PLACES) * length, tl.load(row + N) - length)


@triton.jit
def _look_tile(g, s, begin, length, rest, total, wrong, LOOK: tl.constexpr, RAGGED: tl.constexpr):
    """``begin``: of the run, in elements after the tile's first. ``rest``: elements from there to the tensor's end."""
    lane = tl.arange(0, BLOCK)
    inside = lane < rest
    run = (lane >= begin) & (lane < begin + length)
    if LOOK:
        if RAGGED:
            own = tl.load(g + lane, mask=inside, other=0.0).to(tl.float32)
        else:
            own = tl.load(g + lane).to(tl.float32)
        wrong += (tl.abs(own) < float("inf")).to(tl.int32) ^ 1  # False for NaN
    if (begin < BLOCK) & (begin + length > 0):
        if not LOOK:
            own = tl.load(g + lane, mask=run, other=0.0).to(tl.float32)
        moved = tl.load(s - begin + lane, mask=run, other=0.0)
        total += tl.sum(tl.where(run, own, 0.0).to(tl.float64) * moved.to(tl.float64), 0)
    return total, wrong


@triton.jit(do_not_specialize=["turn_at", "first_chunk"])
def look(
    table, chunks, live, turn_at, first_chunk, products, wrongs,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, LOOK: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Of each chunk: <s, g> on the run of the last step, scaled up to the tensor; how many gradients are not finite."""
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(chunks + chunk)
    row = table + tensor * TENSOR_WORDS
    n = tl.load(row + N)
    length = tl.load(row + LENGTH)
    start = _start(row, tl.load(live + turn_at + LAST_TURN))
    first = (chunk - tl.load(row + FIRST)) * CHUNK
    g = _pointer(tl.load(live + tensor), DTYPE, ALIGNED)
    s = tl.load(row + S).to(tl.pointer_type(tl.float32))
    total = tl.full((), 0.0, tl.float64)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, CHUNK, BLOCK):
        at = first + i
        if at + BLOCK <= n:
            total, wrong = _look_tile(g + at, s, start - at, length, n - at, total, wrong, LOOK, False)
        elif at < n:
            total, wrong = _look_tile(g + at, s, start - at, length, n - at, total, wrong, LOOK, True)
    if MAXIMIZE:
        total = -total
    tl.store(products + chunk, total * n.to(tl.float64) / tl.maximum(length, 1).to(tl.float64))
    tl.store(wrongs + chunk, tl.sum(wrong, 0))


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


@triton.jit
def _update_tile(
    x, g, v, h, mask, s, begin, length, rest, beta, l2, decay, rate, newest, ss, squares, sg, xx,
    squared, masked,
    FISHER: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, SQUARES: tl.constexpr, MASKS: tl.constexpr,
    RAGGED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Eq. (16) of one tile. ``squared``, ``masked``: whether the tensor has h, a mask."""
    lane = tl.arange(0, BLOCK)
    inside = lane < rest
    if RAGGED:
        before = tl.load(x + lane, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(g + lane, mask=inside, other=0.0).to(tl.float32)
        moved = tl.load(v + lane, mask=inside, other=0.0)
    else:
        before = tl.load(x + lane).to(tl.float32)
        gradient = tl.load(g + lane).to(tl.float32)
        moved = tl.load(v + lane)
    if MAXIMIZE:
        gradient = -gradient
    steered = gradient + l2 * before
    moved = beta * moved + steered
    direction = moved
    if NESTEROV:
        direction = steered + beta * moved
    root = 1.0
    if FISHER:
        if RAGGED:
            mean = tl.load(h + lane, mask=inside, other=0.0)
            mean += newest * (gradient * gradient - mean)
            tl.store(h + lane, mean, mask=inside)
        else:
            mean = tl.load(h + lane)
            mean += newest * (gradient * gradient - mean)
            tl.store(h + lane, mean)
        root = tl.sqrt(mean) + FLOOR
        direction = direction / root
    elif SQUARES:
        own = inside & squared
        mean = tl.load(h + lane, mask=own, other=0.0)
        tl.store(h + lane, mean + newest * (gradient * gradient - mean), mask=own)
    after = before - (rate * direction + decay * before)
    if MASKS:
        after = tl.where(tl.load(mask + lane, mask=inside & masked, other=1) != 0, after, 0.0)
    rounded = after.to(DTYPE)
    if RAGGED:
        tl.store(x + lane, rounded, mask=inside)
        tl.store(v + lane, moved, mask=inside)
    else:
        tl.store(x + lane, rounded)
        tl.store(v + lane, moved)
    if (begin < BLOCK) & (begin + length > 0):
        # The displacement is measured, not computed: rounding, decay and masks are in it.
        run = (lane >= begin) & (lane < begin + length)
        displaced = tl.where(run, rounded.to(tl.float32) - before, 0.0)
        tl.store(s - begin + lane, displaced, mask=run)
        wide = displaced.to(tl.float64)
        square = wide * wide
        if FISHER:
            ss += tl.sum(square * root.to(tl.float64), 0)
        squares += tl.sum(square, 0)
        sg += tl.sum(wide * tl.where(run, gradient, 0.0).to(tl.float64), 0)
        start = tl.where(run, before, 0.0).to(tl.float64)
        xx += tl.sum(start * start, 0)
    return ss, squares, sg, xx


@triton.jit(do_not_specialize=["turn_at", "first_chunk", "mark_at"])
def update(
    table, chunks, live, turn_at, first_chunk, mark_at, rates, marks, sums,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, FISHER: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    SQUARES: tl.constexpr, MASKS: tl.constexpr,
):  # fmt: skip
    """One step of each chunk's elements; ``sums``: s'D^{-1}s (1 - momentum), s's, <s, g>, x'x on this step's run."""
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(chunks + chunk)
    row = table + tensor * TENSOR_WORDS
    n = tl.load(row + N)
    length = tl.load(row + LENGTH)
    start = _start(row, tl.load(live + turn_at + TURN))
    first = (chunk - tl.load(row + FIRST)) * CHUNK
    s = tl.load(row + S).to(tl.pointer_type(tl.float32))
    zero = tl.full((), 0.0, tl.float64)
    ss, squares, sg, xx = zero, zero, zero, zero
    if tl.load(marks) > 0.0:
        x = _pointer(tl.load(row + X), DTYPE, ALIGNED)
        g = _pointer(tl.load(live + tensor), DTYPE, ALIGNED)
        v = _pointer(tl.load(row + V), tl.float32, ALIGNED)
        h = _pointer(tl.load(row + H), tl.float32, ALIGNED)
        mask = _pointer(tl.load(row + MASK), tl.int8, ALIGNED)
        squared, masked = tl.load(row + H) != 0, tl.load(row + MASK) != 0
        own = rates + tl.load(row + SPAN) * RATE_WORDS
        beta, l2 = tl.load(own + RATE_BETA), tl.load(own + RATE_L2)
        decay, rate = tl.load(own + RATE_DECAY), tl.load(own + RATE_STEP)
        newest = tl.load(marks + mark_at + MARK_NEWEST)
        for i in range(0, CHUNK, BLOCK):
            at = first + i
            if at + BLOCK <= n:
                ss, squares, sg, xx = _update_tile(
                    x + at, g + at, v + at, h + at, mask + at, s, start - at, length, n - at, beta, l2, decay, rate,
                    newest, ss, squares, sg, xx, squared, masked, FISHER, NESTEROV, MAXIMIZE, SQUARES, MASKS, False,
                    DTYPE,
                )  # fmt: skip
            elif at < n:
                ss, squares, sg, xx = _update_tile(
                    x + at, g + at, v + at, h + at, mask + at, s, start - at, length, n - at, beta, l2, decay, rate,
                    newest, ss, squares, sg, xx, squared, masked, FISHER, NESTEROV, MAXIMIZE, SQUARES, MASKS, True,
                    DTYPE,
                )  # fmt: skip
        if not FISHER:
            ss = squares
    else:
        for i in range(0, CHUNK, BLOCK):
            lane = tl.arange(0, BLOCK) + first + i
            tl.store(s + (lane - start), 0.0, mask=(lane >= start) & (lane < start + length))
    own = sums + chunk * 4
    tl.store(own, ss)
    tl.store(own + 1, squares)
    tl.store(own + 2, sg)
    tl.store(own + 3, xx)


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
