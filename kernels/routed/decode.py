"""Decoding: few queries, each of which walks its own blocks. They are split among programs, whose
results merge by lse.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from flashmark.routed.call import Call, Saved

from ..block_sparse.arguments import inputs, on_device
from ..block_sparse.decode import merge_kernel, number_of_splits
from . import arguments as args
from .arguments import Sizes
from .primitives import (
    attend,
    bounds_of,
    hide,
    load_at,
    load_keys,
    near_span,
    place_of,
    pointers,
    store_at,
)

MAX_QUERIES = 16
MAX_ROWS = 64


@triton.jit
def next_keys(step, near_steps, low, span, indices_ptr, first, own, end_n, sizes, F: tl.constexpr):
    """(first key, start of its block, end of the keys) of a step: first the near field, then the
    chosen blocks.
    """
    far = step - near_steps
    is_far = far >= 0
    block = tl.load(indices_ptr + far // F.PARTS, mask=is_far, other=-1)
    there = (block >= 0) & (block < own - sizes.near)
    begin = tl.where(is_far, first + tl.where(there, block, 0) * F.SIZE, low)
    stop = tl.where(there, tl.minimum(begin + F.SIZE, end_n), begin)
    stop = tl.where(is_far, stop, low + span)
    return begin + tl.where(is_far, far % F.PARTS, step) * F.BLOCK_N, begin, stop


@triton.jit(do_not_specialize=["splits", "near_steps", *Sizes._fields])
def walk_kernel(
    inputs,
    indices_ptr,
    part_ptr,
    part_sums_ptr,
    modifiers,
    splits,
    near_steps,
    heads,
    q_len,
    kv_len,
    near,
    top,
    chunk,
    start,
    F: tl.constexpr,
):
    """Attention of one query, for heads of a group, to a share of its keys."""
    sizes = Sizes(heads, q_len, kv_len, near, top, chunk, start)
    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD_V: tl.constexpr = F.PAD_V
    pid = tl.program_id(0)
    split, rest = pid % splits, pid // splits
    i, rest = rest % q_len, rest // q_len
    tiles = tl.cdiv(F.GROUP, BLOCK_M)
    tile, pair = rest % tiles, rest // tiles
    b, hk = pair // heads, pair % heads
    offset, end_n = bounds_of(b, sizes, modifiers, F)
    first, own = place_of(i + offset, sizes, modifiers, F)
    low, span = near_span(i + offset, end_n, sizes, modifiers, F)
    # [BLOCK_M]
    g = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = g < F.GROUP
    h = hk * F.GROUP + g
    i_rows = i + tl.zeros_like(g)
    # [BLOCK_M, PAD]
    q = load_at(pointers(inputs.query, inputs.query_strides, b, h, i_rows), inside, F.DIM, F.PAD)
    # [BLOCK_M, PAD_V]
    acc = tl.zeros([BLOCK_M, PAD_V], tl.float32)
    # [BLOCK_M]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    indices_ptr += (tl.cast(pair, tl.int64) * q_len + i) * top
    steps = near_steps + top * F.PARTS
    share = tl.cdiv(steps, splits)
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        n, begin, stop = next_keys(
            step, near_steps, low, span, indices_ptr, first, own, end_n, sizes, F
        )
        k, v, keep = load_keys(inputs, b, hk, n, stop, sizes, modifiers, F)
        width = tl.maximum(stop - begin, 0) + tl.zeros_like(g)
        # [1, BLOCK_N]
        distance = hide((n - begin + tl.arange(0, F.BLOCK_N))[None, :], keep, 0, F)
        acc, l_i, m_i = attend(acc, l_i, m_i, q, k, v, distance, width, modifiers, F)
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    samples = tl.num_programs(0) // (splits * q_len * tiles * heads)
    row = (tl.cast(split * samples + b, tl.int64) * heads * F.GROUP + h) * q_len + i
    store_at(part_ptr + row * F.DIM_V, acc, inside, F.DIM_V, PAD_V)
    tl.store(part_sums_ptr + 2 * row, m_i, mask=inside)
    tl.store(part_sums_ptr + 2 * row + 1, l_i, mask=inside)


def is_decode(described: args.KernelArguments) -> bool:
    """Whether there are too few queries to gather them by block."""
    return described.sizes.q_len <= MAX_QUERIES


def decode(call: Call, described: args.KernelArguments) -> Saved:
    """Launch the decode kernels."""
    query, value, sizes = call.query, call.value, described.sizes
    (batch, heads, q_len, _), dim_v, device = query.shape, value.shape[3], query.device
    features, config = described.fit("decode", query)
    block_m = max(16, min(MAX_ROWS, triton.next_power_of_2(features.GROUP)))
    features = dataclasses.replace(features, BLOCK_M=block_m)
    if not described.far:
        sizes = sizes._replace(top=0)
    span = min((sizes.near + 1) * features.SIZE, sizes.kv_len)
    near_steps = triton.cdiv(span, features.BLOCK_N)
    programs = batch * sizes.heads * q_len * triton.cdiv(features.GROUP, block_m)
    splits = number_of_splits(device, programs, near_steps + sizes.top * features.PARTS)
    rows = batch * heads * q_len
    part = torch.empty(splits, rows, dim_v, dtype=torch.float32, device=device)
    part_sums = torch.empty(splits, rows, 2, dtype=torch.float32, device=device)
    out = torch.empty(batch, heads, q_len, dim_v, dtype=query.dtype, device=device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=device)
    with on_device(query):
        walk_kernel[(programs * splits,)](
            inputs(query, call.key, value), call.indices, part, part_sums, described.modifiers,
            splits, near_steps, *sizes, F=features, **config.options,
        )  # fmt: skip
        merge_kernel[(rows,)](
            part, part_sums, described.modifiers.sinks, out, lse, lse, rows, q_len, heads, splits,
            1.0, SPLITS=triton.next_power_of_2(splits), DIM_V=dim_v, PAD_V=features.PAD_V,
            NATURAL=False,
        )  # fmt: skip
    return Saved(out, lse)
