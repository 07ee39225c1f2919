"""Loading of the landmarks, and the weights by which queries read them."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    landmark_features,
    landmark_products,
    load_core,
    load_rows,
    load_vector,
    mm,
    operand,
    split,
    turned_features,
    zeros,
)


@triton.jit
def load_marks(base, stride, block, dtype: tl.constexpr, F: tl.constexpr):
    """Columns block * BLOCK_D .. of the landmarks, [PAD_M, BLOCK_D]."""
    offs_d = block * F.BLOCK_D + tl.arange(0, F.BLOCK_D)
    offs_m = tl.arange(0, F.PAD_M)
    inside = (offs_m < F.MARKS)[:, None] & (offs_d < F.DIM)[None, :]
    ptrs = base + offs_m[:, None] * stride + offs_d[None, :]
    return tl.load(ptrs, mask=inside, other=0.0).to(dtype)


@triton.jit
def landmark_queries(marks, b, h, dtype: tl.constexpr, F: tl.constexpr):
    """(pointer, stride, tile) of sample b and key head h: what keys are scored by."""
    ptr = marks.lq + tl.cast(b, tl.int64) * marks.lq_strides[0] + h * marks.lq_strides[1]
    return ptr, marks.lq_strides[2], load_marks(ptr, marks.lq_strides[2], 0, dtype, F)


@triton.jit
def half_ptr(marks, b, h):
    """Pointer to half2 of sample b and key head h, MARKS numbers."""
    return marks.half2 + b * marks.half_strides[0] + h * marks.half_strides[1]


@triton.jit
def landmark_keys(marks, b, h, dtype: tl.constexpr, F: tl.constexpr):
    """(pointer, stride, tile, core, half2) of sample b and key head h: what queries read."""
    ptr = marks.lk + tl.cast(b, tl.int64) * marks.lk_strides[0] + h * marks.lk_strides[1]
    core = marks.core + tl.cast(b, tl.int64) * marks.core_strides[0] + h * marks.core_strides[1]
    half2 = 0.0
    if F.MASS:
        half2 = load_vector(half_ptr(marks, b, h), F)
    tile = load_marks(ptr, marks.lk_strides[2], 0, dtype, F)
    return ptr, marks.lk_strides[2], tile, load_core(core, marks.core_strides[2], F), half2


@triton.jit
def core_parts(core, F: tl.constexpr):
    """A core as `core_mm` takes it: (operand, what it lost), [PAD_M, PAD_M] each."""
    high, low = operand(core, F), 0.0
    if F.SPLIT:
        high, low = split(core)
    return high, low


@triton.jit
def split_keys(marks, b, h, dtype: tl.constexpr, F: tl.constexpr):
    """`landmark_keys` for the backward: the core as `core_mm` takes it, a pointer to half2."""
    lk = landmark_keys(marks, b, h, dtype, F)
    half2 = 0.0
    if F.MASS:
        half2 = half_ptr(marks, b, h)
    return lk[0], lk[1], lk[2], core_parts(lk[3], F), half2


@triton.jit
def load_decay(marks, h, F: tl.constexpr):
    """Decay a token in log2 units, [PAD_M]."""
    decay2 = 0.0
    if F.DECAY:
        decay2 = load_vector(marks.decay + h * marks.decay_stride, F) * LOG2E
    return decay2


@triton.jit
def core_mm(core, b, TURNED: tl.constexpr, F: tl.constexpr):
    """core b, or core^T b, alike."""
    high, low = core
    if TURNED:
        high = tl.trans(high)
    if F.SPLIT:
        if TURNED:
            low = tl.trans(low)
        b_high, b_low = split(b)
        product = tl.dot(high, b_low, tl.dot(low, b_high))
        product = tl.dot(high, b_high, product)
    else:
        product = mm(high, b, F)
    return product


@triton.jit
def dots_of_block(dots, x, t0, keep, y, n, F: tl.constexpr):
    """`dots` and those of block n of the columns."""
    d0 = n * F.BLOCK_D
    some = load_rows(x[0] + d0, t0, x[1], keep, F.DIM - d0, F.CHUNK, F.BLOCK_D, True,
                     F.SLOT > 0)  # fmt: skip
    tile = load_marks(y[0], y[1], n, some.dtype, F)
    return tl.dot(tile, tl.trans(some), dots, input_precision=F.PRECISION)


@triton.jit
def landmark_dots(x, t0, keep, y, F: tl.constexpr):
    """(landmark . x with a landmark a row, [PAD_M, CHUNK]; the tokens if they fit one block)."""
    rows = 0.0
    if F.BLOCKS_D == 1:
        rows = load_rows(x[0], t0, x[1], keep, F.DIM, F.CHUNK, F.BLOCK_D, F.DIM != F.BLOCK_D,
                         F.SLOT > 0)  # fmt: skip
        dots = tl.dot(y[2], tl.trans(rows), input_precision=F.PRECISION)
    else:
        dots = zeros(F.PAD_M, F.CHUNK)
        BLOCKS: tl.constexpr = F.BLOCKS_D
        if BLOCKS == 2:
            for n in tl.static_range(BLOCKS):
                dots = dots_of_block(dots, x, t0, keep, y, n, F)
        else:  # no block of landmarks stays in shared memory
            for n in tl.range(BLOCKS):
                dots = dots_of_block(dots, x, t0, keep, y, n, F)
    return dots, rows


@triton.jit
def own_columns(marks, part, F: tl.constexpr):
    """Columns of landmarks that a program has, [PAD_M, BLOCK_D]."""
    if F.BLOCKS_D == 1:
        tile = marks[2]
    else:
        tile = load_marks(marks[0], marks[1], part, marks[2].dtype, F)
    return tile


@triton.jit
def own_tokens(rows, x, t0, keep, part, F: tl.constexpr):
    """Columns of a chunk's tokens that a program has; `rows` from `landmark_dots`."""
    if F.BLOCKS_D > 1:
        d0 = part * F.BLOCK_D
        rows = load_rows(x[0] + d0, t0, x[1], keep, F.DIM - d0, F.CHUNK, F.BLOCK_D,
                         F.DIM % F.BLOCK_D != 0, F.SLOT > 0)  # fmt: skip
    return rows


