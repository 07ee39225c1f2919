"""Forward pass: what queries find in chosen blocks, then their near field, which takes that in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flashmark.routed import eager
from flashmark.routed.call import Call, Saved

from ..block_sparse.arguments import inputs, on_device
from ..block_sparse.attend import add_sink, log_sum
from . import arguments as args
from .arguments import Sizes
from .decode import decode, is_decode
from .lists import Lists, gathered_rows, load_gathered_keys, slot_of, sort_choices
from .primitives import (
    NONE,
    attend,
    bounds_of,
    load_at,
    load_near_keys,
    near_bounds,
    near_place,
    near_rows,
    pointers,
    store_at,
)

# Queries of a block are gathered, and what each choice gives goes through memory in the dtype of
# the call: 6 D bytes to a query head and choice in half precision, with the query. Programs of one
# query that walk its own list would read 4 D * block_size / group bytes of keys and values instead,
# 256 D / group for blocks of 64, which is less from 43 heads to a group on; and a product has at
# least 16 rows, of which they fill as many as a group has heads.


@triton.jit(do_not_specialize=Sizes._fields)
def gathered_kernel(
    inputs,
    lists,
    part_ptr,
    part_lse_ptr,
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
    """Softmax attention of gathered rows over the block that each of them chose, and its lse in the
    log2 domain.
    """
    sizes = Sizes(heads, q_len, kv_len, near, top, chunk, start)
    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD_V: tl.constexpr = F.PAD_V
    b, hk, blocks, token, i, h, line = gathered_rows(lists, sizes, F)
    if blocks == 0:
        return
    _, end_n = bounds_of(b, sizes, modifiers, F)
    inside = token < NONE
    # [BLOCK_M, PAD]
    q = load_at(pointers(inputs.query, inputs.query_strides, b, h, i), inside, F.DIM, F.PAD)
    # [BLOCK_M, PAD_V]
    acc = tl.zeros([BLOCK_M, PAD_V], tl.float32)
    # [BLOCK_M]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    block = tl.min(token, 0)
    for x in range(blocks * F.PARTS):
        k, v, distance, span = load_gathered_keys(
            inputs, b, hk, token, block, x % F.PARTS, end_n, sizes, modifiers, F
        )
        acc, l_i, m_i = attend(acc, l_i, m_i, q, k, v, distance, span, modifiers, F)
        if x % F.PARTS == F.PARTS - 1:
            block = tl.min(tl.where(token > block, token, NONE), 0)
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    row = slot_of(lists, b, h, line, inside, sizes, F)
    store_at(part_ptr + row * F.DIM_V, acc, inside, F.DIM_V, PAD_V)
    tl.store(part_lse_ptr + row, m_i + tl.log2(l_i), mask=inside)


@triton.jit
def merge_parts(acc, l_i, m_i, lists, part_ptr, part_lse_ptr, pair, i, sizes, F: tl.constexpr):
    """Take what queries i of the chunk found in their chosen blocks into the running output."""
    inside = (i < sizes.chunk) & (sizes.start + i < sizes.q_len)
    choices = tl.cast(pair // F.GROUP, tl.int64) * sizes.chunk * sizes.top + i * sizes.top
    rows = (tl.cast(pair, tl.int64) * sizes.chunk + i) * sizes.top
    for slot in range(sizes.top):
        there = tl.load(lists.tokens + choices + slot, mask=inside, other=NONE) < NONE
        # [BLOCK_M]
        part_m = tl.load(part_lse_ptr + rows + slot, mask=there, other=float("-inf"))
        # [BLOCK_M, PAD_V]
        part = load_at(part_ptr + (rows + slot) * F.DIM_V, there, F.DIM_V, F.PAD_V)
        m_new = tl.maximum(m_i, part_m)
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, weight = tl.exp2(m_i - pivot), tl.exp2(part_m - pivot)
        acc = acc * alpha[:, None] + part.to(tl.float32) * weight[:, None]
        l_i = l_i * alpha + weight
        m_i = m_new
    return acc, l_i, m_i


@triton.jit(do_not_specialize=Sizes._fields)
def near_kernel(
    inputs,
    lists,
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
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
    """Attention of a tile of queries to their near field, together with their parts."""
    sizes = Sizes(heads, q_len, kv_len, near, top, chunk, start)
    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD_V: tl.constexpr = F.PAD_V
    pair, b, hq, first = near_place(sizes, F)
    if start + first >= q_len:
        return
    local, inside, low, span = near_rows(b, first, sizes, modifiers, F)
    i = start + local
    h = hq + tl.zeros_like(i)
    # [BLOCK_M, PAD]
    q = load_at(pointers(inputs.query, inputs.query_strides, b, h, i), inside, F.DIM, F.PAD)
    # [BLOCK_M, PAD_V]
    acc = tl.zeros([BLOCK_M, PAD_V], tl.float32)
    # [BLOCK_M]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    begin, stop = near_bounds(b, first, sizes, modifiers, F)
    if begin < stop:  # as in the forward of block-sparse attention
        for n in range(begin, stop, F.BLOCK_N):
            k, v, distance = load_near_keys(
                inputs, b, hq // F.GROUP, n, stop, low, sizes, modifiers, F
            )
            acc, l_i, m_i = attend(acc, l_i, m_i, q, k, v, distance, span, modifiers, F)
    if lists is not None:
        acc, l_i, m_i = merge_parts(
            acc, l_i, m_i, lists, part_ptr, part_lse_ptr, pair, local, sizes, F
        )
    if modifiers.sinks is not None:
        sink = tl.load(modifiers.sinks + hq).to(tl.float32)
        m_i, l_i, alpha = add_sink(m_i, l_i, sink, False)
        acc = acc * alpha[:, None]
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    lse, _ = log_sum(m_i, l_i, False)
    row = tl.cast(pair, tl.int64) * q_len + i
    store_at(out_ptr + row * F.DIM_V, acc, inside, F.DIM_V, PAD_V)
    tl.store(lse_ptr + row, lse, mask=inside)


def forward(call: Call) -> Saved:
    """Softmax attention over near and chosen blocks: out in query's dtype, lse float32."""
    query, key, value = call.query, call.key, call.value
    if not query.numel() or not key.numel():
        return eager.forward(call)  # nothing to launch
    described = args.describe(call)
    if is_decode(described):
        return decode(call, described)
    (batch, heads, q_len, _), dim_v = query.shape, value.shape[3]
    chunks = [described.sizes]
    lists: list[Lists | None] = [None]
    part = part_lse = None
    out = torch.empty(batch, heads, q_len, dim_v, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
    tensors = inputs(query, key, value)
    features, config = described.fit("forward", query)
    with on_device(query):
        if described.far:
            chunks = described.chunks(batch, dim_v, query.element_size())
            lists = sort_choices(call.indices, described, chunks)
            shape = batch, heads, chunks[0].chunk, described.sizes.top
            part = torch.empty(*shape, dim_v, dtype=query.dtype, device=query.device)
            part_lse = torch.empty(shape, dtype=torch.float32, device=query.device)
        for sizes, chosen in zip(chunks, lists, strict=True):
            if chosen is not None:
                tiles = triton.cdiv(sizes.chunk * sizes.top * features.GROUP, features.BLOCK_M)
                gathered_kernel[(batch * sizes.heads * tiles,)](
                    tensors, chosen, part, part_lse, described.modifiers, *sizes, F=features,
                    **config.options,
                )  # fmt: skip
            near_kernel[(batch * heads * triton.cdiv(sizes.chunk, features.BLOCK_M),)](
                tensors, chosen, part, part_lse, out, lse, described.modifiers, *sizes, F=features,
                **config.options,
            )  # fmt: skip
    return Saved(out, lse)
