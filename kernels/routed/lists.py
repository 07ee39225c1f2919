"""The choices of all queries, sorted by block: from block to the queries that chose it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments as args
from .arguments import Sizes
from .primitives import NONE, bounds_of, hide, load_keys, place_of

BLOCK = 1024


class Lists(NamedTuple):
    """Choices of the queries of a chunk: (B * Hkv, chunk * top). A block is named by its first
    token; NONE, which is larger than all, stands for no block.
    """

    tokens: Tensor  # int32, a query's choices one after the other
    ordered: Tensor  # int32: `tokens`, ascending
    order: Tensor  # int64: where each of `ordered` stands in `tokens`; equal ones by query
    queries: Tensor  # int64: whose each of `ordered` is


@triton.jit(do_not_specialize=["pairs", *Sizes._fields])
def tokens_kernel(
    indices_ptr,
    tokens_ptr,
    modifiers,
    pairs,
    heads,
    q_len,
    kv_len,
    near,
    top,
    chunk,
    start,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """First token of each chosen block, chunk by chunk."""
    sizes = Sizes(heads, q_len, kv_len, near, top, chunk, start)
    tiles = tl.cdiv(chunk * top, BLOCK)
    line, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pair = line % pairs
    b = pair // heads
    offset, _ = bounds_of(b, sizes, modifiers, F)
    # [BLOCK]
    entry = tile * BLOCK + tl.arange(0, BLOCK)
    i = line // pairs * chunk + entry // top
    inside = (entry < chunk * top) & (i < q_len)
    at = i + offset
    first, own = place_of(at, sizes, modifiers, F)
    chosen = (tl.cast(pair, tl.int64) * q_len + i) * top + entry % top
    block = tl.load(indices_ptr + chosen, mask=inside, other=-1)
    # a block before the near ones is whole; beyond the keys only where an offset is wrong
    there = (block >= 0) & (block < own - near) & (at < kv_len)
    token = tl.where(there, first + tl.where(there, block, 0) * F.SIZE, NONE)
    tl.store(tokens_ptr + tl.cast(line, tl.int64) * chunk * top + entry, token,
             mask=entry < chunk * top)  # fmt: skip


def sort_choices(indices: Tensor, described: args.KernelArguments, chunks: list[Sizes]):
    """Lists of each chunk. A stable sort: the order of all sums is fixed."""
    pairs, sizes = indices.shape[0] * indices.shape[1], chunks[0]
    entries = sizes.chunk * sizes.top
    tokens = torch.empty(len(chunks), pairs, entries, dtype=torch.int32, device=indices.device)
    tokens_kernel[(len(chunks) * pairs * triton.cdiv(entries, BLOCK),)](
        indices, tokens, described.modifiers, pairs, *sizes, BLOCK=BLOCK, F=described.features
    )
    ordered, order = torch.sort(tokens, dim=-1, stable=True)
    queries = order // max(sizes.top, 1)  # once, and not by each program
    return [Lists(*each) for each in zip(tokens, ordered, order, queries, strict=True)]


@triton.jit
def number_of_blocks(lists, pair, flat0, end, sizes, F: tl.constexpr):
    """Number of blocks that the BLOCK_M rows from flat0 on name."""
    flat = flat0 + tl.arange(0, F.BLOCK_M)
    line = lists.ordered + tl.cast(pair, tl.int64) * sizes.chunk * sizes.top
    token = tl.load(line + flat // F.GROUP, mask=flat < end, other=NONE)
    before = tl.load(line + tl.maximum(flat - 1, flat0) // F.GROUP, mask=flat < end, other=NONE)
    changes = tl.sum(((token != before) & (token < NONE)).to(tl.int32), 0)
    return tl.where(tl.min(token, 0) < NONE, changes + 1, 0)


@triton.jit
def gathered_rows(lists, sizes, F: tl.constexpr):
    """Rows of the program, BLOCK_M of all that are gathered: for each choice in order, the heads of
    a group one after the other.

    (sample, key head, number of blocks that the rows name; and vectors: first token of the block,
    query, query head, which entry of the choices it is).
    """
    end = sizes.chunk * sizes.top * F.GROUP
    tiles = tl.cdiv(end, F.BLOCK_M)
    pair, flat0 = tl.program_id(0) // tiles, tl.program_id(0) % tiles * F.BLOCK_M
    b, hk = pair // sizes.heads, pair % sizes.heads
    blocks = number_of_blocks(lists, pair, flat0, end, sizes, F)
    # [BLOCK_M]
    flat = flat0 + tl.arange(0, F.BLOCK_M)
    token, i, line = choices_of(lists, pair, flat // F.GROUP, flat < end, sizes)
    return b, hk, blocks, token, i, hk * F.GROUP + flat % F.GROUP, line


@triton.jit
def choices_of(lists, pair, entry, inside, sizes):
    """(first token of the block, query, which entry of the choices it is) of sorted choices."""
    line = tl.cast(pair, tl.int64) * sizes.chunk * sizes.top + entry
    token = tl.load(lists.ordered + line, mask=inside, other=NONE)
    i = tl.load(lists.queries + line, mask=token < NONE, other=0).to(tl.int32)
    return token, sizes.start + i, line


@triton.jit
def load_gathered_keys(inputs, b, hk, token, block, part, end_n, sizes, modifiers, F: tl.constexpr):
    """Part of the block that starts at token `block`, for rows that name the blocks `token`.

    (keys [BLOCK_N, PAD], values [BLOCK_N, PAD_V], distances [1, BLOCK_N], spans [BLOCK_M]).
    """
    n = block + part * F.BLOCK_N
    stop = tl.minimum(block + F.SIZE, end_n)
    k, v, keep = load_keys(inputs, b, hk, n, stop, sizes, modifiers, F)
    distance = hide((n - block + tl.arange(0, F.BLOCK_N))[None, :], keep, 0, F)
    return k, v, distance, tl.where(token == block, tl.maximum(stop - block, 0), 0)


@triton.jit
def slot_of(lists, b, h, line, inside, sizes, F: tl.constexpr):
    """Slots of the gathered rows' results: by head, query and choice."""
    head = tl.cast(b, tl.int64) * sizes.heads * F.GROUP + h
    entry = tl.load(lists.order + line, mask=inside, other=0)
    return head * sizes.chunk * sizes.top + entry
