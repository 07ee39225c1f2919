"""How queries read the landmarks, and how landmarks are loaded."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    full,
    landmark_features,
    landmark_products,
    load_core,
    load_rows,
    load_vector,
    mm,
    mm_core,
    operand,
    read_scores,
    turned_features,
    turned_scores,
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
def landmark_keys(marks, b, h, dtype: tl.constexpr, F: tl.constexpr):
    """What queries read: (pointer, stride, tile, core, half2).

    Of several tiles only where they lie, and half2 of the program's own landmarks: (pointer,
    stride, pointer and stride of the core, half2, pointer of what is half2 to the tiles).
    """
    ptr = marks.lk + tl.cast(b, tl.int64) * marks.lk_strides[0] + h * marks.lk_strides[1]
    core = marks.core + tl.cast(b, tl.int64) * marks.core_strides[0] + h * marks.core_strides[1]
    half2, read_half2 = 0.0, 0.0
    if F.MASS:
        to_head = b * marks.half_strides[0] + h * marks.half_strides[1]
        half2 = load_vector(marks.half2 + to_head, F)
        read_half2 = marks.read_half2 + to_head
    if F.TILES > 1:
        lk = (ptr, marks.lk_strides[2], core, marks.core_strides[2], half2, read_half2)
    else:
        tile = load_marks(ptr, marks.lk_strides[2], 0, dtype, F)
        lk = (ptr, marks.lk_strides[2], tile, load_core(core, marks.core_strides[2], F, F), half2)
    return lk


@triton.jit
def tile_of(lk, first, dtype: tl.constexpr, T: tl.constexpr, F: tl.constexpr):
    """`landmark_keys` of the tile whose features are T, from one landmark on, out of several."""
    ptr = lk[0] + first * lk[1]
    half2 = 0.0
    if F.MASS:
        half2 = load_vector(lk[5] + first, T)
    core = load_core(lk[2] + first * lk[3], lk[3], T, F)
    return ptr, lk[1], load_marks(ptr, lk[1], 0, dtype, T), core, half2


@triton.jit
def split_keys(marks, b, h, dtype: tl.constexpr, F: tl.constexpr):
    """`landmark_keys` for the backward, the core of a single tile split."""
    lk = landmark_keys(marks, b, h, dtype, F)
    if F.TILES == 1:
        lk = split_core(lk, F)
    return lk


@triton.jit
def focus_of(lk, first, dtype: tl.constexpr, F: tl.constexpr):
    """The landmarks that a launch of the backward has the gradients of, their core split."""
    if F.TILES > 1:
        FOCUS: tl.constexpr = F.READING[F.FOCUS]
        lk = split_core(tile_of(lk, first, dtype, FOCUS, F), F)
    return lk


@triton.jit
def load_decay(marks, h, F: tl.constexpr):
    """Decay a token in log2 units, [PAD_M]."""
    decay2 = 0.0
    if F.DECAY:
        decay2 = load_vector(marks.decay + h * marks.decay_stride, F) * LOG2E
    return decay2


@triton.jit
def split_core(lk, F: tl.constexpr):
    """One tile of landmark keys, with its core as `core_mm` takes it: (operand, what it lost)."""
    high, low = operand(lk[3], F), 0.0
    if F.SPLIT:
        high, low = split(lk[3])
    return lk[0], lk[1], lk[2], (high, low), lk[4]


@triton.jit
def split(x):
    """(high, low): two bfloat16 that add up to x, to 16 bits."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


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
def landmark_dots(x, t0, keep, y, F: tl.constexpr):
    """(landmark . x with a landmark a row, [PAD_M, CHUNK]; the tokens if they fit one block)."""
    if F.BLOCKS_D == 1:
        rows = load_rows(x[0], t0, x[1], keep, F.DIM, F.CHUNK, F.BLOCK_D, F.DIM != F.BLOCK_D)
        dots = tl.dot(y[2], tl.trans(rows), input_precision=F.PRECISION)
    else:
        dots = zeros(F.PAD_M, F.CHUNK)
        BLOCKS: tl.constexpr = F.BLOCKS_D
        for n in tl.static_range(BLOCKS):
            rows = load_rows(x[0] + n * F.BLOCK_D, t0, x[1], keep, F.DIM - n * F.BLOCK_D, F.CHUNK,
                             F.BLOCK_D, True)  # fmt: skip
            tile = load_marks(y[0], y[1], n, rows.dtype, F)
            dots = tl.dot(tile, tl.trans(rows), dots, input_precision=F.PRECISION)
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
                         F.DIM % F.BLOCK_D != 0)  # fmt: skip
    return rows


@triton.jit
def divided(W, norm, half2, F: tl.constexpr):
    """(W, top, mass): weights on R, of rows `W` of features times core; norm is log2 of Z.

    Rows of a block out of several are left to be divided by what the others hold as well: W is
    in units of 2^top, and sums up to `mass`.
    """
    top, mass = 0.0, 1.0
    if F.MASS:
        held = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[None, :], norm - half2[None, :],
                        float("-inf"))  # fmt: skip
        top = tl.max(held, 1)
        unseen = top == float("-inf")
        held = tl.exp2(held - tl.where(unseen, 0.0, top)[:, None])
        mass = tl.where(unseen, 1.0, tl.sum(W * held, 1))
        if F.TILES > 1:
            W = W * held
        else:
            W = W * (held / mass[:, None])
    return W, top, mass


