"""The choices of all queries, sorted by block: from block to the queries that chose it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments as args
from .arguments import Sizes
from .primitives import NONE, bounds_of, place_of

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
def gathered_rows(lists, pair, flat, end, sizes, F: tl.constexpr):
    """(first token of the block, query in the chunk, head of the group, which entry of the choices
    it is) of the rows `flat`: the heads of a group one after the other, for each choice in order.
    """
    entry = flat // F.GROUP
    line = tl.cast(pair, tl.int64) * sizes.chunk * sizes.top + entry
    token = tl.load(lists.ordered + line, mask=flat < end, other=NONE)
    i = tl.load(lists.queries + line, mask=token < NONE, other=0).to(tl.int32)
    return token, i, flat % F.GROUP, line


@triton.jit
def number_of_blocks(lists, pair, flat0, end, sizes, F: tl.constexpr):
    """Number of blocks that the BLOCK_M rows from flat0 on name."""
    flat = flat0 + tl.arange(0, F.BLOCK_M)
    line = lists.ordered + tl.cast(pair, tl.int64) * sizes.chunk * sizes.top
    token = tl.load(line + flat // F.GROUP, mask=flat < end, other=NONE)
    before = tl.load(line + tl.maximum(flat - 1, flat0) // F.GROUP, mask=flat < end, other=NONE)
    changes = tl.sum(((token != before) & (token < NONE)).to(tl.int32), 0)
    return tl.where(tl.min(token, 0) < NONE, changes + 1, 0)
