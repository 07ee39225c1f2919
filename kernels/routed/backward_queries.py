"""dQ, as the forward pass goes: what queries get from the blocks that they chose, in memory of its
own for each choice, then their near field, which adds that up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.primitives import padded_rows
from .arguments import Sizes
from .lists import gathered_rows, load_gathered_keys, slot_of
from .primitives import (
    NONE,
    bounds_of,
    load_at,
    load_near_keys,
    near_bounds,
    near_place,
    near_rows,
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
    b, hk, blocks, token, i, h, line = gathered_rows(lists, sizes, F)
    if blocks == 0:
        return
    _, end_n = bounds_of(b, sizes, modifiers, F)
    inside = token < NONE
    q, dout, lse2, delta = load_queries(operands, b, h, i, inside, sizes, F)
    # [BLOCK_M, PAD]
    dq = tl.zeros([BLOCK_M, PAD], tl.float32)
    block = tl.min(token, 0)
    for x in range(blocks * F.PARTS):
        k, v, distance, span = load_gathered_keys(
            operands, b, hk, token, block, x % F.PARTS, end_n, sizes, modifiers, F
        )
        dq = take_keys(dq, q, dout, lse2, delta, k, v, distance, span, modifiers, F)
        if x % F.PARTS == F.PARTS - 1:
            block = tl.min(tl.where(token > block, token, NONE), 0)
    row = slot_of(lists, b, h, line, inside, sizes, F)
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
    pair, b, hq, first = near_place(sizes, F)
    if start + first >= q_len:
        return
    local, inside, low, span = near_rows(b, first, sizes, modifiers, F)
    i = start + local
    h = hq + tl.zeros_like(i)
    q, dout, lse2, delta = load_queries(operands, b, h, i, inside, sizes, F)
    # [BLOCK_M, PAD]
    dq = tl.zeros([BLOCK_M, PAD], tl.float32)
    begin, stop = near_bounds(b, first, sizes, modifiers, F)
    if begin < stop:
        for n in range(begin, stop, F.BLOCK_N):
            k, v, distance = load_near_keys(
                operands, b, hq // F.GROUP, n, stop, low, sizes, modifiers, F
            )
            dq = take_keys(dq, q, dout, lse2, delta, k, v, distance, span, modifiers, F)
    if lists is not None:
        choices = tl.cast(pair // F.GROUP, tl.int64) * chunk * top + local * top
        rows = (tl.cast(pair, tl.int64) * chunk + local) * top
        for slot in range(top):
            there = tl.load(lists.tokens + choices + slot, mask=inside, other=NONE) < NONE
            dq += load_at(part_ptr + (rows + slot) * F.DIM, there, F.DIM, PAD)
    row = tl.cast(pair, tl.int64) * q_len + i
    store_at(dq_ptr + row * F.DIM, dq * scale, inside, F.DIM, PAD)
