"""Forward mode: outputs and their tangents, in one walk over the tiles that the mask shows.

With dS the tangents of the scores and P the weights, the running sums of a row are

    O = sum P v,    U = sum (P dS) v + sum P dv,    l = sum P,    t = sum P dS

and at the end dlse = (t + P_sink dsink) / l,  dO = U / l - dlse O / l.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashmark.block_sparse import eager_jvp
from flashmark.block_sparse.call import Call, Grads, Saved

from . import arguments as args
from . import bias as bias_gradient
from . import passes
from .arguments import LaunchSizes
from .attend import add_sink, log_sum
from .dropout import dropout_keep
from .primitives import (
    LOG2E,
    bias_base,
    bias_tile,
    fall,
    head_of,
    keep_seen,
    keys_of,
    load_tile,
    log2_factor,
    logits,
    online_softmax,
    row_stride,
    store_tile,
    visible,
)
from .walk import masked_tile, next_tile, place, walk_keys


class Tangents(NamedTuple):
    """Directions of the inputs, None where one is zero; strides as in `Inputs` and `Modifiers`."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    query_strides: tuple[int, int, int]
    key_strides: tuple[int, int, int]
    value_strides: tuple[int, int, int]
    bias_strides: tuple[int, int, int, int]
    end: None = None  # Triton 3.6.0 loses a 1 in the tuples above unless None follows them


class Outputs(NamedTuple):
    """Contiguous outputs and tangents."""

    out: Tensor
    lse: Tensor
    residual: Tensor
    tout: Tensor
    tlse: Tensor


