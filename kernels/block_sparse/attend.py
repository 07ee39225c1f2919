"""One step of softmax attention over a tile of keys, which the forward and the decode kernels
share.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    dropout_keep,
    load_tile,
    log2_factor,
    logits,
    online_softmax,
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
    problem,
    modifiers,
    MASKED: tl.constexpr,
    F: tl.constexpr,
):
    """Take one tile of keys into the running output [BLOCK_M, PAD_V], row sums and row maxima.

    r2 holds the row of the mask of each query; `pair` and `base` are scalars or, like r2, one to a
    query.
    """
    BOUND: tl.constexpr = MASKED or F.CLIP
    k = load_tile(k_ptr, start_n, kv_strides[0], end_n, F.BLOCK_N, F.DIM, F.PAD, BOUND)
    v = load_tile(v_ptr, start_n, kv_strides[1], end_n, F.BLOCK_N, F.DIM_V, F.PAD_V, BOUND)
    n2 = (start_n + tl.arange(0, F.BLOCK_N))[None, :]
    qk = tl.dot(q, tl.trans(k), input_precision=F.PRECISION)
    s, _ = logits(qk, base, r2, n2, offset, problem, modifiers, F)
    if BOUND:
        seen = visible(bits_ptr, bits, start_n, r2, n2, end_n, problem, MASKED, F)
        s = tl.where(seen, s, float("-inf"))
    safe: tl.constexpr = BOUND or F.BIAS != "none"
    p, alpha, m_i, l_i = online_softmax(s, log2_factor(modifiers, F), m_i, l_i, safe)
    if F.DROPOUT:
        keep = dropout_keep(r2 - offset, start_n, pair, modifiers, F.BLOCK_N)
        p = tl.where(keep, p, 0.0)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=F.PRECISION)
    return acc, l_i, m_i


@triton.jit
def add_sink(m_i, l_i, sink):
    """Let one more logit join the denominator: (m_i, l_i, rescale of the sums so far)."""
    m_i_new = tl.maximum(m_i, sink)
    pivot = tl.where(m_i_new == float("-inf"), 0.0, m_i_new)
    alpha = tl.exp2(m_i - pivot)
    return m_i_new, l_i * alpha + tl.exp2(sink - pivot), alpha
