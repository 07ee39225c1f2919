"""dQ, as the forward pass goes: what queries get from the blocks that they chose, in memory of its
own for each choice, then their near field, which adds that up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.primitives import padded_rows
from .arguments import Sizes
from .lists import gathered_rows, number_of_blocks
from .primitives import (
    NONE,
    bounds_of,
    hide,
    load_at,
    load_keys,
    near_span,
    pointers,
    score_gradient,
    store_at,
)


@triton.jit
def load_queries(operands, b, h, i, inside, sizes, F: tl.constexpr):
    """(query [BLOCK_M, PAD], dO [BLOCK_M, PAD_V], lse2 [BLOCK_M], delta [BLOCK_M]) of queries i of
    heads h.
    """
    q = load_at(pointers(operands.query, operands.query_strides, b, h, i), inside, F.DIM, F.PAD)
    dout = load_at(
        pointers(operands.dout, operands.dout_strides, b, h, i), inside, F.DIM_V, F.PAD_V
    )
    heads = sizes.heads * F.GROUP
    row = (tl.cast(b, tl.int64) * heads + h) * padded_rows(sizes.q_len) + i
    lse2 = tl.load(operands.lse + row, mask=inside, other=float("inf"))
    return q, dout, lse2, tl.load(operands.delta + row, mask=inside, other=0.0)


@triton.jit
def take_keys(dq, q, dout, lse2, delta, k, v, distance, span, modifiers, F: tl.constexpr):
    """Take a tile of keys into dQ [BLOCK_M, PAD]; distances and spans as for `attend`."""
    # [BLOCK_M, BLOCK_N]
    qk = tl.dot(q, tl.trans(k), input_precision=F.PRECISION)
    dp = tl.dot(dout, tl.trans(v), input_precision=F.PRECISION)
    _, ds = score_gradient(
        qk, dp, lse2[:, None], delta[:, None], distance, span[:, None], modifiers, F
    )
    # [BLOCK_M, PAD]
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=F.PRECISION)


@triton.jit(do_not_specialize=Sizes._fields)
def gathered_queries_kernel(
    operands,
    lists,
    part_ptr,
    modifiers,
    heads,
    q_len,
    kv_len,
    near,
    top,
    chunk,
    start,
    F: tl.constexpr,
):
    """dQ / scale of gathered rows, from the block that each of them chose."""
    sizes = Sizes(heads, q_len, kv_len, near, top, chunk, start)
    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD: tl.constexpr = F.PAD
    end = chunk * top * F.GROUP
    tiles = tl.cdiv(end, BLOCK_M)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, hk = pair // heads, pair % heads
    flat0 = tile * BLOCK_M
    blocks = number_of_blocks(lists, pair, flat0, end, sizes, F)
    if blocks == 0:
        return
    _, end_n = bounds_of(b, sizes, modifiers, F)
    # [BLOCK_M]
    token, i, g, line = gathered_rows(lists, pair, flat0 + tl.arange(0, BLOCK_M), end, sizes, F)
    inside = token < NONE
    h = hk * F.GROUP + g
    q, dout, lse2, delta = load_queries(operands, b, h, start + i, inside, sizes, F)
    # [BLOCK_M, PAD]
    dq = tl.zeros([BLOCK_M, PAD], tl.float32)
    block = tl.min(token, 0)
    for x in range(blocks * F.PARTS):
        n = block + x % F.PARTS * F.BLOCK_N
        stop = tl.minimum(block + F.SIZE, end_n)
        k, v, keep = load_keys(operands, b, hk, n, stop, sizes, modifiers, F)
        # [1, BLOCK_N]
        distance = hide((n - block + tl.arange(0, F.BLOCK_N))[None, :], keep, 0, F)
        span = tl.where(token == block, tl.maximum(stop - block, 0), 0)
        dq = take_keys(dq, q, dout, lse2, delta, k, v, distance, span, modifiers, F)
        if x % F.PARTS == F.PARTS - 1:
            block = tl.min(tl.where(token > block, token, NONE), 0)
    # [BLOCK_M]
    head = tl.cast(b, tl.int64) * heads * F.GROUP + h
    row = head * chunk * top + tl.load(lists.order + line, mask=inside, other=0)
    store_at(part_ptr + row * F.DIM, dq, inside, F.DIM, PAD)


@triton.jit(do_not_specialize=Sizes._fields)
def near_queries_kernel(
    operands,
    lists,
    part_ptr,
    dq_ptr,
    modifiers,
    scale,
    heads,
    q_len,
    kv_len,
    near,
    top,
    chunk,
    start,
    F: tl.constexpr,
):
    """dQ of a tile of queries: of their near field, and the sum of their parts."""
    sizes = Sizes(heads, q_len, kv_len, near, top, chunk, start)
    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD: tl.constexpr = F.PAD
    tiles = tl.cdiv(chunk, BLOCK_M)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    hq = pair % (heads * F.GROUP)
    b = pair // (heads * F.GROUP)
    row0 = start + tile * BLOCK_M
    if row0 >= q_len:
        return
    offset, end_n = bounds_of(b, sizes, modifiers, F)
    # [BLOCK_M]
    local = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = start + local
    inside = (local < chunk) & (i < q_len)
    low, span = near_span(i + offset, end_n, sizes, modifiers, F)
    h = hq + tl.zeros_like(i)
    q, dout, lse2, delta = load_queries(operands, b, h, i, inside, sizes, F)
    # [BLOCK_M, PAD]
    dq = tl.zeros([BLOCK_M, PAD], tl.float32)
    begin, _ = near_span(row0 + offset, end_n, sizes, modifiers, F)
    last = tl.minimum(tl.minimum(row0 + BLOCK_M, start + chunk), q_len) - 1
    stop = tl.minimum(last + offset + 1, end_n)
    if begin < stop:
        for n in range(begin, stop, F.BLOCK_N):
            k, v, keep = load_keys(operands, b, hq // F.GROUP, n, stop, sizes, modifiers, F)
            # [BLOCK_M, BLOCK_N]
            distance = (n + tl.arange(0, F.BLOCK_N))[None, :] - low[:, None]
            distance = hide(distance, keep, 0, F)
            dq = take_keys(dq, q, dout, lse2, delta, k, v, distance, span, modifiers, F)
    if lists is not None:
        choices = tl.cast(pair // F.GROUP, tl.int64) * chunk * top + local * top
        rows = (tl.cast(pair, tl.int64) * chunk + local) * top
        for slot in range(top):
            there = tl.load(lists.tokens + choices + slot, mask=inside, other=NONE) < NONE
            dq += load_at(part_ptr + (rows + slot) * F.DIM, there, F.DIM, PAD)
    row = tl.cast(pair, tl.int64) * q_len + i
    store_at(dq_ptr + row * F.DIM, dq * scale, inside, F.DIM, PAD)
