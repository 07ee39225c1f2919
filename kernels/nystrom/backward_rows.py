"""Backward, query side: forward in time, from the states at the start of each slot.

dQ, the gradients of core and landmark keys, and what a slot hands to the keys before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import norms, read_weights
from .primitives import (
    end_of_chunk,
    exponentials,
    full,
    head_of,
    kept_tokens,
    key_scores,
    load_landmarks,
    load_rows,
    load_state,
    locate,
    lower,
    mm,
    mm_acc,
    mm_core,
    parameters,
    reciprocal,
    running_sums,
    span_of,
    state_ptrs,
    store_rows,
    times_steps,
    turned_features,
    turned_products,
    zeros,
)
from .steep import exact_dweights, exact_norm, rebased


@triton.jit
def centre_of(W, dW, F: tl.constexpr):
    """What ds subtracts from dO . v: dW, or dO . out where rows are divided by their mass."""
    centre = dW
    if F.MASS:
        centre = tl.sum(W * dW, 1)[:, None] + zeros(F.CHUNK, F.PAD_M)
    return centre


@triton.jit
def row_gradients(P, W, inverse, rows, pairs, dout, acc, F: tl.constexpr):
    """(W e^{ref-L}, dW, centre): [CHUNK, PAD_M] each. `dout` is 0 beyond `rows`.

    dW_il = dO_i . R_l(i) = e^{L0-L} dO R0^T + [(dO V^T) selected where j <= i] D
    """
    if F.MASS:  # no reading of garbage: it might be infinite
        W = tl.where(rows[:, None], W, 0.0)
    dW = mm_acc(tl.where(lower(F), pairs, 0.0), P, mm(dout, acc, F), F) * inverse
    return W * inverse, dW, centre_of(W, dW, F)


@triton.jit
def exact_row_gradients(s, exact, W, pairs, dout, ref, acc, first, F: tl.constexpr):
    """The same for rows at or after `first`; `dout` is 0 before them."""
    slow = (tl.arange(0, F.CHUNK) >= first)[:, None]
    carried = tl.where(slow, tl.exp2(ref[None, :] - exact), 0.0)
    W = tl.where(slow, W, 0.0)
    dW = mm(dout, acc, F) * carried + exact_dweights(s, exact, pairs, first, F)
    return W * carried, dW, centre_of(W, dW, F)


@triton.jit
def reading_gradients(features, W, factor, dW, centre, core, F: tl.constexpr):
    """(d of features core, d of the query's scores): [CHUNK, PAD_M] each."""
    dG = dW
    if F.MASS:
        dG = factor * (dW - centre)
    dF = mm_core(dG, tl.trans(core), F)
    dscores = features * dF
    if not F.MASS:  # sum over l of F dF = sum over l of W dW
        dscores -= features * tl.sum(W * dW, 1)[:, None]
    return dG, dscores


@triton.jit
def take_rows(
    q_ptr,
    dq_ptr,
    t0,
    stride,
    rows,
    marks,
    lk,
    own_lk,
    lk_ptr,
    core,
    half2,
    d0,
    features,
    W,
    factor,
    dW,
    centre,
    dcore,
    dlk,
    dhalf,
    ddecay,
    F: tl.constexpr,
):
    """Store dQ of `rows`, and add to the gradients of core, landmark keys, s_ll / 2 and decay."""
    NARROW_D: tl.constexpr = F.DIM % F.BLOCK_D != 0
    if F.MASS:
        W = tl.where(rows[:, None], W, 0.0)
        factor = tl.where(rows[:, None], factor, 0.0)
    dG, dscores = reading_gradients(features, W, factor, dW, centre, core, F)
    dq = mm(dscores, tl.trans(own_lk), F) * marks.scale
    store_rows(dq_ptr, t0, F.DIM, rows, F.DIM - d0, dq, F.CHUNK, F.BLOCK_D, NARROW_D)
    dots = turned_products(q_ptr, t0, stride, rows, lk, lk_ptr, marks.lk_strides[2], F)
    dcore = mm_acc(turned_features(dots, half2, marks, F), dG, dcore, F)
    q = load_rows(q_ptr + d0, t0, stride, rows, F.DIM - d0, F.CHUNK, F.BLOCK_D, NARROW_D)
    dlk = mm_acc(tl.trans(q), dscores, dlk, F)
    if F.MASS:  # of Z_l(i), on top of what ds has
        dlog = W * (dW - centre)
        dhalf -= tl.sum(dlog + dscores, 0)
        if F.DECAY:
            ddecay -= tl.sum(times_steps(dlog, F), 0)
    return dcore, dlk, dhalf, ddecay


@triton.jit(do_not_specialize=["problem"])
def rows_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    marks,
    keep_ptr,
    saved,
    own,
    partial,
    table,
    problem,
    F: tl.constexpr,
):
    part, group, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    b64, h64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    NARROW_V: tl.constexpr = F.DIM_V != F.BLOCK_V
    q_ptr += b64 * q_strides[0] + h64 * F.GROUP * q_strides[1]
    k_ptr += b64 * k_strides[0] + h64 * k_strides[1]
    v_ptr += b64 * v_strides[0] + h64 * v_strides[1]
    dout_ptr += b64 * dout_strides[0] + h64 * F.GROUP * dout_strides[1]
    d0 = part * F.BLOCK_D
    head_size = tl.cast(problem.tokens, tl.int64) * F.DIM
    dq_ptr += (b64 * problem.heads + h64) * F.GROUP * head_size + d0
    if F.KEEP:
        keep_ptr += b64 * problem.tokens
    lq_ptr, lk_ptr, lq, lk, core, decay2, half2 = parameters(marks, b, h, q_ptr.dtype.element_ty, F)
    own_lk = load_landmarks(lk_ptr, marks.lk_strides[2], part, tl.float32, F)

    dcore = zeros(F.PAD_M, F.PAD_M)
    dlk = zeros(F.BLOCK_D, F.PAD_M)
    dhalf = full(F.PAD_M, 0.0)
    ddecay = full(F.PAD_M, 0.0)
    for slot in range(group * problem.units,
                      tl.minimum((group + 1) * problem.units, problem.slots)):  # fmt: skip
        start, stop, _ = span_of(slot, b, problem, table, F)
        line = tl.cast(pair, tl.int64) * problem.slots + slot
        ref, tot, acc = load_state(saved, line, 0, F)
        G = zeros(F.BLOCK_V, F.PAD_M)
        pull = full(F.PAD_M, 0.0)
        ratio = tot  # e^{L at the slot's start}, in units of 2^ref now
        for t0 in range(start, stop, F.CHUNK):
            keep = kept_tokens(keep_ptr, t0, stop, F)
            s = key_scores(k_ptr, t0, k_strides[2], keep, lq, marks, lq_ptr, decay2, F)
            v = load_rows(v_ptr, t0, v_strides[2], keep, F.DIM_V, F.CHUNK, F.BLOCK_V, NARROW_V)
            ref, P, first = exponentials(s, keep, ref, tot, F)
            cum = running_sums(P, tot, F)
            inverse = reciprocal(cum)
            norm = norms(ref[None, :] + tl.log2(cum), decay2, F) if F.MASS else 0.0
            offs = tl.arange(0, F.CHUNK)
            there = t0 + offs < stop
            for g in range(F.GROUP):
                head_ptr, dhead_ptr = (
                    head_of(q_ptr, g, q_strides),
                    dq_ptr + g * head_size,
                )
                rows = there & (offs < first)
                features, W, factor = read_weights(head_ptr, t0, q_strides[2], there, lk, lk_ptr,
                                                   marks, core, norm, half2, F)  # fmt: skip
                dout = load_rows(head_of(dout_ptr, g, dout_strides), t0, dout_strides[2], rows,
                                 F.DIM_V, F.CHUNK, F.BLOCK_V, NARROW_V)  # fmt: skip
                pairs = tl.dot(dout, tl.trans(v), input_precision=F.PRECISION)
                wt, dW, centre = row_gradients(P, W, inverse, rows, pairs, dout, acc, F)
                G = mm_acc(tl.trans(dout), wt * ratio[None, :], G, F)
                pull += tl.sum(wt * centre, 0) * ratio
                dcore, dlk, dhalf, ddecay = take_rows(
                    head_ptr, dhead_ptr, t0, q_strides[2], rows, marks, lk, own_lk, lk_ptr, core,
                    half2, d0, features, W, factor, dW, centre, dcore, dlk, dhalf, ddecay, F,
                )  # fmt: skip
            own_ratio = full(F.PAD_M, 1.0)
            if first < F.CHUNK:
                s = key_scores(k_ptr, t0, k_strides[2], keep, lq, marks, lq_ptr, decay2, F)
                exact = exact_norm(s, ref, tot, F)
                Z = norms(exact, decay2, F)
                for g in range(F.GROUP):
                    head_ptr, dhead_ptr = (
                        head_of(q_ptr, g, q_strides),
                        dq_ptr + g * head_size,
                    )
                    rows = there & (offs >= first)
                    features, W, factor = read_weights(
                        head_ptr, t0, q_strides[2], there, lk, lk_ptr, marks, core, Z, half2, F
                    )
                    dout = load_rows(head_of(dout_ptr, g, dout_strides), t0, dout_strides[2], rows,
                                     F.DIM_V, F.CHUNK, F.BLOCK_V, NARROW_V)  # fmt: skip
                    pairs = tl.dot(dout, tl.trans(v), input_precision=F.PRECISION)
                    wt, dW, centre = exact_row_gradients(s, exact, W, pairs, dout, ref, acc,
                                                         first, F)  # fmt: skip
                    G = mm_acc(tl.trans(dout), wt * ratio[None, :], G, F)
                    pull += tl.sum(wt * centre, 0) * ratio
                    dcore, dlk, dhalf, ddecay = take_rows(
                        head_ptr, dhead_ptr, t0, q_strides[2], rows, marks, lk, own_lk, lk_ptr,
                        core, half2, d0, features, W, factor, dW, centre, dcore, dlk, dhalf,
                        ddecay, F,
                    )  # fmt: skip
                P, ref, own_ratio = rebased(s, ref, tot, F)
            length = tl.minimum(stop - t0, F.CHUNK)
            E, ref, tot, own_ratio = end_of_chunk(P, ref, tot, own_ratio, decay2, length, F)
            acc = mm_acc(tl.trans(v), E, acc * own_ratio[None, :], F)
            ratio *= own_ratio
        pull_ptrs, G_ptrs = state_ptrs(own.pull, own.G, line, 0, F)
        ratio_ptrs, _ = state_ptrs(own.ratio, own.G, line, 0, F)
        tl.store(pull_ptrs, pull)
        tl.store(G_ptrs, G)
        tl.store(ratio_ptrs, tl.where(tot == 0.0, 0.0, ratio / tot))
    store_partials(partial, group, pair, part, dcore, dlk, dhalf, ddecay, problem, F)


@triton.jit
def store_partials(partial, group, pair, part, dcore, dlk, dhalf, ddecay, problem,
                   F: tl.constexpr):  # fmt: skip
    """This program's share of the parameter gradients, a place of its own."""
    line = tl.cast(pair, tl.int64) * problem.groups + group
    offs_m = tl.arange(0, F.PAD_M)
    offs_d = part * F.BLOCK_D + tl.arange(0, F.BLOCK_D)
    rows = line * problem.parts * F.BLOCK_D + offs_d
    tl.store(partial.dlk + rows[:, None] * F.PAD_M + offs_m[None, :], dlk)
    if part == 0:
        marks = line * F.PAD_M + offs_m
        tl.store(partial.dcore + marks[:, None] * F.PAD_M + offs_m[None, :], dcore)
        tl.store(partial.dhalf + marks, dhalf)
        tl.store(partial.ddecay + marks, ddecay)
