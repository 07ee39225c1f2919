"""Backward, query side: forward in time, from the states at the start of each stretch.

dQ, the gradients of core and landmark keys, and what a stretch hands to the keys before it. Wide
problems share this out over launches (`Features.TAKES`), each of which holds fewer sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Problem
from .chunks import end_of_chunk, enter_chunk, norms, running_sums
from .primitives import (
    full,
    head_of,
    load_rows,
    load_state,
    locate,
    lower,
    mm,
    mm_acc,
    operand,
    reciprocal,
    rounded_product,
    span_of,
    state_ptrs,
    store_rows,
    tokens_of,
    vector_ptrs,
    zeros,
)
from .reading import (
    core_mm,
    landmark_queries,
    load_decay,
    own_columns,
    own_tokens,
    split_keys,
    turned_weights,
)


@triton.jit
def centre_of(W, dW, F: tl.constexpr):
    """The term that ds subtracts from dO . v: dW, or dO . out for normalize="mass"."""
    centre = dW
    if F.MASS:
        centre = tl.sum(W * dW, 0)[None, :] + zeros(F.PAD_M, F.CHUNK)
    return centre


@triton.jit
def row_gradients(W, inverse, P, R0, dout, v, t0, F: tl.constexpr):
    """(W e^{ref-L}, dW, centre, dO . v selected): a landmark or a key a row, a query a column.

    dW_il = dO_i . R_l(i) = e^{L0-L} dO R0^T + [(dO V^T) selected where j <= i] D
    """
    # [CHUNK, CHUNK]
    pairs = tl.dot(v, tl.trans(dout), input_precision=F.PRECISION)
    pairs = operand(tl.where(tl.trans(lower(t0, F)), pairs, 0.0), F)
    # [PAD_M, CHUNK]
    dW = mm_acc(P, pairs, mm(R0, tl.trans(dout), F), F) * inverse
    return W * inverse, dW, centre_of(W, dW, F), pairs


@triton.jit
def reading_gradients(features, W, factor, dW, centre, core, F: tl.constexpr):
    """(d of features core, d of the query's scores): [PAD_M, CHUNK] each."""
    dG = dW
    if F.MASS:
        dG = factor * (dW - centre)
    dscores = features * core_mm(core, dG, False, F)
    if not F.MASS:  # sum over l of F dF = sum over l of W dW
        dscores -= features * tl.sum(W * dW, 0)[None, :]
    return dG, dscores


@triton.jit
def take_rows(queries, dq_ptr, t0, length, rows, part, lk, reading, dW, centre, sums, marks,
              F: tl.constexpr):  # fmt: skip
    """Store dQ of `rows`, and add to the gradients of core, landmark keys, s_ll / 2 and decay."""
    features, W, factor, q = reading
    dcore, dlk, dhalf, ddecay = sums
    NARROW_D: tl.constexpr = F.DIM % F.BLOCK_D != 0
    d0 = part * F.BLOCK_D
    if F.MASS:  # no reading of garbage: it might be infinite
        W = tl.where(rows[None, :], W, 0.0)
        factor = tl.where(rows[None, :], factor, 0.0)
    dG, dscores = reading_gradients(features, W, factor, dW, centre, lk[3], F)
    if F.TAKES_CORE:
        dcore = mm_acc(features, tl.trans(operand(dG, F)), dcore, F)
    if F.TAKES_QUERIES:
        if F.MASS:
            dlog = rounded_product(W, dW - centre, F)  # of Z_l(i), on top of what ds has
            dhalf -= tl.sum(dscores, 1) + tl.sum(dlog, 1)
            if F.DECAY:
                age = (length - 1 - tl.arange(0, F.CHUNK)).to(tl.float32)
                ddecay += tl.sum(rounded_product(dlog, age[None, :], F), 1)
        dscores = operand(dscores, F)
        dq = tl.trans(mm(tl.trans(own_columns(lk, part, F)), dscores, F)) * marks.scale
        store_rows(dq_ptr + d0, t0, F.DIM, rows, F.DIM - d0, dq, F.CHUNK, F.BLOCK_D, NARROW_D)
        dlk = mm_acc(dscores, own_tokens(q, queries, t0, rows, part, F), dlk, F)
    return dcore, dlk, dhalf, ddecay


@triton.jit
def chunk_rows(queries, keys, values, douts, keep_ptr, dq_ptr, t0, since, stop, state,
               handed, sums, lq, lk, decay2, part, marks, problem,
               F: tl.constexpr):  # fmt: skip
    """(state, handed, sums, end) of the chunk or piece at t0, by its rows at or after `since`."""
    G, pull, ratio = handed
    NARROW_V: tl.constexpr = F.DIM_V != F.BLOCK_V
    keep, v, P, first, ref, tot, acc, share = enter_chunk(keys, values, keep_ptr, t0, stop, state,
                                                          lq, decay2, 0, marks, F)  # fmt: skip
    # [PAD_M, CHUNK]
    cum = running_sums(P, tot, F)
    norm = norms(ref, cum, decay2, F)
    inverse = reciprocal(cum)
    offs = tl.arange(0, F.CHUNK)
    length = tl.minimum(stop - t0, first)
    there = offs < stop - t0
    rows = (offs < length) & (t0 + offs >= since)
    # [PAD_M, BLOCK_V]
    R0 = operand(acc, F)
    ratio *= share
    head_size = tl.cast(problem.tokens, tl.int64) * F.DIM
    for g in range(F.GROUP):
        head = head_of(queries, g)
        reading = turned_weights(head, t0, there, lk, norm, marks, F)
        dhead = head_of(douts, g)
        # [CHUNK, BLOCK_V]
        dout = load_rows(dhead[0], t0, dhead[1], rows, F.DIM_V, F.CHUNK, F.BLOCK_V, NARROW_V)
        W = reading[1]
        if F.MASS:
            W = tl.where(rows[None, :], W, 0.0)
        wt, dW, centre, pairs = row_gradients(W, inverse, P, R0, dout, v, t0, F)
        if F.TAKES_STATES:
            wt *= ratio[:, None]
            G = mm_acc(wt, dout, G, F)
            pull += tl.sum(rounded_product(wt, centre, F), 1)
        sums = take_rows(head, dq_ptr + g * head_size, t0, length, rows, part, lk, reading, dW,
                         centre, sums, marks, F)  # fmt: skip
    own = P
    if F.STEEP:
        own = tl.where((offs < length)[None, :], P, 0.0)
    ref, tot, acc, fall = end_of_chunk(own, v, ref, tot, acc, decay2, length, F)
    return (ref, tot, acc), (G, pull, ratio * fall), sums, t0 + length


@triton.jit
def stretch_rows(queries, keys, values, douts, keep_ptr, dq_ptr, since, start, stop, state,
              handed, sums, lq, lk, decay2, part, marks, problem,
              F: tl.constexpr):  # fmt: skip
    """(state, handed, sums, first token that rises too far) after a stretch."""
    rise = stop
    if F.STEEP:
        t0 = start
        while t0 < stop:
            state, handed, sums, t0 = chunk_rows(
                queries, keys, values, douts, keep_ptr, dq_ptr, t0, since, stop, state,
                handed, sums, lq, lk, decay2, part, marks, problem, F,
            )  # fmt: skip
    else:
        for t0 in range(start, stop, F.CHUNK):
            # a row after a rise is left to the pieces
            state, handed, sums, end = chunk_rows(
                queries, keys, values, douts, keep_ptr, dq_ptr, t0,
                tl.where(rise < stop, stop, since), stop, state, handed, sums, lq, lk,
                decay2, part, marks, problem, F,
            )  # fmt: skip
            if end < tl.minimum(t0 + F.CHUNK, stop):
                rise = tl.minimum(rise, end)
    return state, handed, sums, rise


@triton.jit(do_not_specialize=Problem._fields)
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
    rises,
    partial,
    table,
    heads,
    parts,
    groups,
    stretches,
    units,
    span,
    tokens,
    F: tl.constexpr,
):
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    part, group, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    queries = tokens_of(q_ptr, q_strides, b, h * F.GROUP)
    keys, values = tokens_of(k_ptr, k_strides, b, h), tokens_of(v_ptr, v_strides, b, h)
    douts = tokens_of(dout_ptr, dout_strides, b, h * F.GROUP)
    dq_ptr += tl.cast(pair, tl.int64) * F.GROUP * problem.tokens * F.DIM
    if F.KEEP:
        keep_ptr += tl.cast(b, tl.int64) * problem.tokens
    lq = landmark_queries(marks, b, h, q_ptr.dtype.element_ty, F)
    lk = split_keys(marks, b, h, q_ptr.dtype.element_ty, F)
    decay2 = load_decay(marks, h, F)

    sums = new_sums(F)
    risen = False
    for stretch in range(group * problem.units,
                      tl.minimum((group + 1) * problem.units, problem.stretches)):  # fmt: skip
        start, stop, row = span_of(stretch, b, problem, table, F)
        line = tl.cast(pair, tl.int64) * problem.stretches + stretch
        since, due = start, True
        if F.STEEP:
            since = tl.load(rises + line)
            due = since < stop
        if due:
            risen = True
            state = load_state(saved, line, 0, F)
            G, pull = 0.0, 0.0
            if F.TAKES_STATES:
                G, pull = zeros(F.PAD_M, F.BLOCK_V), full(F.PAD_M, 0.0)
                if F.STEEP:
                    G, pull = (
                        tl.load(state_ptrs(own.G, line, 0, F)),
                        tl.load(vector_ptrs(own.pull, line, F)),
                    )
            handed = (
                G,
                pull,
                state[1],
            )  # the ratio: e^{L at the stretch's start}, in units of 2^ref
            state, handed, sums, rise = stretch_rows(
                queries, keys, values, douts, keep_ptr, dq_ptr, since, start, stop, state,
                handed, sums, lq, lk, decay2, part, marks, problem, F,
            )  # fmt: skip
            if F.TAKES_STATES:
                tl.store(vector_ptrs(own.pull, line, F), handed[1])
                tl.store(state_ptrs(own.G, line, 0, F), handed[0])
                ratio = tl.where(state[1] == 0.0, 0.0, handed[2] / state[1])
                tl.store(vector_ptrs(own.ratio, line, F), ratio)
            if not F.STEEP:
                tl.store(rises + line, rise)
    if F.STEEP:
        if risen:
            store_sums(partial, group, pair, part, sums, problem, F)
    else:
        store_sums(partial, group, pair, part, sums, problem, F)


