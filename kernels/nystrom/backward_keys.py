"""Backward, key side: dK, dV and the gradient of landmark queries, slot by slot.

The state before a slot and the reverse state after it are stored, so that no slot needs another's
result. A first launch leaves out the slots in which a score rises too far, by the notes of the
query side; a second one does those piece by piece, from the last piece to the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Problem
from .backward_rows import row_gradients, weigh
from .chunks import (
    end_of_chunk,
    exponent,
    may_have_risen,
    open_calm_chunk,
    open_chunk,
)
from .primitives import (
    cut_operand,
    full,
    head_of,
    kept_tokens,
    load_rows,
    locate,
    lower,
    mm,
    mm_acc,
    operand,
    reciprocal,
    rounded_product,
    span_of,
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
from .shares import columns_ptrs, leads, line_of, put_share
from .slots import end_of_slot, is_empty, load_held, start_of_slot
from .states import slot_line
from .turns import share_of, turn_after, turns_of


@triton.jit
def less_later_sums(ds, x, F: tl.constexpr):
    """ds - sum over i >= j of x_i, [PAD_M, CHUNK]."""
    if F.SCAN:
        ds -= tl.cumsum(x, 1, reverse=True)
    else:
        ds = mm_acc(-x, lower(0, F).to(tl.float32), ds, F)
    return ds


@triton.jit
def chunk_keys(queries, keys, values, douts, keep_ptr, grads, t0, until, stop, state, reverse,
               place, ddecay, lq, lk, decay2, part, width, marks, F: tl.constexpr):  # fmt: skip
    """(reverse state, ddecay, until) before the tokens [t0, until), whose dK and dV are stored.

    A whole slot in which a score rises too far is noted and left out: then `until` is t0.
    `grads` points to dK, dV and the gradient of landmark queries. `state` is that before the
    tokens, and no score rises far above it; the slot ends at `stop`. Where they are the whole slot,
    `reverse` and what `state` holds are not read, but loaded late, and of the reverse state before
    them no more than sum over columns of G R is returned, for the decay.

    ds_lj = e^{s_lj - rho} (G_l . v_j - g_l) + sum_{i >= j} W_il D_lj(i) (dO_i . v_j - centre_il)
    dv_j  = sum_l e^{s_lj - rho} G_l + sum_{i >= j} sum_l W_il D_lj(i) dO_i
    """
    WHOLE: tl.constexpr = not (F.STEEP or F.CHUNK < F.SLOT)
    NARROW: tl.constexpr = F.DIM_V % F.BLOCK_V != 0
    ref, tot = state[0], state[1]
    keep = kept_tokens(keep_ptr, t0, until, F)
    # [PAD_M, CHUNK]
    if F.STEEP:
        k, P, first, ref, tot, moved = open_chunk(keys, t0, keep, ref, tot, lq, decay2, marks,
                                                      is_empty(place), F)  # fmt: skip
        P = cut_operand(P, F)
    else:
        k, P, ref, tot, moved = open_calm_chunk(keys, t0, keep, ref, tot, lq, decay2, marks,
                                                is_empty(place), True, F)  # fmt: skip
    total = tot + tl.sum(P, 1)
    P = operand(P, F)
    calm = True
    if WHOLE:  # the query side may have had shorter chunks
        calm = not may_have_risen(exponent(total))
        if not calm:
            tl.store(place[2] + place[4], t0)
            until = t0
    offs = tl.arange(0, F.CHUNK)
    there = t0 + offs < until
    # [CHUNK, BLOCK_V]
    v = load_rows(values[0], t0, values[1], keep, width, F.CHUNK, F.BLOCK_V, NARROW, True)
    own_G, own_GR, own_pull = 0.0, full(F.PAD_M, 0.0), full(F.PAD_M, 0.0)
    later_GR, ds, dv = 0.0, 0.0, 0.0
    if not WHOLE:
        own_G = zeros(F.PAD_M, F.BLOCK_V)
    if F.TAKES_KEYS:
        # [PAD_M, BLOCK_V]
        if WHOLE:
            R0 = load_held(place, F)
        else:
            R0 = state[2]
        if F.STEEP or F.DECAY:
            R0 = R0 * moved[:, None]
        if WHOLE and F.DECAY:
            G, pull = end_of_slot(place, F, True)
            later_GR = tl.sum(rounded_product(G, R0, F), 1)
        R0 = operand(R0, F)
        # [PAD_M, CHUNK]
        ds = zeros(F.PAD_M, F.CHUNK)
    if F.TAKES_VALUES:
        # [CHUNK, BLOCK_V]
        dv = zeros(F.CHUNK, F.BLOCK_V)
    norm = 0.0
    if F.MASS:
        norm, inverse = weigh(P, ref, tot, decay2, 0, F, F)
    # what heads share would else be kept in registers
    for g in tl.range(F.GROUP, disable_licm=True):
        head, dhead = head_of(queries, g), head_of(douts, g)
        features, W, factor, q = turned_weights(head, t0, there, lk, norm, marks, F)
        if F.MASS:
            W = tl.where(there[None, :], W, 0.0)
        # [CHUNK, BLOCK_V]
        dout = load_rows(dhead[0], t0, dhead[1], there, width, F.CHUNK, F.BLOCK_V, NARROW, True)
        if F.TAKES_KEYS:
            # [PAD_M, CHUNK]
            wt, dW, centre, pairs = row_gradients(
                W, (ref, tot), P, R0, decay2, dout, v, t0, 0, F, F
            )
            wt = operand(wt, F)  # rounded for both terms of ds, which cancel
            pulls = rounded_product(wt.to(tl.float32), centre, F)
            own_pull += tl.sum(pulls, 1)
            ds = mm_acc(wt, tl.trans(pairs), ds, F)
            ds = less_later_sums(ds, pulls, F)
        else:
            norm, inverse = weigh(P, ref, tot, decay2, 0, F, F)
            wt = operand(W * inverse, F)
        if not WHOLE:
            own_G = mm_acc(wt, dout, own_G, F)
        elif F.DECAY and F.TAKES_KEYS:
            dR0 = mm(R0, tl.trans(dout), F)
            own_GR += tl.sum(rounded_product(wt.to(tl.float32), dR0, F), 1)
        if F.TAKES_VALUES:
            # [CHUNK, CHUNK]
            between = mm(tl.trans(P), wt, F)
            # times from `stop`: the mask of `pairs`, if it were the same, would sit in registers
            dv = mm_acc(tl.where(tl.trans(lower(t0, F)), between, 0.0), dout, dv, F)
    if WHOLE:
        G, pull = end_of_slot(place, F)
    else:
        G, pull = reverse
    left = tl.where(calm, reciprocal(total), 0.0)  # e^{s - rho} = P left
    late = operand(G * left[:, None], F)
    if F.TAKES_KEYS:
        ds = P * (mm_acc(late, tl.trans(v), ds, F) - (pull * left)[:, None])
    if F.TAKES_VALUES:
        dv = mm_acc(tl.trans(P), late, dv, F)
    share = tot * left  # e^{L at t0 - rho}
    if WHOLE:
        G = later_GR * left + own_GR
    else:
        G = G * share[:, None] + own_G * tot[:, None]
    pull = pull * share + own_pull * tot
    if F.TAKES_VALUES:
        if leads(part, F):
            store_rows(grads[1], t0, F.DIM_V, there, width, dv, F.CHUNK, F.BLOCK_V, NARROW, True)
    if F.TAKES_KEYS:
        if F.DECAY:  # ages at the slot's end
            age = (stop - 1 - t0 - offs).to(tl.float32)
            ddecay -= tl.sum(rounded_product(ds, age[None, :], F), 1)
        ds = operand(ds, F)
        # [PAD_M, BLOCK_D]: in memory from slot to slot, not in registers
        ptrs = columns_ptrs(grads[2], 0, part, F)
        dlq = tl.load(ptrs)
        dlq = take_keys(k, keys, grads[0], t0, there, keep, ds, dlq, lq, part, marks, F)
        tl.debug_barrier()  # several threads read an element that one of them overwrites
        tl.store(ptrs, dlq)
    return (G, pull), ddecay, until


@triton.jit
def take_keys(k, keys, dk_ptr, t0, there, keep, ds, dlq, lq, part, marks, F: tl.constexpr):
    """Store dK, and the gradient of landmark queries with that of these keys."""
    d0 = part * F.BLOCK_D
    NARROW_D: tl.constexpr = F.DIM % F.BLOCK_D != 0
    dk = tl.trans(mm(tl.trans(own_columns(lq, part, F)), ds, F)) * marks.scale
    store_rows(dk_ptr + d0, t0, F.DIM, there, F.DIM - d0, dk, F.CHUNK, F.BLOCK_D, NARROW_D, True)
    return mm_acc(ds, own_tokens(k, keys, t0, keep, part, F), dlq, F)


@triton.jit
def walk_to(keys, values, keep_ptr, start, until, stop, most, state, place, lq, decay2, width,
            marks, F: tl.constexpr):  # fmt: skip
    """(t0, state, steps): the start of the chunk or piece that ends at `until`, the state there,
    and the steps of a walk in pieces, `most` at most; one in chunks takes `most`.
    """
    ref, tot, acc = state
    t0, steps, before = start, 0, True
    if F.STEEP:
        before = t0 < until
    for _ in tl.range(most, disable_licm=True):
        if before:
            keep = kept_tokens(keep_ptr, t0, stop, F)
            k, P, first, top, total, share = open_chunk(keys, t0, keep, ref, tot, lq, decay2, marks,
                                                        is_empty(place), F)  # fmt: skip
            length = tl.minimum(stop - t0, first)
            if F.STEEP:
                steps += 1
                before = t0 + length < until
            if before:
                v = load_rows(values[0], t0, values[1], keep, width, F.CHUNK, F.BLOCK_V,
                              F.DIM_V % F.BLOCK_V != 0, True)  # fmt: skip
                own = tl.where((tl.arange(0, F.CHUNK) < length)[None, :], operand(P, F), 0.0)
                held = zeros(F.PAD_M, F.BLOCK_V)
                if F.TAKES_KEYS:
                    held += acc
                    if F.STEEP or F.DECAY:
                        held *= share[:, None]
                ref, tot, held, fall = end_of_chunk(own, v, top, total, held, decay2, length, F)
                if F.TAKES_KEYS:
                    acc = held
                t0 += length
    return t0, (ref, tot, acc), steps


@triton.jit
def slot_keys(queries, keys, values, douts, keep_ptr, grads, start, until, stop, totals,
              reverse, place, ddecay, lq, lk, decay2, part, width, marks,
              F: tl.constexpr):  # fmt: skip
    """(reverse state, ddecay, until) before the tokens [start, until) of a slot, none or all.

    `totals` are those before it; what it holds is loaded where it is read, for registers.
    """
    if F.STEEP or F.CHUNK < F.SLOT:
        # no `while`, and a condition: what chunks share would else be kept in registers
        end, rounds = until, tl.cdiv(until - start, F.CHUNK)
        if F.STEEP:
            rounds = until - start  # at most
        most = rounds
        for n in tl.range(rounds, disable_licm=True):
            if end > start:
                if not F.STEEP:
                    most = rounds - 1 - n
                held = 0.0
                if F.TAKES_KEYS:
                    held = load_held(place, F)
                state = totals[0], totals[1], held
                t0, own, steps = walk_to(keys, values, keep_ptr, start, end, stop, most, state,
                                         place, lq, decay2, width, marks, F)  # fmt: skip
                reverse, ddecay, end = chunk_keys(
                    queries, keys, values, douts, keep_ptr, grads, t0, end, stop, own,
                    reverse, place, ddecay, lq, lk, decay2, part, width, marks, F,
                )  # fmt: skip
                end = t0
                if F.STEEP:
                    most = steps
    else:
        reverse, ddecay, until = chunk_keys(
            queries, keys, values, douts, keep_ptr, grads, start, until, stop, totals,
            reverse, place, ddecay, lq, lk, decay2, part, width, marks, F,
        )  # fmt: skip
    return reverse, ddecay, until


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
    stored,
    reverse,
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
    part, piece = share_of(part, F.TAKES_KEYS, F)
    b, h = pair // problem.heads, pair % problem.heads
    v0 = piece * F.BLOCK_V
    queries = tokens_of(q_ptr, q_strides, b, h * F.GROUP)
    keys = tokens_of(k_ptr, k_strides, b, h)
    values = tokens_of(v_ptr + v0, v_strides, b, h)
    douts = tokens_of(dout_ptr + v0, dout_strides, b, h * F.GROUP)
    share = tl.cast(pair, tl.int64) * F.SLICES + piece
    dk_ptr += share * problem.tokens * F.DIM
    dv_ptr += tl.cast(pair, tl.int64) * problem.tokens * F.DIM_V + v0
    if F.KEEP:
        keep_ptr += tl.cast(b, tl.int64) * problem.tokens
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    lq = landmark_queries(marks, b, h, dtype, F)
    lk = split_keys(marks, b, h, dtype, F)

    mine = line_of(group, share, problem, F)
    dlq_ptr = partial.dlq + mine * (F.PAD_M * F.BLOCKS_D * F.BLOCK_D)
    if F.TAKES_KEYS and not F.STEEP:
        tl.store(columns_ptrs(dlq_ptr, 0, part, F), zeros(F.PAD_M, F.BLOCK_D))
    ddecay = full(F.PAD_M, 0.0)
    grads = dk_ptr, dv_ptr, dlq_ptr
    slots, first, turns, taken = turns_of(rises, group, b, pair, problem, table, F)
    # a loop over all slots of all stretches, and nothing computed in front of it: registers
    stretch, place = first, 0
    for _ in tl.range(turns, disable_licm=True):
        start, stop, row = span_of(stretch, b, problem, table, F)
        line = tl.cast(pair, tl.int64) * problem.stretches + stretch
        t0 = start + place * F.SLOT
        slot = slot_line(line, t0 - start, problem, F)
        end = tl.minimum(t0 + F.SLOT, stop)
        due = 1
        if F.PACKED:
            due = (t0 < stop).to(tl.int32)
        for _ in tl.range(due, disable_licm=True):  # no `if`, as in `slot_rows`
            rise = tl.load(rises + slot) < end
            until = tl.where(rise == F.STEEP, end, t0)
            own = 1
            if F.STEEP:
                own = rise.to(tl.int32)
            for _ in tl.range(own, disable_licm=True):
                # not earlier: its product with times would sit in registers
                decay2 = load_decay(marks, h, F)
                ddecay = one_slot(
                    queries, keys, values, douts, keep_ptr, grads, t0, until, end, start, stored,
                    reverse, rises, line, slot, piece, ddecay, lq, lk, decay2, part, marks, F,
                )  # fmt: skip
        stretch, place = turn_after(stretch, place, slots, 1)
    if F.TAKES_KEYS and taken:
        if leads(part, F):
            put_share(vector_ptrs(partial.ddecay, mine, F), ddecay, F)


@triton.jit
def one_slot(queries, keys, values, douts, keep_ptr, grads, t0, until, stop, start,
             stored, reverse, rises, line, slot, piece, ddecay, lq, lk, decay2, part, marks,
             F: tl.constexpr):  # fmt: skip
    """`ddecay` with the tokens [t0, until) of a slot of the stretch at `start`, none or all."""
    v0 = piece * F.BLOCK_V
    place = stored, reverse, rises, line, slot, v0, piece
    ref, tot = start_of_slot(stored, slot, F)
    back = 0.0, 0.0
    if F.STEEP or F.CHUNK < F.SLOT:
        back = end_of_slot(place, F)
    back, ddecay, until = slot_keys(
        queries, keys, values, douts, keep_ptr, grads, t0, until, stop, (ref, tot),
        back, place, ddecay, lq, lk, decay2, part, F.DIM_V - v0, marks, F,
    )  # fmt: skip
    if F.TAKES_KEYS:
        if F.DECAY:  # the slot's length times the gradient of L at its start
            GR = back[0]
            if F.STEEP or F.CHUNK < F.SLOT:
                R = load_held(place, F) * reciprocal(tot)[:, None]
                GR = tl.sum(rounded_product(GR, R, F), 1)
            ddecay -= (until - t0).to(tl.float32) * (GR - back[1])
    return ddecay
