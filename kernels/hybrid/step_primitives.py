"""Functions of a decoding step: a softmax that takes one tile after the other."""

from __future__ import annotations

import triton
import triton.language as tl

from ..nystrom.primitives import mm_acc


@triton.jit
def rounded_product(x, y):
    """x y, rounded before a sum over threads: they then hold the same bits of that sum.

    Fused with what other threads send, each would leave its own product unrounded; a weight of a
    token would not be the same in the sum of weights and in the sum of keys.
    """
    return x * y + 0.0


@triton.jit
def one_of(keep_ptr, b, F: tl.constexpr):
    """Whether the token of sample b takes part."""
    kept = True
    if F.KEEP:
        kept = tl.load(keep_ptr + b) != 0
    return kept


@triton.jit
def add_tile(s, v, near, F: tl.constexpr):
    """(top, total, acc) with the logits of a tile, [PAD_G, n], and its values, [n, PAD_V]."""
    top, total, acc = near
    higher = tl.maximum(top, tl.max(s, 1))
    pivot = tl.where(higher == float("-inf"), 0.0, higher)
    # [PAD_G, n]
    P = tl.exp2(s - pivot[:, None])
    alpha = tl.exp2(top - pivot)
    acc = mm_acc(P, v, acc * alpha[:, None], F)
    return higher, total * alpha + tl.sum(P, 1), acc


@triton.jit
def add_keys(q, k_ptr, v_ptr, keep_ptr, first, stop, near, scale2, F: tl.constexpr):
    """`near` with the held tokens [first, stop)."""
    offs_d, offs_v = tl.arange(0, F.PAD_D), tl.arange(0, F.PAD_V)
    for r0 in range(first, stop, F.BLOCK):
        # [BLOCK]
        rows = r0 + tl.arange(0, F.BLOCK)
        seen = rows < stop
        seen = seen & (tl.load(keep_ptr + rows, mask=seen, other=0) != 0)
        at = rows.to(tl.int64)[:, None]
        # [BLOCK, PAD_D] and [BLOCK, PAD_V]
        k = tl.load(k_ptr + at * F.DIM + offs_d[None, :],
                    mask=seen[:, None] & (offs_d < F.DIM)[None, :], other=0.0)  # fmt: skip
        v = tl.load(v_ptr + at * F.DIM_V + offs_v[None, :],
                    mask=seen[:, None] & (offs_v < F.DIM_V)[None, :], other=0.0)  # fmt: skip
        # [PAD_G, BLOCK]
        s = tl.dot(q, tl.trans(k), input_precision=F.PRECISION) * scale2
        near = add_tile(tl.where(seen[None, :], s, float("-inf")), v, near, F)
    return near
