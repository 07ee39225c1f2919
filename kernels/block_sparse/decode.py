"""Decoding: a few queries against a long cache. The keys are split among programs, whose results
merge by lse.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashmark.block_sparse.call import Call, Saved

from . import arguments as args
from . import configs, passes
from .arguments import LaunchSizes
from .attend import add_sink, attend, log_sum
from .primitives import fall, keys_of
from .walk import load_run, masked_tile, sample_bounds

MAX_QUERIES = 16
MIN_KEYS = 256  # below this one program is fast enough, and merging would cost more
MAX_ROWS = 128
MAX_SPLITS = 64
TILES_PER_SPLIT = 4


@triton.jit
def lower_bound(entries, low, high, block):
    """The first of the (block, _) entries low .. high, which ascend, at or after `block`."""
    while low < high:
        middle = (low + high) // 2
        before = tl.load(entries + 2 * middle) < block
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def share(low, high, split, splits, STEP: tl.constexpr):
    """The part of low .. high that a split takes: a whole number of steps, but for the last."""
    size = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), STEP) * STEP
    low += split * size
    return low, tl.minimum(high, low + size)


@triton.jit
def sparse_span(lists, line, BLOCK: tl.constexpr):
    """Entries of a line: (first run, end of runs, first partial, end of partials, low, high)."""
    run = tl.load(lists.run_offsets + line)
    run_end = tl.load(lists.run_offsets + line + 1)
    entry = tl.load(lists.partial_offsets + line)
    entry_end = tl.load(lists.partial_offsets + line + 1)
    has_run, has_partial = run < run_end, entry < entry_end
    low, _ = load_run(lists, run, has_run, BLOCK)
    _, high = load_run(lists, run_end - 1, has_run, BLOCK)
    first = tl.load(lists.partials + 2 * entry, mask=has_partial, other=0) * BLOCK
    last = tl.load(lists.partials + 2 * (entry_end - 1), mask=has_partial, other=-1) * BLOCK
    low = tl.where(has_run & has_partial, tl.minimum(low, first), tl.where(has_run, low, first))
    return run, run_end, entry, entry_end, low, tl.maximum(high, last + BLOCK)


@triton.jit
def compared_span(sizes, row0, offset, end_n, WINDOW: tl.constexpr, F: tl.constexpr):
    """The end of the keys that some row of a window sees, and of the tiles that all see."""
    high, full = end_n, end_n
    if F.KIND == "causal":
        shift = sizes.kv_len - sizes.rows
        last_row = tl.minimum(row0 + WINDOW, offset + sizes.q_len) - 1
        high = tl.minimum(last_row + shift + 1, end_n)
        full = tl.maximum(tl.minimum(row0 + shift + 1, end_n), 0)
    return high, full // F.BLOCK_N * F.BLOCK_N


@triton.jit(do_not_specialize=(*LaunchSizes._fields, "splits"))
def decode_kernel(
    inputs,
    part_ptr,
    part_sums_ptr,
    lists,
    modifiers,
    splits,
    pairs,
    heads,
    group,
    q_len,
    kv_len,
    rows,
    line_batch,
    line_head,
    tiles,
    section,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    F: tl.constexpr,
):
    """Rows of the tile: the heads of a group (if PACKED) times a window of WINDOW aligned mask
    rows.
    """
    sizes = LaunchSizes(
        pairs, heads, group, q_len, kv_len, rows, line_batch, line_head, tiles, section
    )
    pid = tl.program_id(0)
    split, rest = pid % splits, pid // splits
    pair = rest // sizes.tiles
    b, h0 = pair // sizes.heads, pair % sizes.heads
    offset, end_n = sample_bounds(sizes, modifiers, b, F)
    row0 = (offset // WINDOW + rest % sizes.tiles) * WINDOW
    if row0 >= offset + sizes.q_len:
        return

    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD_V: tl.constexpr = F.PAD_V
    m = tl.arange(0, BLOCK_M)
    r = row0 + m % WINDOW
    i = r - offset
    q_heads = sizes.heads
    if PACKED:
        hk = h0
        h = h0 * sizes.group + m // WINDOW
        inside = m // WINDOW < sizes.group
        q_heads *= sizes.group
    else:
        hk = h0 // sizes.group
        h = h0 + tl.zeros_like(m)
        inside = m < WINDOW
    inside = inside & (i >= 0) & (i < sizes.q_len)
    b64, h64, i64 = tl.cast(b, tl.int64), h.to(tl.int64), i.to(tl.int64)
    q_strides = inputs.query_strides
    offs_d = tl.arange(0, F.PAD)
    # [BLOCK_M, 1]
    q_ptrs = inputs.query + (b64 * q_strides[0] + h64 * q_strides[1] + i64 * q_strides[2])[:, None]
    # [BLOCK_M, PAD]
    q = tl.load(
        q_ptrs + offs_d[None, :], mask=inside[:, None] & (offs_d < F.DIM)[None, :], other=0.0
    )
    k_ptr, v_ptr, kv_strides = keys_of(inputs, b, hk, F)
    base = modifiers.bias
    if F.BIAS != "none":
        h64 = tl.where(inside, h64, 0)  # rows that pad the tile have no head, so no bias either
        base += (h64 * modifiers.bias_strides[1] + b64 * modifiers.bias_strides[0])[:, None]
    # [BLOCK_M, 1]
    r2, pair2 = r[:, None], (b * q_heads + h)[:, None]

    # [BLOCK_M, PAD_V]
    acc = tl.zeros([BLOCK_M, PAD_V], tl.float32)
    # [BLOCK_M]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if F.KIND == "sparse":
        line = b * sizes.line_batch + h0 * sizes.line_head + row0 // F.BLOCK_Q
        run, run_end, entry, entry_end, low, high = sparse_span(lists, line, F.BLOCK_KV)
        low, high = share(low, tl.minimum(high, end_n), split, splits, F.BLOCK_KV)
        block, block_end = low // F.BLOCK_KV, tl.cdiv(high, F.BLOCK_KV)
        run = tl.maximum(lower_bound(lists.runs, run, run_end, block) - 1, run)
        for x in range(run, lower_bound(lists.runs, run, run_end, block_end)):
            start, stop = load_run(lists, x, x < run_end, F.BLOCK_KV)
            for n in range(tl.maximum(start, low), tl.minimum(stop, high), F.BLOCK_N):
                acc, l_i, m_i = attend(
                    acc, l_i, m_i, q, k_ptr, v_ptr, kv_strides, n, lists.bits, 0,
                    r2, offset, end_n, pair2, base, sizes, modifiers, False, F,
                )  # fmt: skip
        entry = lower_bound(lists.partials, entry, entry_end, block)
        entry_end = lower_bound(lists.partials, entry, entry_end, block_end)
        for t in range((entry_end - entry) * (F.BLOCK_KV // F.BLOCK_N)):
            n, bits = masked_tile(lists, entry, t, 0, 0, F.BLOCK_N, F.BLOCK_KV, F)
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, k_ptr, v_ptr, kv_strides, n, lists.bits, bits,
                r2, offset, end_n, pair2, base, sizes, modifiers, True, F,
            )  # fmt: skip
    else:
        high, full = compared_span(sizes, row0, offset, end_n, WINDOW, F)
        low, high = share(0, high, split, splits, F.BLOCK_N)
        for n in range(low, tl.minimum(full, high), F.BLOCK_N):
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, k_ptr, v_ptr, kv_strides, n, lists.bits, 0,
                r2, offset, end_n, pair2, base, sizes, modifiers, False, F,
            )  # fmt: skip
        for n in range(tl.maximum(low, full), high, F.BLOCK_N):
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, k_ptr, v_ptr, kv_strides, n, lists.bits, 0,
                r2, offset, end_n, pair2, base, sizes, modifiers, True, F,
            )  # fmt: skip

    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    all_heads = sizes.pairs // sizes.heads * q_heads
    row = (split * all_heads + b * q_heads + h).to(tl.int64) * sizes.q_len + i
    offs_v = tl.arange(0, PAD_V)
    # [BLOCK_M, PAD_V]
    parts = part_ptr + (row * F.DIM_V)[:, None] + offs_v[None, :]
    tl.store(parts, acc, mask=inside[:, None] & (offs_v < F.DIM_V)[None, :])
    tl.store(part_sums_ptr + 2 * row, m_i, mask=inside)
    tl.store(part_sums_ptr + 2 * row + 1, l_i, mask=inside)


@triton.jit(do_not_specialize=["rows", "q_len", "heads", "splits"])
def merge_kernel(
    part_ptr,
    part_sums_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    residual_ptr,
    rows,
    q_len,
    heads,
    splits,
    keep_scale,
    SPLITS: tl.constexpr,
    DIM_V: tl.constexpr,
    PAD_V: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """Merge the parts of one row, weighted by their share of its sum."""
    row = tl.cast(tl.program_id(0), tl.int64)
    split = tl.arange(0, SPLITS)
    offs_v = tl.arange(0, PAD_V)
    part_row = split.to(tl.int64) * rows + row
    exists = split < splits
    # [SPLITS]
    part_m = tl.load(part_sums_ptr + 2 * part_row, mask=exists, other=float("-inf"))
    part_l = tl.load(part_sums_ptr + 2 * part_row + 1, mask=exists, other=0.0)
    m_i = tl.max(part_m, 0)
    # [SPLITS]
    weight = part_l * fall(part_m, tl.where(m_i == float("-inf"), 0.0, m_i), NATURAL)
    l_i = tl.sum(weight, 0)
    # [SPLITS, PAD_V]
    parts = part_ptr + (part_row * DIM_V)[:, None] + offs_v[None, :]
    inside = (split < splits)[:, None] & (offs_v < DIM_V)[None, :]
    # [PAD_V]
    acc = tl.sum(tl.load(parts, mask=inside, other=0.0) * weight[:, None], 0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + row // q_len % heads).to(tl.float32)
        m_i, l_i, alpha = add_sink(m_i, l_i, sink, NATURAL)
        acc = acc * alpha
    acc = acc * (keep_scale / tl.where(l_i == 0.0, 1.0, l_i))
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * DIM_V + offs_v, out, mask=offs_v < DIM_V)
    lse, residual = log_sum(m_i, l_i, NATURAL)
    tl.store(lse_ptr + row, lse)
    if NATURAL:
        tl.store(residual_ptr + row, residual)


def number_of_splits(device: torch.device, programs: int, tiles: int) -> int:
    """Number of programs that share each one's `tiles` tiles of keys, so that the GPU is filled
    twice.
    """
    wanted = 2 * configs.processors(device) // programs
    return max(1, min(wanted, tiles // TILES_PER_SPLIT, MAX_SPLITS))


def is_decode(described: args.KernelArguments) -> bool:
    """Whether a call has few queries and many keys."""
    sizes = described.sizes
    return sizes.q_len <= MAX_QUERIES and sizes.kv_len >= MIN_KEYS


class DecodePlan(NamedTuple):
    """The part of a decode that sizes decide."""

    sizes: LaunchSizes
    features: args.Features
    window: int  # mask rows of a tile
    packed: bool  # a tile holds the heads of a group
    programs: int  # to each split of the keys


@functools.lru_cache(args.REMEMBERED)
def plan(
    sizes: LaunchSizes,
    features: args.Features,
    batch: int,
    kv_heads: int,
    lines: tuple[int, int],
    config: configs.Config,
) -> DecodePlan:
    """Cut a decode into programs; `lines` are the batch and the heads of the mask."""
    window = triton.next_power_of_2(sizes.q_len)
    one_mask = features.KIND != "sparse" or lines[1] == 1
    packed = sizes.group > 1 and one_mask and sizes.group * window <= MAX_ROWS
    heads = kv_heads if packed else kv_heads * sizes.group
    rows = sizes.group * window if packed else window
    sizes = passes.fit(
        sizes,
        pairs=batch * heads,
        heads=heads,
        lines=lines,
        blocks=triton.cdiv(sizes.rows, features.BLOCK_Q),
        tiles=2 if features.OFFSET and window > 1 else 1,  # queries may lie across two windows
    )
    block_m = max(16, triton.next_power_of_2(rows))
    features = dataclasses.replace(features, BLOCK_M=block_m, BLOCK_N=config.block_n)
    return DecodePlan(sizes, features, window, packed, sizes.pairs * sizes.tiles)


def decode(call: Call, described: args.KernelArguments) -> Saved:
    """Launch the decode kernels."""
    query, key, value, mask = call.query, call.key, call.value, call.mask
    (batch, heads, q_len, _), (_, kv_heads, _, dim_v) = query.shape, value.shape
    config, modifiers = passes.choose_config("decode", query, described), described.modifiers
    sizes, features, window, packed, programs = plan(
        described.sizes, described.features, batch, kv_heads, (mask.batch, mask.heads), config
    )
    splits = number_of_splits(query.device, programs, sizes.kv_len // config.block_n)
    rows, device = batch * heads * q_len, query.device
    part = torch.empty(splits, rows, dim_v, dtype=torch.float32, device=device)
    part_sums = torch.empty(splits, rows, 2, dtype=torch.float32, device=device)
    out = torch.empty(batch, heads, q_len, dim_v, dtype=query.dtype, device=device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=device)
    residual = args.residual_of(call, lse)
    with args.on_device(query):
        decode_kernel[(programs * splits,)](
            args.inputs(query, key, value),
            part,
            part_sums,
            described.rows,
            modifiers,
            splits,
            *sizes,
            WINDOW=window,
            PACKED=packed,
            F=features,
            **config.options,
        )
        merge_kernel[(rows,)](
            part,
            part_sums,
            modifiers.sinks,
            out,
            lse,
            residual,
            rows,
            q_len,
            heads,
            splits,
            modifiers.keep_scale,
            SPLITS=triton.next_power_of_2(splits),
            DIM_V=dim_v,
            PAD_V=features.PAD_V,
            NATURAL=features.NATURAL,
        )
    return Saved(out, lse, residual)
