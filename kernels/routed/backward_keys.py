"""dK and dV: one program holds a tile of keys and walks the queries of a group that see it, those
near it or those that chose its block.

Tiles are transposed, keys down and queries across, as in block-sparse attention.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.primitives import padded_rows, store_tile
from .arguments import Sizes
from .lists import choices_of
from .primitives import (
    NONE,
    bounds_of,
    hide,
    load_at,
    load_keys,
    near_span,
    pointers,
    score_gradient,
)


@triton.jit
def take_queries(
    dk, dv, k, v, operands, b, h, i, inside, distance, span2, sizes, modifiers, F: tl.constexpr
):
    """Take queries i of heads h, vectors, into dK [BLOCK_N, PAD] and dV [BLOCK_N, PAD_V]; each sees
    the keys whose distance, [BLOCK_N, 1 or BLOCK_M], is below its span, [1, 1 or BLOCK_M].
    """
    # [BLOCK_M, PAD]
    q = load_at(pointers(operands.query, operands.query_strides, b, h, i), inside, F.DIM, F.PAD)
    # [BLOCK_N, BLOCK_M]
    qk_t = tl.dot(k, tl.trans(q), input_precision=F.PRECISION)
    # [BLOCK_M, PAD_V]
    dout = load_at(
        pointers(operands.dout, operands.dout_strides, b, h, i), inside, F.DIM_V, F.PAD_V
    )
    # [BLOCK_N, BLOCK_M]
    dp_t = tl.dot(v, tl.trans(dout), input_precision=F.PRECISION)
    # [BLOCK_M]
    heads = sizes.heads * F.GROUP
    row = (tl.cast(b, tl.int64) * heads + h) * padded_rows(sizes.q_len) + i
    lse2 = tl.load(operands.lse + row, mask=inside, other=float("inf"))
    delta = tl.load(operands.delta + row, mask=inside, other=0.0)
    p_t, ds_t = score_gradient(
        qk_t, dp_t, lse2[None, :], delta[None, :], distance, span2, modifiers, F
    )
    dv = tl.dot(p_t.to(dout.dtype), dout, dv, input_precision=F.PRECISION)
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=F.PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=Sizes._fields)
def near_keys_kernel(
    operands,
    dk_ptr,
    dv_ptr,
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
    """dK and dV, as far as they come from the near fields of queries."""
    sizes = Sizes(heads, q_len, kv_len, near, top, chunk, start)
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    PAD: tl.constexpr = F.PAD
    PAD_V: tl.constexpr = F.PAD_V
    tiles = tl.cdiv(kv_len, BLOCK_N)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, hk = pair // heads, pair % heads
    n = tile * BLOCK_N
    offset, end_n = bounds_of(b, sizes, modifiers, F)
    k, v, keep = load_keys(operands, b, hk, n, end_n, sizes, modifiers, F)
    # [BLOCK_N, PAD]
    dk = tl.zeros([BLOCK_N, PAD], tl.float32)
    # [BLOCK_N, PAD_V]
    dv = tl.zeros([BLOCK_N, PAD_V], tl.float32)
    begin = tl.maximum(n - offset, 0)
    stop = tl.minimum(n + BLOCK_N - 1 + (near + 1) * F.SIZE - offset, q_len)
    for g in range(F.GROUP):
        for i0 in range(begin, stop, BLOCK_M):
            # [BLOCK_M]
            i = i0 + tl.arange(0, BLOCK_M)
            low, span = near_span(i + offset, end_n, sizes, modifiers, F)
            h = hk * F.GROUP + g + tl.zeros_like(i)
            # [BLOCK_N, BLOCK_M]
            distance = (n + tl.arange(0, BLOCK_N))[:, None] - low[None, :]
            distance = hide(distance, keep, 1, F)
            dk, dv = take_queries(
                dk, dv, k, v, operands, b, h, i, i < q_len, distance, span[None, :], sizes,
                modifiers, F,
            )  # fmt: skip
    row = tl.cast(pair, tl.int64) * kv_len
    store_tile(dk_ptr + row * F.DIM, n, F.DIM, kv_len, dk * scale, BLOCK_N, F.DIM, PAD)
    store_tile(dv_ptr + row * F.DIM_V, n, F.DIM_V, kv_len, dv, BLOCK_N, F.DIM_V, PAD_V)


@triton.jit
def add_tile(
    base, start, end, tile, SIZE: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """Add [SIZE, PAD] to rows start .. end of a contiguous matrix."""
    offs = tl.arange(0, SIZE)[:, None]
    offs_d = tl.arange(0, PAD)[None, :]
    entries = base + tl.cast(start, tl.int64) * DIM + (offs * DIM + offs_d)
    inside = (start + offs < end) & (offs_d < DIM)
    if ATOMIC:
        tl.atomic_add(entries, tile, mask=inside, sem="relaxed")
    else:
        tl.store(entries, tl.load(entries, mask=inside, other=0.0) + tile, mask=inside)


@triton.jit
def gather_block(
    operands, lists, dk_ptr, dv_ptr, modifiers, scale, pair, token, part, entry, entry_end, sizes,
    F: tl.constexpr,
):  # fmt: skip
    """Add what the queries of choices entry .. entry_end give to a tile of the block at `token`."""
    BLOCK_N: tl.constexpr = F.BLOCK_N
    PAD: tl.constexpr = F.PAD
    PAD_V: tl.constexpr = F.PAD_V
    b, hk = pair // sizes.heads, pair % sizes.heads
    _, end_n = bounds_of(b, sizes, modifiers, F)
    n = token + part * BLOCK_N
    stop = tl.minimum(token + F.SIZE, end_n)
    k, v, keep = load_keys(operands, b, hk, n, stop, sizes, modifiers, F)
    # [BLOCK_N, PAD]
    dk = tl.zeros([BLOCK_N, PAD], tl.float32)
    # [BLOCK_N, PAD_V]
    dv = tl.zeros([BLOCK_N, PAD_V], tl.float32)
    # [BLOCK_N, 1]
    distance = hide((n - token + tl.arange(0, BLOCK_N))[:, None], keep, 1, F)
    span = tl.full([1, 1], 0, tl.int32) + tl.maximum(stop - token, 0)
    end = entry_end * F.GROUP
    for flat in range(entry * F.GROUP, end, F.BLOCK_M):
        rows = flat + tl.arange(0, F.BLOCK_M)
        _token, i, _line = choices_of(lists, pair, rows // F.GROUP, rows < end, sizes)
        h = hk * F.GROUP + rows % F.GROUP
        dk, dv = take_queries(
            dk, dv, k, v, operands, b, h, i, rows < end, distance, span, sizes, modifiers, F
        )
    row = tl.cast(pair, tl.int64) * sizes.kv_len
    add_tile(dk_ptr + row * F.DIM, n, stop, dk * scale, BLOCK_N, F.DIM, PAD, F.ATOMIC)
    add_tile(dv_ptr + row * F.DIM_V, n, stop, dv, BLOCK_N, F.DIM_V, PAD_V, F.ATOMIC)


@triton.jit(do_not_specialize=["share", *Sizes._fields])
def gathered_keys_kernel(
    operands,
    lists,
    offsets_ptr,
    dk_ptr,
    dv_ptr,
    modifiers,
    scale,
    share,
    heads,
    q_len,
    kv_len,
    near,
    top,
    chunk,
    start,
    F: tl.constexpr,
):
    """Add what the queries that chose a block give to its dK and dV: one program to a block, or, if
    ATOMIC, to `share` choices in a row, so that a block that all queries chose is nobody's alone.
    """
    sizes = Sizes(heads, q_len, kv_len, near, top, chunk, start)
    pid = tl.program_id(0)
    part, rest = pid % F.PARTS, pid // F.PARTS
    blocks, entries = kv_len // F.SIZE, chunk * top
    lines = tl.cdiv(entries, share) if F.ATOMIC else blocks
    pair, line = rest // lines, rest % lines
    offsets_ptr += pair * (blocks + 1)
    if F.ATOMIC:
        entry, end = line * share, tl.minimum(line * share + share, entries)
    else:
        entry, end = tl.load(offsets_ptr + line), tl.load(offsets_ptr + line + 1)
    tokens = lists.ordered + tl.cast(pair, tl.int64) * entries
    while entry < end:
        token = tl.load(tokens + entry)
        next_entry = end
        if token < NONE:
            next_entry = tl.minimum(end, tl.load(offsets_ptr + token // F.SIZE + 1))
            gather_block(
                operands, lists, dk_ptr, dv_ptr, modifiers, scale, pair, token, part, entry,
                next_entry, sizes, F,
            )  # fmt: skip
        entry = next_entry
