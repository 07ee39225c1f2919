"""Backward, key side: against time, from the reverse states at the end of each stretch.

The reverse state of a landmark is (G, pull), referenced to L at the boundary that it is about:
G = sum over later i of W_i e^{L - L(i)} dO_i, held transposed, and pull likewise with dW.

A program first walks its stretch forward and leaves the state at the start of each chunk in a
scratch of its own, which the next stretch overwrites; then it goes back. Pieces, whose lengths are
only known from the start, walk again to each of them instead. Tiles have a token a row here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Problem
from .backward_rows import columns_ptrs, put_share, row_gradients
from .chunks import end_of_chunk, enter_chunk, key_scores, norms, running_sums
from .primitives import (
    full,
    head_of,
    kept_tokens,
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
    landmark_queries,
    load_decay,
    own_columns,
    own_tokens,
    split_keys,
    turned_weights,
)


@triton.jit
def later_sums(x, F: tl.constexpr):
    """sum over i >= j of x_i, [PAD_M, CHUNK]."""
    if F.SCAN:
        sums = tl.cumsum(x, 1, reverse=True)
    else:
        sums = mm(x, lower(0, F).to(tl.float32), F)
    return sums


@triton.jit
def chunk_keys(queries, keys, values, douts, keep_ptr, dk_ptr, dv_ptr, t0, until, ref, tot,
               R0, reverse, sums, lq, lk, decay2, part, marks, problem,
               F: tl.constexpr):  # fmt: skip
    """(reverse state, sums) before the tokens [t0, until), whose dK and dV are stored.

    (ref, tot, R0) is the state before them; no score rises far above ref.

    ds_lj = e^{s_lj - rho} (G_l . v_j - g_l) + sum_{i >= j} W_il D_lj(i) (dO_i . v_j - centre_il)
    dv_j  = sum_l e^{s_lj - rho} G_l + sum_{i >= j} sum_l W_il D_lj(i) dO_i
    """
    G, pull = reverse
    NARROW_V: tl.constexpr = F.DIM_V != F.BLOCK_V
    keep = kept_tokens(keep_ptr, t0, until, F)
    s, k = key_scores(keys, t0, keep, lq, decay2, marks, F)
    # [PAD_M, CHUNK]
    P = tl.exp2(s - ref[:, None])
    # [CHUNK, BLOCK_V]
    v = load_rows(values[0], t0, values[1], keep, F.DIM_V, F.CHUNK, F.BLOCK_V, NARROW_V)
    # [PAD_M, CHUNK]
    cum = running_sums(P, tot, F)
    norm = norms(ref, cum, decay2, F)
    inverse = reciprocal(cum)
    share = reciprocal(tot + tl.sum(operand(P, F).to(tl.float32), 1))
    E = P * share[:, None]  # e^{s - rho}
    ds, dv = 0.0, 0.0
    if F.TAKES_KEYS:
        ds = E * (mm(G, tl.trans(v), F) - pull[:, None])
    if F.TAKES_VALUES:
        # [CHUNK, BLOCK_V]
        dv = mm(tl.trans(operand(E, F)), G, F)
    G *= share[:, None]  # referenced to `ref`
    pull *= share
    offs = tl.arange(0, F.CHUNK)
    there = t0 + offs < until
    for g in range(F.GROUP):
        features, W, factor, q = turned_weights(head_of(queries, g), t0, there, lk, norm, marks, F)
        if F.MASS:
            W = tl.where(there[None, :], W, 0.0)
        dhead = head_of(douts, g)
        dout = load_rows(dhead[0], t0, dhead[1], there, F.DIM_V, F.CHUNK, F.BLOCK_V, NARROW_V)
        if F.TAKES_KEYS:
            wt, dW, centre, pairs = row_gradients(W, inverse, P, R0, dout, v, t0, F)
            pulls = rounded_product(wt, centre, F)
            pull += tl.sum(pulls, 1)
            ds += P * (mm(wt, tl.trans(pairs), F) - later_sums(pulls, F))
        else:
            wt = W * inverse
        wt = operand(wt, F)
        G = mm_acc(wt, dout, G, F)
        if F.TAKES_VALUES:
            # [CHUNK, CHUNK]
            between = mm(tl.trans(operand(P, F)), wt, F)
            dv = mm_acc(tl.where(tl.trans(lower(t0, F)), between, 0.0), dout, dv, F)
    if F.TAKES_VALUES:
        if part == 0:
            store_rows(dv_ptr, t0, F.DIM_V, there, F.DIM_V, dv, F.CHUNK, F.BLOCK_V, NARROW_V)
    if F.TAKES_KEYS:
        dlq, ddecay = sums
        if F.DECAY:  # ages at the chunk's end, and its length times the gradient of L at its start
            age = (until - t0 - 1 - offs).to(tl.float32)
            dL0 = tl.sum(rounded_product(G, R0.to(tl.float32), F), 1) - tot * pull
            ages = tl.sum(rounded_product(ds, age[None, :], F), 1)
            ddecay -= ages + (until - t0).to(tl.float32) * dL0
        ds = operand(ds, F)
        sums = (take_keys(k, keys, dk_ptr, t0, there, keep, ds, dlq, lq, part, marks, F), ddecay)
    return (G * tot[:, None], pull * tot), sums


@triton.jit
def take_keys(k, keys, dk_ptr, t0, there, keep, ds, dlq, lq, part, marks, F: tl.constexpr):
    """Store dK, and the gradient of landmark queries with that of these keys."""
    d0 = part * F.BLOCK_D
    NARROW_D: tl.constexpr = F.DIM % F.BLOCK_D != 0
    dk = tl.trans(mm(tl.trans(own_columns(lq, part, F)), ds, F)) * marks.scale
    store_rows(dk_ptr + d0, t0, F.DIM, there, F.DIM - d0, dk, F.CHUNK, F.BLOCK_D, NARROW_D)
    return mm_acc(ds, own_tokens(k, keys, t0, keep, part, F), dlq, F)


@triton.jit
def walk(keys, values, keep_ptr, start, stop, state, line, scratch, lq, decay2, marks,
         F: tl.constexpr):  # fmt: skip
    """Leave the state before each chunk at `line`, `line` + 1, ..; the first that rises too far."""
    rise = stop
    for t0 in range(start, stop, F.CHUNK):
        keep, v, P, first, ref, tot, acc, share = enter_chunk(
            keys, values, keep_ptr, t0, stop, state, lq, decay2, 0, marks, F
        )
        tl.store(vector_ptrs(scratch.ref, line, F), ref)
        tl.store(vector_ptrs(scratch.tot, line, F), tot)
        if F.TAKES_KEYS:
            tl.store(state_ptrs(scratch.acc, line, 0, F), operand(acc, F))
        length = tl.minimum(stop - t0, F.CHUNK)
        if first < length:
            rise = tl.minimum(rise, t0 + first)
        ref, tot, acc, fall = end_of_chunk(P, v, ref, tot, acc, decay2, length, F)
        state = (ref, tot, acc)
        line += 1
    return rise


@triton.jit
def walk_to(keys, values, keep_ptr, start, until, stop, state, lq, decay2, marks,
            F: tl.constexpr):  # fmt: skip
    """(t0, ref, tot, acc): the start of the piece that ends at `until`, and the state there."""
    t0 = start
    keep, v, P, first, ref, tot, acc, share = enter_chunk(
        keys, values, keep_ptr, t0, stop, state, lq, decay2, 0, marks, F
    )
    length = tl.minimum(stop - t0, first)
    while t0 + length < until:
        P = tl.where((tl.arange(0, F.CHUNK) < length)[None, :], P, 0.0)
        ref, tot, acc, fall = end_of_chunk(P, v, ref, tot, acc, decay2, length, F)
        t0 += length
        keep, v, P, first, ref, tot, acc, share = enter_chunk(
            keys, values, keep_ptr, t0, stop, (ref, tot, acc), lq, decay2, 0, marks, F
        )
        length = tl.minimum(stop - t0, first)
    return t0, ref, tot, acc


@triton.jit(do_not_specialize=Problem._fields)
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    marks,
    keep_ptr,
    saved,
    reverse,
    rises,
    scratch,
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
    dk_ptr += tl.cast(pair, tl.int64) * problem.tokens * F.DIM
    dv_ptr += tl.cast(pair, tl.int64) * problem.tokens * F.DIM_V
    if F.KEEP:
        keep_ptr += tl.cast(b, tl.int64) * problem.tokens
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    lq = landmark_queries(marks, b, h, dtype, F)
    lk = split_keys(marks, b, h, dtype, F)
    decay2 = load_decay(marks, h, F)
    scratch_line = tl.cast(tl.program_id(0), tl.int64) * tl.cdiv(problem.span, F.CHUNK)

    sums = (0.0, 0.0)
    if F.TAKES_KEYS:
        sums = (zeros(F.PAD_M, F.BLOCK_D), full(F.PAD_M, 0.0))
    risen = False
    for stretch in range(group * problem.units,
                      tl.minimum((group + 1) * problem.units, problem.stretches)):  # fmt: skip
        start, stop, row = span_of(stretch, b, problem, table, F)
        line = tl.cast(pair, tl.int64) * problem.stretches + stretch
        pull_ptrs, G_ptrs = vector_ptrs(reverse.pull, line, F), state_ptrs(reverse.G, line, 0, F)
        if F.STEEP:
            if tl.load(rises + line) < stop:
                risen = True
                back = (tl.load(G_ptrs), tl.load(pull_ptrs))
                until = stop
                while until > start:
                    t0, ref, tot, acc = walk_to(
                        keys, values, keep_ptr, start, until, stop, load_state(saved, line, 0, F),
                        lq, decay2, marks, F,
                    )  # fmt: skip
                    R0 = operand(acc, F)
                    back, sums = chunk_keys(
                        queries, keys, values, douts, keep_ptr, dk_ptr, dv_ptr, t0, until,
                        ref, tot, R0, back, sums, lq, lk, decay2, part, marks,
                        problem, F,
                    )  # fmt: skip
                    until = t0
        else:
            tl.debug_barrier()
            rise = walk(keys, values, keep_ptr, start, stop, load_state(saved, line, 0, F),
                        scratch_line, scratch, lq, decay2, marks, F)  # fmt: skip
            tl.debug_barrier()
            tl.store(rises + line, rise)
            chunks = tl.where(rise < stop, 0, tl.cdiv(stop - start, F.CHUNK))
            back = (tl.load(G_ptrs), tl.load(pull_ptrs))
            for n in range(chunks):
                c = chunks - 1 - n
                t0 = start + c * F.CHUNK
                ref = tl.load(vector_ptrs(scratch.ref, scratch_line + c, F))
                tot = tl.load(vector_ptrs(scratch.tot, scratch_line + c, F))
                R0 = 0.0
                if F.TAKES_KEYS:
                    R0 = tl.load(state_ptrs(scratch.acc, scratch_line + c, 0, F))
                back, sums = chunk_keys(
                    queries, keys, values, douts, keep_ptr, dk_ptr, dv_ptr, t0,
                    tl.minimum(stop, t0 + F.CHUNK), ref, tot, R0, back, sums, lq, lk, decay2,
                    part, marks, problem, F,
                )  # fmt: skip
    if F.STEEP:
        if risen:
            store_key_sums(partial, group, pair, part, sums, problem, F)
    else:
        store_key_sums(partial, group, pair, part, sums, problem, F)


@triton.jit
def store_key_sums(partial, group, pair, part, sums, problem, F: tl.constexpr):
    if F.TAKES_KEYS:
        line = tl.cast(pair, tl.int64) * problem.groups + group
        put_share(columns_ptrs(partial.dlq, line, part, F), sums[0], F)
        if part == 0:
            put_share(vector_ptrs(partial.ddecay, line, F), sums[1], F)