@triton.jit
def new_sums(F: tl.constexpr):
    """(dcore, dlk, dhalf, ddecay) of nothing yet."""
    dcore, dlk = 0.0, 0.0
    if F.TAKES_CORE:
        dcore = zeros(F.PAD_M, F.PAD_M)
    if F.TAKES_QUERIES:
        dlk = zeros(F.PAD_M, F.BLOCK_D)
    return dcore, dlk, full(F.PAD_M, 0.0), full(F.PAD_M, 0.0)


@triton.jit
def put_share(ptrs, x, F: tl.constexpr):
    """A share of a sum, to its place; that of the pieces comes on top of it."""
    if F.STEEP:
        x += tl.load(ptrs)
        tl.debug_barrier()  # several threads read an element that one of them overwrites
    tl.store(ptrs, x)


@triton.jit
def columns_ptrs(base, line, part, F: tl.constexpr):
    """Pointers to a program's columns of line `line` of (lines, PAD_M, columns)."""
    rows = line * F.PAD_M + tl.arange(0, F.PAD_M)
    cols = part * F.BLOCK_D + tl.arange(0, F.BLOCK_D)
    return base + rows[:, None] * (F.BLOCKS_D * F.BLOCK_D) + cols[None, :]


@triton.jit
def store_sums(partial, group, pair, part, sums, problem, F: tl.constexpr):
    """This program's share of the parameter gradients, a place of its own."""
    dcore, dlk, dhalf, ddecay = sums
    line = tl.cast(pair, tl.int64) * problem.groups + group
    offs_m = tl.arange(0, F.PAD_M)
    marks = line * F.PAD_M + offs_m
    if F.TAKES_CORE:
        if part == 0:
            put_share(partial.dcore + marks[:, None] * F.PAD_M + offs_m[None, :], dcore, F)
    if F.TAKES_QUERIES:
        put_share(columns_ptrs(partial.dlk, line, part, F), dlk, F)
        if part == 0:
            put_share(partial.dhalf + marks, dhalf, F)
            put_share(partial.ddecay + marks, ddecay, F)
