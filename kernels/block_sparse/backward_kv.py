"""dK and dV, the gradient of a bias, and in the one-pass form dQ: one program holds a tile of keys.

In the one-pass form it walks the queries of one head, and the heads of a group add up dK and dV in
memory; in the two-pass form it walks those of the whole group, so that every sum has a fixed
order.

Tiles are transposed, keys down and queries across, so that P^T and dS^T enter their products as
they come out of the accumulators; transposing an accumulator in registers has been miscompiled on
Hopper.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arguments import LaunchSizes
from .bias import add_bias_gradient
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
from .walk import locate, masked_tile, next_tile, sample_bounds, walk_queries


class Operands(NamedTuple):
    """Inputs of a backward kernel; strides are (batch, head, row).

    lse (in the log2 domain; see F.NATURAL) and delta are contiguous (batch, heads, padded_rows of
    the queries), so that tiles of them are read without a check. Where a row sees no key, and
    beyond the queries, lse is +inf, which makes every probability 0.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    lse: Tensor  # of shape (batch, heads, 2, rows) with a bias: natural, and its residual
    delta: Tensor
    query_strides: tuple[int, int, int]
    key_strides: tuple[int, int, int]
    value_strides: tuple[int, int, int]
    dout_strides: tuple[int, int, int]
    end: None = None  # Triton 3.6.0 loses a 1 in the tuples above unless None follows them


@triton.jit
def put_tile(
    base,
    start,
    end,
    tile,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    F: tl.constexpr,
):
    """Write a tile of dK or dV, or add it where each query head of a group brings its share."""
    if F.SHARED_KV:
        offs = tl.arange(0, SIZE)[:, None]
        offs_d = tl.arange(0, PAD)[None, :]
        entries = base + tl.cast(start, tl.int64) * DIM + (offs * DIM + offs_d)
        tl.atomic_add(entries, tile, mask=(start + offs < end) & (offs_d < DIM), sem="relaxed")
    else:
        store_tile(base, start, DIM, end, tile, SIZE, DIM, PAD)


@triton.jit
def gather_queries(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_strides,
    start_n,
    start_r,
    bits_ptr,
    bits,
    b,
    h,
    pair,
    offset,
    end_n,
    base,
    bias_gradient,
    sizes,
    modifiers,
    MASKED: tl.constexpr,
    F: tl.constexpr,
):
    """Take one tile of queries into dK [BLOCK_N, PAD] and dV [BLOCK_N, PAD_V]; add its share of dQ
    to memory.
    """
    start_i = start_r - offset
    check: tl.constexpr = MASKED or F.OFFSET
    # [BLOCK_M, PAD]
    q = load_tile(q_ptr, start_i, q_strides[0], sizes.q_len, F.BLOCK_M, F.DIM, F.PAD, check)
    # [BLOCK_N, BLOCK_M]
    qk_t = tl.dot(k, tl.trans(q), input_precision=F.PRECISION)
    # [1, BLOCK_M]
    lse2, residual2 = load_lse(lse_ptr, pair, start_i, sizes.q_len, F.BLOCK_M, 0, F)
    # [BLOCK_M, PAD_V]
    dout = load_tile(
        dout_ptr, start_i, q_strides[1], sizes.q_len, F.BLOCK_M, F.DIM_V, F.PAD_V, check
    )
    # [BLOCK_N, BLOCK_M]
    dp_t = tl.dot(v, tl.trans(dout), input_precision=F.PRECISION)
    # [BLOCK_M]
    delta = load_rows(delta_ptr, start_i, sizes.q_len, 0.0, F.BLOCK_M, F.OFFSET)
    # [1, BLOCK_M]
    r2 = (start_r + tl.arange(0, F.BLOCK_M))[None, :]
    # [BLOCK_N, 1]
    n2 = (start_n + tl.arange(0, F.BLOCK_N))[:, None]
    keep = True
    if F.DROPOUT:
        i2 = (start_i + tl.arange(0, F.BLOCK_M))[:, None]
        # [BLOCK_N, BLOCK_M]
        keep = tl.trans(dropout_keep(i2, start_n, pair, modifiers, F.BLOCK_N))
    # [BLOCK_N, BLOCK_M]
    p_t, ds_t, slope = score_gradient(
        qk_t, dp_t, lse2, residual2, delta[None, :], keep, bits_ptr, bits, start_n, r2, n2,
        offset, end_n, base, sizes, modifiers, MASKED, F,
    )  # fmt: skip
    if F.BIAS_GRADIENT:  # before the product that follows, or ptxas would wait for each product
        add_bias_gradient(ds_t, b, h, start_n, start_r, offset, bias_gradient, sizes, F)
    # [BLOCK_N, PAD_V]
    dv = tl.dot(p_t.to(dout.dtype), dout, dv, input_precision=F.PRECISION)
    if F.SOFTCAP:
        ds_t = ds_t * slope
    ds_t = ds_t.to(q.dtype)
    # [BLOCK_N, PAD]
    dk = tl.dot(ds_t, q, dk, input_precision=F.PRECISION)
    if F.ATOMIC:
        # [PAD, BLOCK_M]
        dq_t = tl.dot(tl.trans(k), ds_t, input_precision=F.PRECISION)
        dq_ptr += tl.cast(start_i, tl.int64) * F.DIM
        m = tl.arange(0, F.BLOCK_M)[None, :]
        d = tl.arange(0, F.PAD)[:, None]
        inside = d < F.DIM
        if check:
            inside = inside & (start_i + m >= 0) & (start_i + m < sizes.q_len)
        tl.atomic_add(dq_ptr + (m * F.DIM + d), dq_t, mask=inside, sem="relaxed")
    return dk, dv


