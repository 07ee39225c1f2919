"""Functions that the kernels share: places of queries, tiles of keys, logits and their gradient.

Logits live in the log2 domain, as those of block-sparse attention.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from ..block_sparse.primitives import (
    INTERPRETED,
    SELECT,
    load_tile,
    log2_factor,
    online_softmax,
    tanh,
)

NONE = tl.constexpr(2**31 - 1)  # first token of a block that is not there
WITHIN = SELECT.replace("TEST", "setp.lt.u32 seen, $1, $2")
WITHIN_OR_ZERO = tl.constexpr(WITHIN.replace("OTHER", "0f00000000"))
WITHIN_OR_INF = tl.constexpr(WITHIN.replace("OTHER", "0fFF800000"))


@triton.jit
def bounds_of(b, sizes, modifiers, F: tl.constexpr):
    """(position of query 0, number of keys) of sample b."""
    offset = sizes.kv_len - sizes.q_len
    end_n = sizes.kv_len
    if F.OFFSET:
        offset = tl.load(modifiers.offsets + b * modifiers.offset_stride)
    if F.LENGTHS:
        end_n = tl.minimum(end_n, tl.load(modifiers.lengths + b))
    return offset, end_n


@triton.jit
def place_of(at, sizes, modifiers, F: tl.constexpr):
    """(first token of the sequence, block counted from there) of position `at`."""
    first = at * 0
    if F.PACKED:
        first = tl.load(modifiers.starts + tl.minimum(tl.maximum(at, 0), sizes.kv_len - 1))
    return first, (at - first) // F.SIZE


@triton.jit
def near_span(at, end_n, sizes, modifiers, F: tl.constexpr):
    """(first key of the near field, number of its keys) of a query at position `at`."""
    first, own = place_of(at, sizes, modifiers, F)
    low = first + tl.maximum(own - sizes.near, 0) * F.SIZE
    return low, tl.maximum(tl.minimum(at + 1, end_n) - low, 0)


@triton.jit
def load_keys(inputs, b, h, start_n, end_n, sizes, modifiers, F: tl.constexpr):
    """Keys [BLOCK_N, PAD] and values [BLOCK_N, PAD_V] from start_n on, and whether each takes part;
    0 for those that do not.
    """
    b64, h64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    k_ptr = inputs.key + (b64 * inputs.key_strides[0] + h64 * inputs.key_strides[1])
    v_ptr = inputs.value + (b64 * inputs.value_strides[0] + h64 * inputs.value_strides[1])
    k_stride, v_stride = inputs.key_strides[2], inputs.value_strides[2]
    if F.WIDE:
        k_stride, v_stride = tl.cast(k_stride, tl.int64), tl.cast(v_stride, tl.int64)
    k = load_tile(k_ptr, start_n, k_stride, end_n, F.BLOCK_N, F.DIM, F.PAD, True)
    v = load_tile(v_ptr, start_n, v_stride, end_n, F.BLOCK_N, F.DIM_V, F.PAD_V, True)
    keep = True
    if F.KEEP:
        n = start_n + tl.arange(0, F.BLOCK_N)
        keep = tl.load(modifiers.keep + b64 * sizes.kv_len + n, mask=n < end_n, other=0) != 0
        k = tl.where(keep[:, None], k, 0.0)
        v = tl.where(keep[:, None], v, 0.0)
    return k, v, keep


@triton.jit
def pointers(base, strides, b, h, i):
    """Pointer to the row of each head h and query i, two vectors."""
    rows = tl.cast(b, tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    return base + (rows + i.to(tl.int64) * strides[2])


@triton.jit
def load_at(ptrs, inside, DIM: tl.constexpr, PAD: tl.constexpr):
    """Rows [BLOCK_M, PAD] at pointers, 0 outside."""
    offs_d = tl.arange(0, PAD)
    mask = inside[:, None]
    if DIM != PAD:
        mask = mask & (offs_d < DIM)[None, :]
    return tl.load(ptrs[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_at(ptrs, tile, inside, DIM: tl.constexpr, PAD: tl.constexpr):
    """Store rows [BLOCK_M, PAD] at pointers."""
    offs_d = tl.arange(0, PAD)
    mask = inside[:, None] & (offs_d < DIM)[None, :]
    tl.store(ptrs[:, None] + offs_d[None, :], tile.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def keep_within(distance, span, x, OTHER: tl.constexpr):
    """The elements of a float32 tile whose distance, an unsigned number, is below the span, OTHER
    in place of the rest. In PTX where it can be, as in block-sparse attention.
    """
    if not INTERPRETED and is_cuda():
        ASM: tl.constexpr = WITHIN_OR_ZERO if OTHER == 0.0 else WITHIN_OR_INF
        kept = tl.inline_asm_elementwise(
            ASM, "=f,r,r,f", [distance, span, x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        below = distance.to(tl.uint32, bitcast=True) < span.to(tl.uint32, bitcast=True)
        kept = tl.where(below, x, OTHER)
    return kept


@triton.jit
def hide(distance, keep, AXIS: tl.constexpr, F: tl.constexpr):
    """Distances of keys, beyond all spans where a key takes no part; `keep` lacks axis AXIS."""
    if F.KEEP:
        distance = tl.where(tl.expand_dims(keep, AXIS), distance, -1)  # the largest unsigned number
    return distance


@triton.jit
def near_place(sizes, F: tl.constexpr):
    """(pair of sample and query head, each of them, first query of the chunk's tile) of a program
    of the near field.
    """
    tiles = tl.cdiv(sizes.chunk, F.BLOCK_M)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    heads = sizes.heads * F.GROUP
    return pair, pair // heads, pair % heads, tile * F.BLOCK_M


@triton.jit
def near_rows(b, first, sizes, modifiers, F: tl.constexpr):
    """A tile of queries from `first` of the chunk on: vectors of the query of the chunk, of whether
    it is there, of the first key of its near field and of the number of its keys.
    """
    offset, end_n = bounds_of(b, sizes, modifiers, F)
    # [BLOCK_M]
    local = first + tl.arange(0, F.BLOCK_M)
    i = sizes.start + local
    low, span = near_span(i + offset, end_n, sizes, modifiers, F)
    return local, (local < sizes.chunk) & (i < sizes.q_len), low, span


@triton.jit
def near_bounds(b, first, sizes, modifiers, F: tl.constexpr):
    """Bounds of the keys that some query of such a tile sees."""
    offset, end_n = bounds_of(b, sizes, modifiers, F)
    row0 = sizes.start + first
    begin, _ = near_span(row0 + offset, end_n, sizes, modifiers, F)
    last = tl.minimum(tl.minimum(row0 + F.BLOCK_M, sizes.start + sizes.chunk), sizes.q_len) - 1
    return begin, tl.minimum(last + offset + 1, end_n)


@triton.jit
def load_near_keys(inputs, b, h, n, stop, low, sizes, modifiers, F: tl.constexpr):
    """Keys [BLOCK_N, PAD] and values [BLOCK_N, PAD_V] from n on, and their distances [BLOCK_M,
    BLOCK_N] from the starts of the near fields."""
    k, v, keep = load_keys(inputs, b, h, n, stop, sizes, modifiers, F)
    distance = (n + tl.arange(0, F.BLOCK_N))[None, :] - low[:, None]
    return k, v, hide(distance, keep, 0, F)


@triton.jit
def logits(qk, modifiers, F: tl.constexpr):
    """Logits, up to the `factor` of a plain score, and d capped / d scaled score."""
    slope = 1.0
    if F.SOFTCAP:
        t = tanh(qk * modifiers.scale)
        s = t * modifiers.softcap
        slope = 1.0 - t * t
    elif F.LINEAR:
        s = qk
    else:
        s = qk * modifiers.scale
    return s, slope


@triton.jit
def attend(acc, l_i, m_i, q, k, v, distance, span, modifiers, F: tl.constexpr):
    """Take a tile of keys into the running output [BLOCK_M, PAD_V], row sums and row maxima; a row
    sees those whose distance, [1 or BLOCK_M, BLOCK_N], is below its span.
    """
    # [BLOCK_M, BLOCK_N]
    qk = tl.dot(q, tl.trans(k), input_precision=F.PRECISION)
    s, _ = logits(qk, modifiers, F)
    s = keep_within(distance, span[:, None], s, float("-inf"))
    p, alpha, m_i, l_i = online_softmax(s, log2_factor(modifiers, F), m_i, l_i, True)
    # [BLOCK_M, PAD_V]
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=F.PRECISION)
    return acc, l_i, m_i


@triton.jit
def score_gradient(qk, dp, lse2, delta2, distance, span2, modifiers, F: tl.constexpr):
    """(p, d score) of a tile, from its dot products."""
    s, slope = logits(qk, modifiers, F)
    p = tl.exp2(s * log2_factor(modifiers, F) - lse2)
    ds = p * (dp - delta2)
    if F.SOFTCAP:
        ds = ds * slope
    return keep_within(distance, span2, p, 0.0), keep_within(distance, span2, ds, 0.0)
