"""The passes of the Triton path over all elements (``fused.py`` launches them); see ``triton_settle.py`` for the rest.

``look`` asks whether all gradients are finite and forms <s, g>; ``update`` takes the step. Words of memory traffic per
parameter: one of g, seven of g, v, h, x and of the new v, h, x, two sixteenths of s. Each program works on CHUNK
elements of one tensor, so that one launch serves hundreds of tensors, found by their addresses in a table.
Eq. numbers: docs/the-method.md.
"""
# mypy: ignore-errors
# ruff: noqa: SIM108 - Triton compiles statements; a conditional expression of tensors is another thing to it.

import triton
import triton.language as tl

from sp_yolo.optim.triton_layout import (
    BLOCK,
    CHUNK,
    FIRST,
    FLOOR,
    LAST_TURN,
    LENGTH,
    MARK_NEWEST,
    MASK,
    PLACES,
    RATE_BETA,
    RATE_DECAY,
    RATE_L2,
    RATE_STEP,
    RATE_WORDS,
    SPAN,
    TENSOR_WORDS,
    TURN,
    H,
    N,
    S,
    V,
    X,
)


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