@triton.jit
def gather_head(
    dk,
    dv,
    k,
    v,
    operands,
    dq_ptr,
    start_n,
    b,
    h,
    pair,
    offset,
    end_n,
    bias_gradient,
    sizes,
    lists,
    modifiers,
    F: tl.constexpr,
):
    """Take all queries of one head that see the tile of keys into dK and dV."""
    row_strides = (row_stride(operands.query_strides, F), row_stride(operands.dout_strides, F))
    q_ptr = head_of(operands.query, operands.query_strides, b, h)
    dout_ptr = head_of(operands.dout, operands.dout_strides, b, h)
    pair64 = tl.cast(pair, tl.int64)
    delta_ptr = operands.delta + pair64 * padded_rows(sizes.q_len)
    if F.ATOMIC:
        dq_ptr += pair64 * sizes.q_len * F.DIM
    base = bias_base(modifiers, b, h, F)
    line = b * sizes.line_batch + h * sizes.line_head + start_n // F.BLOCK_KV
    n_full, n_masked, first, run, run_end, start, stop = walk_queries(
        sizes, lists, line, start_n, offset, end_n, F
    )
    full_start = start
    # as in the forward; where heads are walked too, or are wide, it costs registers and, under
    # Triton 3.6, makes ptxas wait for every product
    if F.GROUPED or F.PAD > 64 or n_full > 0:
        for _ in range(n_full):
            dk, dv = gather_queries(
                dk, dv, k, v, q_ptr, dout_ptr, operands.lse, delta_ptr, dq_ptr, row_strides,
                start_n, start, lists.bits, 0, b, h, pair, offset, end_n, base,
                bias_gradient, sizes, modifiers, False, F,
            )  # fmt: skip
            run, start, stop = next_tile(lists, run, run_end, start, stop, F.BLOCK_M, F.BLOCK_Q, F)
    if F.GROUPED or n_masked > 0:
        for t in range(n_masked):
            start, bits = masked_tile(lists, first, t, full_start, n_full, F.BLOCK_M, F.BLOCK_Q, F)
            dk, dv = gather_queries(
                dk, dv, k, v, q_ptr, dout_ptr, operands.lse, delta_ptr, dq_ptr, row_strides,
                start_n, start, lists.bits, bits, b, h, pair, offset, end_n, base,
                bias_gradient, sizes, modifiers, True, F,
            )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=LaunchSizes._fields)
def backward_kv_kernel(
    operands,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    bias_gradient,
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
    hk = h
    if not F.GROUPED:
        hk = h // sizes.group
    offset, end_n = sample_bounds(sizes, modifiers, b, F)
    tile = index
    if F.KIND == "sparse":
        split: tl.constexpr = F.BLOCK_KV // F.BLOCK_N
        some_head = hk * sizes.group if F.GROUPED else h
        lines = lists.order + b * sizes.line_batch + some_head * sizes.line_head
        tile = tl.load(lines + index // split) * split + index % split
    start_n = tile * F.BLOCK_N
    if start_n >= sizes.kv_len:
        return

    k_ptr, v_ptr, kv_strides = keys_of(operands, b, hk, F)
    # [BLOCK_N, PAD]
    k = load_tile(k_ptr, start_n, kv_strides[0], end_n, F.BLOCK_N, F.DIM, F.PAD, True)
    # [BLOCK_N, PAD_V]
    v = load_tile(v_ptr, start_n, kv_strides[1], end_n, F.BLOCK_N, F.DIM_V, F.PAD_V, True)
    BLOCK_N: tl.constexpr = F.BLOCK_N
    PAD: tl.constexpr = F.PAD
    PAD_V: tl.constexpr = F.PAD_V
    # [BLOCK_N, PAD]
    dk = tl.zeros([BLOCK_N, PAD], tl.float32)
    # [BLOCK_N, PAD_V]
    dv = tl.zeros([BLOCK_N, PAD_V], tl.float32)
    kv_pair = pair
    if F.GROUPED:
        for g in range(sizes.group):
            head = hk * sizes.group + g
            dk, dv = gather_head(
                dk, dv, k, v, operands, dq_ptr, start_n, b, head, pair * sizes.group + g,
                offset, end_n, bias_gradient, sizes, lists, modifiers, F,
            )  # fmt: skip
    else:
        kv_pair = pair // sizes.group
        dk, dv = gather_head(
            dk, dv, k, v, operands, dq_ptr, start_n, b, h, pair,
            offset, end_n, bias_gradient, sizes, lists, modifiers, F,
        )  # fmt: skip
    dk *= scale
    dv *= modifiers.keep_scale
    rows64 = tl.cast(kv_pair, tl.int64) * sizes.kv_len
    put_tile(dk_ptr + rows64 * F.DIM, start_n, sizes.kv_len, dk, BLOCK_N, F.DIM, PAD, F)
    put_tile(dv_ptr + rows64 * F.DIM_V, start_n, sizes.kv_len, dv, BLOCK_N, F.DIM_V, PAD_V, F)
