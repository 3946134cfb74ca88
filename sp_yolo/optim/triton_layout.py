"""What lies where in the tables of the Triton path: the kernels read them, ``fused.py`` writes them."""
# mypy: ignore-errors

import torch
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
