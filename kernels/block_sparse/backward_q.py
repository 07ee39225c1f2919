"""dQ of the two-pass backward: one program holds a tile of queries and walks the keys, as the
forward does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import LaunchSizes
from .dropout import dropout_keep
from .primitives import (
    bias_base,
    head_of,
    keys_of,
    load_lse,
    load_rows,
    load_tile,
    padded_rows,
    row_stride,
    score_gradient,
    store_tile,
)
from .walk import locate, masked_tile, next_tile, query_tile, sample_bounds, walk_keys


@triton.jit
def gather_keys(
    dq,
    q,
    dout,
    lse2,
    residual2,
    delta2,
    k_ptr,
    v_ptr,
    kv_strides,
    start_n,
    bits_ptr,
    bits,
    row0,
    offset,
    end_n,
    pair,
    base,
    sizes,
    modifiers,
    MASKED: tl.constexpr,
    F: tl.constexpr,
):
    """Take one tile of keys into dQ [BLOCK_M, PAD]."""
    check: tl.constexpr = MASKED or F.CLIP
    # [BLOCK_N, PAD]
    k = load_tile(k_ptr, start_n, kv_strides[0], end_n, F.BLOCK_N, F.DIM, F.PAD, check)
    # [BLOCK_N, PAD_V]
    v = load_tile(v_ptr, start_n, kv_strides[1], end_n, F.BLOCK_N, F.DIM_V, F.PAD_V, check)
    # [BLOCK_M, BLOCK_N]
    qk = tl.dot(q, tl.trans(k), input_precision=F.PRECISION)
    dp = tl.dot(dout, tl.trans(v), input_precision=F.PRECISION)
    # [BLOCK_M, 1]
    r2 = (row0 + tl.arange(0, F.BLOCK_M))[:, None]
    # [1, BLOCK_N]
    n2 = (start_n + tl.arange(0, F.BLOCK_N))[None, :]
    keep = True
    if F.DROPOUT:
        keep = dropout_keep(r2 - offset, start_n, pair, modifiers, F.BLOCK_N)
    # [BLOCK_M, BLOCK_N]
    _, ds, slope = score_gradient(
        qk, dp, lse2, residual2, delta2, keep, bits_ptr, bits, start_n, r2, n2,
        offset, end_n, base, sizes, modifiers, MASKED, F,
    )  # fmt: skip
    if F.SOFTCAP:
        ds = ds * slope
    # [BLOCK_M, PAD]
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=F.PRECISION)


@triton.jit(do_not_specialize=LaunchSizes._fields)
def backward_q_kernel(
    operands,
    dq_ptr,
    lists,
    modifiers,
    scale,
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
    F: tl.constexpr,
):
    sizes = LaunchSizes(
        pairs, heads, group, q_len, kv_len, rows, line_batch, line_head, tiles, section
    )
    index, pair = locate(sizes)
    b, h = pair // sizes.heads, pair % sizes.heads
    offset, end_n = sample_bounds(sizes, modifiers, b, F)
    leading = b * sizes.line_batch + h * sizes.line_head
    row0 = query_tile(sizes, lists, index, offset, leading, F) * F.BLOCK_M
    if row0 >= offset + sizes.q_len:
        return

    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD: tl.constexpr = F.PAD
    q_stride = row_stride(operands.query_strides, F)
    dout_stride = row_stride(operands.dout_strides, F)
    q_ptr = head_of(operands.query, operands.query_strides, b, h)
    dout_ptr = head_of(operands.dout, operands.dout_strides, b, h)
    k_ptr, v_ptr, kv_strides = keys_of(operands, b, h // sizes.group, F)
    rows64 = tl.cast(pair, tl.int64) * sizes.q_len
    start_i = row0 - offset
    end_i = sizes.q_len
    # [BLOCK_M, PAD]
    q = load_tile(q_ptr, start_i, q_stride, end_i, BLOCK_M, F.DIM, PAD, True)
    # [BLOCK_M, PAD_V]
    dout = load_tile(dout_ptr, start_i, dout_stride, end_i, BLOCK_M, F.DIM_V, F.PAD_V, True)
    # [BLOCK_M, 1]
    lse2, residual2 = load_lse(operands.lse, pair, start_i, end_i, BLOCK_M, 1, F)
    delta_ptr = operands.delta + tl.cast(pair, tl.int64) * padded_rows(sizes.q_len)
    # [BLOCK_M, 1]
    delta2 = load_rows(delta_ptr, start_i, end_i, 0.0, BLOCK_M, F.OFFSET)[:, None]
    base = bias_base(modifiers, b, h, F)

    # [BLOCK_M, PAD]
    dq = tl.zeros([BLOCK_M, PAD], tl.float32)
    line = leading + row0 // F.BLOCK_Q
    n_full, n_masked, first, run, run_end, start, stop = walk_keys(
        sizes, lists, line, row0, end_n, F
    )
    full_start = start
    if n_full > 0:  # as in the forward
        for _ in range(n_full):
            dq = gather_keys(
                dq, q, dout, lse2, residual2, delta2, k_ptr, v_ptr, kv_strides, start,
                lists.bits, 0, row0, offset, end_n, pair, base, sizes, modifiers, False, F,
            )  # fmt: skip
            run, start, stop = next_tile(lists, run, run_end, start, stop, F.BLOCK_N, F.BLOCK_KV, F)
    if n_masked > 0:
        for t in range(n_masked):
            start, bits = masked_tile(lists, first, t, full_start, n_full, F.BLOCK_N, F.BLOCK_KV, F)
            dq = gather_keys(
                dq, q, dout, lse2, residual2, delta2, k_ptr, v_ptr, kv_strides, start,
                lists.bits, bits, row0, offset, end_n, pair, base, sizes, modifiers, True, F,
            )  # fmt: skip
    dq_ptr += rows64 * F.DIM
    store_tile(dq_ptr, start_i, F.DIM, end_i, dq * scale, BLOCK_M, F.DIM, PAD)
