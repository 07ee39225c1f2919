"""The exact path, for rows at or after a large rise of a normaliser inside a chunk.

One landmark after another, every exponent is taken against the row's own normaliser, so none is
positive. Kernels branch here on one number a chunk, which is almost never below CHUNK; the branch
computes what it needs again, so that the usual path holds nothing for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import zeros


@triton.jit
def column(x, m, F: tl.constexpr):
    """Column m of [CHUNK, PAD_M]."""
    return tl.sum(tl.where((tl.arange(0, F.PAD_M) == m)[None, :], x, 0.0), 1)


@triton.jit
def put_column(x, m, values, F: tl.constexpr):
    return tl.where((tl.arange(0, F.PAD_M) == m)[None, :], values[:, None], x)


@triton.jit
def exact_norm(s, ref, tot, F: tl.constexpr):
    """log2(tot 2^ref + sum over j <= i of 2^s_j), [CHUNK, PAD_M]; 0 in the padding."""
    offs = tl.arange(0, F.CHUNK)
    L0 = tl.where(tot == 0.0, float("-inf"), ref + tl.log2(tot))
    norm = zeros(F.CHUNK, F.PAD_M)
    for m in range(F.MARKS):
        past = tl.sum(tl.where(tl.arange(0, F.PAD_M) == m, L0, 0.0), 0)
        x = tl.where(offs[:, None] >= offs[None, :], column(s, m, F)[None, :], float("-inf"))
        top = tl.maximum(tl.max(x, 1), past)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(x - top[:, None]), 1) + tl.exp2(past - top)
        norm = put_column(norm, m, top + tl.log2(total), F)
    return norm


@triton.jit
def rebased(s, ref, tot, F: tl.constexpr):
    """(P, ref, ratio) with the chunk's maximum as the reference: only later chunks see it."""
    top = tl.maximum(tl.ceil(tl.max(s, 0)), tl.where(tot == 0.0, float("-inf"), ref))
    top = tl.where(top == float("-inf"), 0.0, top)
    ratio = tl.where(tot == 0.0, 0.0, tl.exp2(ref - top))
    return tl.exp2(s - top[None, :]), top, ratio


@triton.jit
def exact_decayed(s, norm, m, first, F: tl.constexpr):
    """D_ij = 2^(s_j - L(i)) under landmark m, [query, key]; rows before the rise are 0."""
    offs = tl.arange(0, F.CHUNK)
    seen = (offs[:, None] >= offs[None, :]) & (offs >= first)[:, None]
    x = column(s, m, F)[None, :] - column(norm, m, F)[:, None]
    return tl.where(seen, tl.exp2(x), 0.0)


@triton.jit
def exact_between(s, norm, W, first, F: tl.constexpr):
    """sum over landmarks of W_i D_ij, [query, key]."""
    between = zeros(F.CHUNK, F.CHUNK)
    for m in range(F.MARKS):
        between += column(W, m, F)[:, None] * exact_decayed(s, norm, m, first, F)
    return between


@triton.jit
def exact_dweights(s, norm, pairs, first, F: tl.constexpr):
    """sum over j of D_ij (dO_i . v_j), [query, landmark]."""
    dW = zeros(F.CHUNK, F.PAD_M)
    for m in range(F.MARKS):
        D = exact_decayed(s, norm, m, first, F)
        dW = put_column(dW, m, tl.sum(pairs * D, 1), F)
    return dW


@triton.jit
def exact_dscores(s, norm, W, centre, pairs, first, F: tl.constexpr):
    """sum over i of W_i D_ij (dO_i . v_j - centre_i), [key, landmark]."""
    ds = zeros(F.CHUNK, F.PAD_M)
    for m in range(F.MARKS):
        D = exact_decayed(s, norm, m, first, F)
        pull = column(W, m, F)[:, None] * D * (pairs - column(centre, m, F)[:, None])
        ds = put_column(ds, m, tl.sum(pull, 0), F)
    return ds