@triton.jit
def score_tangents(
    q, tq, k, tk_ptr, tk_stride, start_n, slope, tbias_ptr, r2, n2, offset, end_n,
    scale, tangents, sizes, CHECK: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """dS = slope scale (dq k^T + q dk^T) + dbias, [BLOCK_M, BLOCK_N], natural."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    # [BLOCK_M, BLOCK_N]
    ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if tangents.query is not None:
        ds = tl.dot(tq, tl.trans(k), ds, input_precision=F.PRECISION)
    if tangents.key is not None:
        # [BLOCK_N, PAD]
        tk = load_tile(tk_ptr, start_n, tk_stride, end_n, F.BLOCK_N, F.DIM, F.PAD, CHECK)
        ds = tl.dot(q, tl.trans(tk), ds, input_precision=F.PRECISION)
    ds *= scale * slope
    if tangents.bias is not None:
        ds += bias_tile(tbias_ptr, tangents.bias_strides, r2, n2, offset, sizes, F)
    return ds


@triton.jit
def attend_tangents(
    acc, u, l_i, t_i, m_i, q, tq, k_ptr, v_ptr, kv_strides, tk_ptr, tv_ptr, t_strides, start_n,
    bits_ptr, bits, r2, offset, end_n, pair, base, tbias_ptr, scale, tangents, sizes, modifiers,
    MASKED: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into O, U [BLOCK_M, PAD_V], l, t and the row maxima."""
    BOUND: tl.constexpr = MASKED or F.CLIP
    # [BLOCK_N, PAD]
    k = load_tile(k_ptr, start_n, kv_strides[0], end_n, F.BLOCK_N, F.DIM, F.PAD, BOUND)
    # [BLOCK_N, PAD_V]
    v = load_tile(v_ptr, start_n, kv_strides[1], end_n, F.BLOCK_N, F.DIM_V, F.PAD_V, BOUND)
    # [1, BLOCK_N]
    n2 = (start_n + tl.arange(0, F.BLOCK_N))[None, :]
    # [BLOCK_M, BLOCK_N]
    qk = tl.dot(q, tl.trans(k), input_precision=F.PRECISION)
    s, slope = logits(qk, base, r2, n2, offset, sizes, modifiers, F)
    ds = score_tangents(
        q, tq, k, tk_ptr, t_strides[0], start_n, slope, tbias_ptr, r2, n2, offset, end_n,
        scale, tangents, sizes, BOUND, F,
    )  # fmt: skip
    if BOUND:
        seen = visible(bits_ptr, bits, start_n, r2, n2, end_n, sizes, MASKED, F)
        s = keep_seen(seen, s, float("-inf"), MASKED, F)
    safe: tl.constexpr = BOUND or F.BIAS != "none"
    # p [BLOCK_M, BLOCK_N]; alpha, m_i, l_i [BLOCK_M]
    p, alpha, m_i, l_i = online_softmax(
        s, log2_factor(modifiers, F), m_i, l_i, safe, NATURAL=F.NATURAL
    )
    # what a hidden key holds, NaN included, reaches no tangent
    pds = tl.where(p == 0.0, 0.0, p * ds)
    t_i = t_i * alpha + tl.sum(pds, 1)
    if F.DROPOUT:
        # [BLOCK_M, BLOCK_N]
        keep = dropout_keep(r2 - offset, start_n, pair, modifiers, F.BLOCK_N)
        p = tl.where(keep, p, 0.0)
        pds = tl.where(keep, pds, 0.0)
    # [BLOCK_M, PAD_V]
    p = p.to(v.dtype)
    acc = tl.dot(p, v, acc * alpha[:, None], input_precision=F.PRECISION)
    u = tl.dot(pds.to(v.dtype), v, u * alpha[:, None], input_precision=F.PRECISION)
    if tangents.value is not None:
        # [BLOCK_N, PAD_V]
        tv = load_tile(tv_ptr, start_n, t_strides[1], end_n, F.BLOCK_N, F.DIM_V, F.PAD_V, BOUND)
        u = tl.dot(p, tv, u, input_precision=F.PRECISION)
    return acc, u, l_i, t_i, m_i


@triton.jit(do_not_specialize=LaunchSizes._fields)
def jvp_kernel(
    inputs,
    tangents,
    outputs,
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
    pair, b, h, offset, end_n, leading, row0 = place(sizes, lists, modifiers, F)
    if row0 >= offset + sizes.q_len:
        return

    kv_head = h // sizes.group
    q_ptr = head_of(inputs.query, inputs.query_strides, b, h)
    k_ptr, v_ptr, kv_strides = keys_of(inputs, b, kv_head, F)
    tk_ptr, tv_ptr, tbias_ptr = tangents.key, tangents.value, tangents.bias
    if tangents.key is not None:
        tk_ptr = head_of(tangents.key, tangents.key_strides, b, kv_head)
    if tangents.value is not None:
        tv_ptr = head_of(tangents.value, tangents.value_strides, b, kv_head)
    if tangents.bias is not None:
        tbias_ptr = bias_base(tangents, b, h, F)
    t_strides = row_stride(tangents.key_strides, F), row_stride(tangents.value_strides, F)
    base = bias_base(modifiers, b, h, F)
    start_i = row0 - offset
    q_stride = row_stride(inputs.query_strides, F)
    # [BLOCK_M, PAD]
    q = load_tile(q_ptr, start_i, q_stride, sizes.q_len, F.BLOCK_M, F.DIM, F.PAD, True)
    tq = q
    if tangents.query is not None:
        tq_ptr = head_of(tangents.query, tangents.query_strides, b, h)
        tq_stride = row_stride(tangents.query_strides, F)
        tq = load_tile(tq_ptr, start_i, tq_stride, sizes.q_len, F.BLOCK_M, F.DIM, F.PAD, True)

    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD_V: tl.constexpr = F.PAD_V
    # [BLOCK_M, PAD_V]
    acc = tl.zeros([BLOCK_M, PAD_V], tl.float32)
    u = tl.zeros([BLOCK_M, PAD_V], tl.float32)
    # [BLOCK_M]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    t_i = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, 1]
    r2 = (row0 + tl.arange(0, BLOCK_M))[:, None]
    line = leading + row0 // F.BLOCK_Q
    n_full, n_masked, first, run, run_end, start, stop = walk_keys(
        sizes, lists, line, row0, end_n, F
    )
    full_start = start
    # a loop that may run zero times makes ptxas wait for every product before the next
    if n_full > 0:
        for _ in range(n_full):
            acc, u, l_i, t_i, m_i = attend_tangents(
                acc, u, l_i, t_i, m_i, q, tq, k_ptr, v_ptr, kv_strides, tk_ptr, tv_ptr, t_strides,
                start, lists.bits, 0, r2, offset, end_n, pair, base, tbias_ptr, scale, tangents,
                sizes, modifiers, False, F,
            )  # fmt: skip
            run, start, stop = next_tile(lists, run, run_end, start, stop, F.BLOCK_N, F.BLOCK_KV, F)
    if n_masked > 0:
        for t in range(n_masked):
            start, bits = masked_tile(lists, first, t, full_start, n_full, F.BLOCK_N, F.BLOCK_KV, F)
            acc, u, l_i, t_i, m_i = attend_tangents(
                acc, u, l_i, t_i, m_i, q, tq, k_ptr, v_ptr, kv_strides, tk_ptr, tv_ptr, t_strides,
                start, lists.bits, bits, r2, offset, end_n, pair, base, tbias_ptr, scale, tangents,
                sizes, modifiers, True, F,
            )  # fmt: skip
    finish(acc, u, l_i, t_i, m_i, start_i, pair, h, tangents.sinks, outputs, sizes, modifiers, F)


@triton.jit
def finish(
    acc, u, l_i, t_i, m_i, start_i, pair, h, tsinks, outputs, sizes, modifiers, F: tl.constexpr
):  # fmt: skip
    """Normalise a tile of queries that has seen all its keys, and store it."""
    if modifiers.sinks is not None:
        sink = tl.load(modifiers.sinks + h).to(tl.float32)
        m_i, l_i, alpha = add_sink(m_i, l_i, sink, F.NATURAL)
        # [BLOCK_M, PAD_V]
        acc *= alpha[:, None]
        u *= alpha[:, None]
        # [BLOCK_M]
        t_i *= alpha
        if tsinks is not None:
            unit: tl.constexpr = 1.0 if F.NATURAL else LOG2E
            pivot = tl.where(m_i == float("-inf"), 0.0, m_i)
            t_i += fall(sink * unit, pivot, F.NATURAL) * tl.load(tsinks + h).to(tl.float32)
    share = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)
    tlse = t_i * share
    # [BLOCK_M, PAD_V]
    acc *= (modifiers.keep_scale * share)[:, None]
    u = u * (modifiers.keep_scale * share)[:, None] - tlse[:, None] * acc
    # [BLOCK_M]
    lse, residual = log_sum(m_i, l_i, F.NATURAL)

    rows64 = tl.cast(pair, tl.int64) * sizes.q_len
    to = rows64 * F.DIM_V
    store_tile(outputs.out + to, start_i, F.DIM_V, sizes.q_len, acc, F.BLOCK_M, F.DIM_V, F.PAD_V)
    store_tile(outputs.tout + to, start_i, F.DIM_V, sizes.q_len, u, F.BLOCK_M, F.DIM_V, F.PAD_V)
    offs_i = start_i + tl.arange(0, F.BLOCK_M)
    inside = (offs_i >= 0) & (offs_i < sizes.q_len)
    tl.store(outputs.lse + rows64 + offs_i, lse, mask=inside)
    tl.store(outputs.tlse + rows64 + offs_i, tlse, mask=inside)
    if F.NATURAL:
        tl.store(outputs.residual + rows64 + offs_i, residual, mask=inside)


def jvp(call: Call, tangents: Grads) -> tuple[Saved, tuple[Tensor, Tensor]]:
    """Outputs, and the tangents of out and lse; a tangent of None is zero."""
    query, key, value = call.query, call.key, call.value
    if not query.numel() or not key.numel():
        return eager_jvp.jvp(call, tangents)  # nothing to launch
    described = args.describe(call)
    config = passes.choose_config("jvp", query, described)
    sizes, features = passes.over_queries(described, call.mask, query, config)
    batch, heads, q_len, _ = query.shape
    out = torch.empty(batch, heads, q_len, value.shape[-1], dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
    residual = args.residual_of(call, lse)
    outputs = Outputs(out, lse, residual, torch.empty_like(out), torch.empty_like(lse))
    with args.on_device(query):
        jvp_kernel[(sizes.tiles * sizes.pairs,)](
            args.inputs(query, key, value),
            _described(tangents),
            outputs,
            described.rows,
            described.modifiers,
            call.scale,
            *sizes,
            F=features,
            **config.options,
        )
    return Saved(out, lse, residual), (outputs.tout, outputs.tlse)


def _described(tangents: Grads) -> Tangents:
    given = [None if x is None else x.contiguous() for x in tangents]
    strides = [(0, 0, 0) if x is None else args.strides(x) for x in given[:3]]
    bias = given[3]
    to_entries = (0, 0, 0, 0) if bias is None else bias_gradient.strides(bias.shape, bias.stride())
    return Tangents(*given, *strides, to_entries)
