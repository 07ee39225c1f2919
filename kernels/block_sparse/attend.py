"""One step of softmax attention over a tile of keys, and the normalisation after the last step. The
forward and the decode kernels share them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import dropout_keep
from .primitives import (
    LN2,
    LOG2E,
    fall,
    keep_seen,
    load_tile,
    log2_factor,
    logits,
    online_softmax,
    store_tile,
    visible,
)


@triton.jit
def attend(
    acc,
    l_i,
    m_i,
    q,
    k_ptr,
    v_ptr,
    kv_strides,
    start_n,
    bits_ptr,
    bits,
    r2,
    offset,
    end_n,
    pair,
    base,
    sizes,
    modifiers,
    MASKED: tl.constexpr,
    F: tl.constexpr,
):
    """Take one tile of keys into the running output [BLOCK_M, PAD_V], row sums and row maxima.

    r2 holds the row of the mask of each query; `pair` and `base` are scalars or, like r2, one to a
    query.
    """
    BOUND: tl.constexpr = MASKED or F.CLIP
    # [BLOCK_N, PAD]
    k = load_tile(k_ptr, start_n, kv_strides[0], end_n, F.BLOCK_N, F.DIM, F.PAD, BOUND)
    # [BLOCK_N, PAD_V]
    v = load_tile(v_ptr, start_n, kv_strides[1], end_n, F.BLOCK_N, F.DIM_V, F.PAD_V, BOUND)
    # [1, BLOCK_N]
    n2 = (start_n + tl.arange(0, F.BLOCK_N))[None, :]
    # [BLOCK_M, BLOCK_N]
    qk = tl.dot(q, tl.trans(k), input_precision=F.PRECISION)
    s, _ = logits(qk, base, r2, n2, offset, sizes, modifiers, F)
    if BOUND:
        seen = visible(bits_ptr, bits, start_n, r2, n2, end_n, sizes, MASKED, F)
        s = keep_seen(seen, s, float("-inf"), MASKED, F)
    safe: tl.constexpr = BOUND or F.BIAS != "none"
    # p [BLOCK_M, BLOCK_N]; alpha, m_i, l_i [BLOCK_M]
    p, alpha, m_i, l_i = online_softmax(
        s, log2_factor(modifiers, F), m_i, l_i, safe, NATURAL=F.NATURAL
    )
    if F.DROPOUT:
        # [BLOCK_M, BLOCK_N]
        keep = dropout_keep(r2 - offset, start_n, pair, modifiers, F.BLOCK_N)
        p = tl.where(keep, p, 0.0)
    # [BLOCK_M, PAD_V]
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=F.PRECISION)
    return acc, l_i, m_i


@triton.jit
def add_sink(m_i, l_i, sink, NATURAL: tl.constexpr):
    """Let one more logit join the denominator: (m_i, l_i, rescale of the sums so far)."""
    if not NATURAL:
        sink = sink * LOG2E
    m_i_new = tl.maximum(m_i, sink)
    pivot = tl.where(m_i_new == float("-inf"), 0.0, m_i_new)
    alpha = fall(m_i, pivot, NATURAL)
    return m_i_new, l_i * alpha + fall(sink, pivot, NATURAL), alpha


@triton.jit
def log_sum(m_i, l_i, NATURAL: tl.constexpr):
    """(lse, residual): the natural log of a row's sum and, if NATURAL, its float32 rounding
    residual.
    """
    if NATURAL:
        log_l = tl.log2(l_i) * LN2
        lse = m_i + log_l
        residual = tl.where(l_i == 0.0, 0.0, (m_i - lse) + log_l)
    else:
        lse = (m_i + tl.log2(l_i)) * LN2  # no key and no sink: log2(0) = -inf
        residual = lse
    return lse, residual


@triton.jit
def normalise(acc, l_i, m_i, h, modifiers, NATURAL: tl.constexpr = False):
    """(output, lse, residual) of a tile of queries that has seen all its keys."""
    if modifiers.sinks is not None:
        sink = tl.load(modifiers.sinks + h).to(tl.float32)
        m_i, l_i, alpha = add_sink(m_i, l_i, sink, NATURAL)
        # [BLOCK_M, PAD_V]
        acc = acc * alpha[:, None]
    acc = acc * (modifiers.keep_scale / tl.where(l_i == 0.0, 1.0, l_i))[:, None]
    lse, residual = log_sum(m_i, l_i, NATURAL)
    return acc, lse, residual


@triton.jit
def store_rows(
    out_ptr, lse_ptr, residual_ptr, acc, lse, residual, start_i, pair, sizes, F: tl.constexpr
):
    """Store a tile of outputs and its lse, contiguous over (batch, head, query)."""
    pair64 = tl.cast(pair, tl.int64)
    out_ptr += pair64 * sizes.q_len * F.DIM_V
    store_tile(out_ptr, start_i, F.DIM_V, sizes.q_len, acc, F.BLOCK_M, F.DIM_V, F.PAD_V)
    offs_i = start_i + tl.arange(0, F.BLOCK_M)
    inside = (offs_i >= 0) & (offs_i < sizes.q_len)
    tl.store(lse_ptr + pair64 * sizes.q_len + offs_i, lse, mask=inside)
    if F.NATURAL:
        tl.store(residual_ptr + pair64 * sizes.q_len + offs_i, residual, mask=inside)