@triton.jit
def divided(W, norm, half2, F: tl.constexpr):
    """Weights on R, [CHUNK, PAD_M], from features times core; `norm` is log2 of Z."""
    if F.MASS:
        held = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[None, :], norm - half2[None, :],
                        float("-inf"))  # fmt: skip
        top = tl.max(held, 1)
        unseen = top == float("-inf")
        held = tl.exp2(held - tl.where(unseen, 0.0, top)[:, None])
        mass = tl.where(unseen, 1.0, tl.sum(W * held, 1))
        W = W * (held / mass[:, None])
    return W


@triton.jit
def turned_divided(W, norm, half2, F: tl.constexpr):
    """(`divided` with a landmark a row, [PAD_M, CHUNK]; the factor of features times core)."""
    factor = 1.0
    if F.MASS:
        held = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[:, None], norm - half2[:, None],
                        float("-inf"))  # fmt: skip
        top = tl.max(held, 0)
        unseen = top == float("-inf")
        held = tl.exp2(held - tl.where(unseen, 0.0, top)[None, :])
        mass = tl.where(unseen, 1.0, tl.sum(W * held, 0))
        factor = held / mass[None, :]
        W = W * factor
    return W, factor


@triton.jit
def times_core(features, core, F: tl.constexpr):
    """features core, whose large entries cancel: in bfloat16 three products, tf32 while it fits."""
    if F.SPLIT and F.PAD_M > 64:
        high, low = split(features)
        core_high, core_low = split(core)
        product = tl.dot(high, core_low, tl.dot(low, core_high))
        product = tl.dot(high, core_high, product)
    else:
        product = tl.dot(features, core, input_precision=F.PRECISION)
    return product


@triton.jit
def read_weights(queries, t0, there, lk, norm, marks, F: tl.constexpr):
    """Weights on R of a chunk of queries of one head, [CHUNK, PAD_M]."""
    dots = landmark_products(queries[0], t0, queries[1], there, tl.trans(lk[2]), lk[0], lk[1], F)
    W = times_core(landmark_features(dots, lk[4], marks, F), lk[3], F)
    return divided(W, norm, lk[4], F)


@triton.jit
def turned_weights(queries, t0, there, lk, norm, marks, F: tl.constexpr):
    """(features, weights on R, their factor, the queries if they fit one block); all but the last
    are [PAD_M, CHUNK]."""
    dots, q = landmark_dots(queries, t0, there, lk, F)
    half2 = 0.0
    if F.MASS:
        half2 = load_vector(lk[4], F)
    features = turned_features(dots, half2, marks, F)
    W = core_mm(lk[3], features, True, F)
    W, factor = turned_divided(W, norm, half2, F)
    return features, W, factor, q