@triton.jit
def turned_divided(W, norm, half2, given, F: tl.constexpr):
    """(W, factor that made it of features times core), with a landmark a row; `given` has top and
    mass of the rows of several blocks."""
    factor = 1.0
    if F.MASS:
        held = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[:, None], norm - half2[:, None],
                        float("-inf"))  # fmt: skip
        if F.TILES > 1:
            held = tl.exp2(held - given[0][None, :])
            mass = given[1]
        else:
            top = tl.max(held, 0)
            unseen = top == float("-inf")
            held = tl.exp2(held - tl.where(unseen, 0.0, top)[None, :])
            mass = tl.where(unseen, 1.0, tl.sum(W * held, 0))
        factor = held / mass[None, :]
        W = W * factor
    return W, factor


@triton.jit
def given_masses(masses, head, t0, there, F: tl.constexpr):
    """(top, mass, dO . out) of the queries of a chunk where landmarks come in blocks."""
    given = (0.0, 1.0, 0.0)
    if F.MASS and F.TILES > 1:
        rows = head + t0 + tl.arange(0, F.CHUNK)
        given = (
            tl.load(masses.top + rows, mask=there, other=0.0),
            tl.load(masses.mass + rows, mask=there, other=1.0),
            tl.load(masses.delta + rows, mask=there, other=0.0),
        )
    return given


@triton.jit
def read_weights(queries, t0, there, lk, norm, marks, F: tl.constexpr):
    """(W, top, mass) of a chunk of queries of one head, as `divided` has them."""
    if F.TILES > 1:
        top, total, W = full(F.CHUNK, float("-inf")), full(F.CHUNK, 0.0), zeros(F.CHUNK, F.PAD_M)
        FULL: tl.constexpr = F.READING[0]  # the last tile may be smaller than the others
        LAST: tl.constexpr = F.READING[F.TILES - 1]
        for t in tl.range(F.TILES - 1, num_stages=1):
            top, total, W = read_tile(top, total, W, queries, t0, there, lk, t, marks, FULL, F)
        top, total, W = read_tile(top, total, W, queries, t0, there, lk, F.TILES - 1, marks, LAST,
                                  F)  # fmt: skip
        if not F.MASS:
            W = W * (1.0 / total)[:, None]
    else:
        dots = landmark_products(queries[0], t0, queries[1], there, tl.trans(lk[2]), lk[0], lk[1],
                                 F)  # fmt: skip
        W = mm_core(landmark_features(dots, lk[4], marks, F), lk[3], F)
    return divided(W, norm, lk[4], F)


@triton.jit
def read_tile(top, total, W, queries, t0, there, lk, t, marks, T: tl.constexpr, F: tl.constexpr):
    """One step of an online softmax over tiles of landmarks, whose values are rows of the core."""
    lk = tile_of(lk, t * F.STEP, queries[0].dtype.element_ty, T, F)
    dots = landmark_products(queries[0], t0, queries[1], there, tl.trans(lk[2]), lk[0], lk[1], T)
    f = read_scores(dots, lk[4], marks, T)
    higher = tl.maximum(top, tl.max(f, 1))
    e, alpha = tl.exp2(f - higher[:, None]), tl.exp2(top - higher)
    W = W * alpha[:, None] + mm_core(e, lk[3], F)
    return higher, total * alpha + tl.sum(e, 1), W


@triton.jit
def turned_reading(queries, t0, there, lk, focus, norm, given, marks, F: tl.constexpr):
    """(features of the focus, W, factor, the queries if they fit one block): a landmark a row."""
    if F.TILES > 1:
        top, total, W = full(F.CHUNK, float("-inf")), full(F.CHUNK, 0.0), zeros(F.PAD_M, F.CHUNK)
        FULL: tl.constexpr = F.READING[0]
        LAST: tl.constexpr = F.READING[F.TILES - 1]
        FOCUS: tl.constexpr = F.READING[F.FOCUS]
        for t in tl.range(F.TILES - 1, num_stages=1):
            top, total, W = turned_tile(top, total, W, queries, t0, there, lk, t, marks, FULL, F)
        top, total, W = turned_tile(top, total, W, queries, t0, there, lk, F.TILES - 1, marks, LAST,
                                    F)  # fmt: skip
        f, q = focus_scores(queries, t0, there, focus, marks, FOCUS)
        features = tl.exp2(f - top[None, :])
        if not F.MASS:
            share = 1.0 / total
            features, W = features * share[None, :], W * share[None, :]
    else:
        dots, q = landmark_dots(queries, t0, there, lk, F)
        features = turned_features(dots, lk[4], marks, F)
        W = core_mm(lk[3], features, True, F)
    W, factor = turned_divided(W, norm, lk[4], given, F)
    return features, W, factor, q


@triton.jit
def focus_scores(queries, t0, there, lk, marks, T: tl.constexpr):
    """(scores of one tile of landmarks, the queries)."""
    dots, q = landmark_dots(queries, t0, there, lk, T)
    return turned_scores(dots, lk[4], marks, T), q


@triton.jit
def turned_tile(top, total, W, queries, t0, there, lk, t, marks, T: tl.constexpr,
                F: tl.constexpr):  # fmt: skip
    """`read_tile` with a landmark a row."""
    lk = split_core(tile_of(lk, t * F.STEP, queries[0].dtype.element_ty, T, F), F)
    f, q = focus_scores(queries, t0, there, lk, marks, T)
    higher = tl.maximum(top, tl.max(f, 0))
    e, alpha = tl.exp2(f - higher[None, :]), tl.exp2(top - higher)
    W = W * alpha[None, :] + core_mm(lk[3], e, True, F)
    return higher, total * alpha + tl.sum(e, 0), W
