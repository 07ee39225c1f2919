"""Backward, query side: dQ, the gradients of core and landmark keys, and the reverse states that
each slot hands to the keys before it.

A program goes through a stretch slot by slot. None needs another's result: the state before each is
stored. It starts with the last, so that what the rest of the stretch adds to the reverse state is
there when a slot's turn comes. The reverse state of a landmark is (G, pull), referenced to L at the
boundary that it is about: G = sum over later i of W_i e^{L - L(i)} dO_i, and pull likewise with dW.

A first launch leaves out the rows of a slot from the first token on that rises too far; a second
one takes those, piece by piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Problem
from .chunks import end_of_chunk, norms, open_chunk, running_sums
from .primitives import (
    TINY,
    full,
    head_of,
    inverse,
    kept_tokens,
    load_rows,
    locate,
    mm,
    mm_acc,
    operand,
    reciprocal,
    rounded_product,
    span_of,
    state_ptrs,
    store_rows,
    tokens_of,
    uniform,
    upper,
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
from .shares import leads, new_sums, store_sums
from .slots import is_empty, load_held, start_of_slot
from .states import slot_line
from .turns import share_of, turn_after, turns_of


@triton.jit
def centre_of(W, dW, F: tl.constexpr):
    """The term that ds subtracts from dO . v: dW, or dO . out for normalize="mass"."""
    centre = dW
    if F.MASS:
        centre = tl.sum(W * dW, 0)[None, :] + zeros(F.PAD_M, F.CHUNK)
    return centre


@triton.jit
def weigh(P, ref, tot, decay2, first, H: tl.constexpr, F: tl.constexpr):
    """(log2 of Z, 1 / e^{L - ref}) for the H.CHUNK tokens of a chunk from number `first` on,
    [PAD_M, H.CHUNK]. Of nothing held the latter is 0 with `mass`, else finite: what it multiplies
    is 0 then.
    """
    if F.MASS:
        cum = running_sums(P, tot, first, H, F)
        share = reciprocal(cum)
    else:
        cum = running_sums(P, tl.maximum(tot, TINY), first, H, F)
        share = inverse(cum)
    return norms(ref, cum, decay2, first, H), share


@triton.jit
def row_gradients(W, state, P, R0, decay2, dout, v, t0, first, H: tl.constexpr,
                  F: tl.constexpr):  # fmt: skip
    """(W e^{ref-L}, dW, centre, dO . v selected): a landmark or a key of a chunk a row, a query of
    the H.CHUNK from number `first` of the chunk on a column.

    dW_il = dO_i . R_l(i) = e^{L0-L} dO R0^T + [(dO V^T) selected where j <= i] D
    """
    # [F.CHUNK, H.CHUNK]
    pairs = tl.dot(v, tl.trans(dout), input_precision=F.PRECISION)
    pairs = operand(tl.where(upper(t0, t0 + first, F.CHUNK, H.CHUNK), pairs, 0.0), F)
    # [PAD_M, H.CHUNK]
    dW = mm_acc(P, pairs, mm(R0, tl.trans(dout), F), F)
    # not earlier: a tile of registers
    norm, inverse = weigh(P, state[0], state[1], decay2, first, H, F)
    dW = dW * inverse + 0.0  # a difference from it would else be computed from both factors
    return W * inverse, dW, centre_of(W, dW, H), pairs


@triton.jit
def reading_gradients(features, W, factor, dW, centre, core, F: tl.constexpr):
    """(d of features core, d of the query's scores): [PAD_M, CHUNK] each."""
    dG = dW
    if F.MASS:
        dG = factor * (dW - centre)
    product = core_mm(core, dG, False, F)
    less = 0.0
    if not F.MASS:
        # sum over l of F dF = sum over l of W dW: the one that costs fewer registers
        if F.SLOT > 0:
            less = tl.sum(features * product, 0)[None, :]
        else:
            less = tl.sum(W * dW, 0)[None, :]
    return dG, rounded_product(features, product - less, F)


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
        store_rows(dq_ptr + d0, t0, F.DIM, rows, F.DIM - d0, dq, F.CHUNK, F.BLOCK_D, NARROW_D,
                   True)  # fmt: skip
        dlk = mm_acc(dscores, own_tokens(q, queries, t0, rows, part, F), dlk, F)
    return dcore, dlk, dhalf, ddecay


@triton.jit
def chunk_rows(queries, keys, values, douts, keep_ptr, dq_ptr, t0, since, stop, state, place,
               handed, sums, lq, lk, decay2, part, width, marks, problem, H: tl.constexpr,
               F: tl.constexpr):  # fmt: skip
    """(state, handed, sums, end) of the chunk or piece at t0, by its rows at or after `since`.

    `stop` is the slot's end; `handed` holds (G, pull) and e^{L at the slot's start} over 2^ref.
    The state of a chunk that is the whole slot is loaded late.
    """
    ref, tot, acc = state
    G, pull, ratio = handed
    keep = kept_tokens(keep_ptr, t0, stop, F)
    # [PAD_M, CHUNK]
    k, P, first, ref, tot, share = open_chunk(keys, t0, keep, ref, tot, lq, decay2, marks,
                                                 is_empty(place), F)  # fmt: skip
    P = operand(P, F)
    # [PAD_M, BLOCK_V]
    held = acc
    if not (F.STEEP or F.CHUNK < F.SLOT):
        held = load_held(place, F)
    if F.STEEP or F.DECAY:
        held *= share[:, None]
        ratio *= share
    R0 = operand(held, F)
    length = uniform(tl.minimum(stop - t0, first))
    # [CHUNK, BLOCK_V]
    v = load_rows(values[0], t0, values[1], keep, width, F.CHUNK, F.BLOCK_V,
                  F.DIM_V % F.BLOCK_V != 0, True)  # fmt: skip
    head_size = tl.cast(problem.tokens, tl.int64) * F.DIM
    PARTS: tl.constexpr = F.CHUNK // H.CHUNK
    # a few queries of a head at a time: tiles of half the width; in one loop, for heads would else
    # share what depends on times in registers
    for n in tl.range(F.GROUP * PARTS, disable_licm=True):
        g, c0 = n // PARTS, n % PARTS * H.CHUNK
        q0 = t0 + c0
        times = q0 + tl.arange(0, H.CHUNK)
        there, rows = times < stop, times < t0 + length
        if F.STEEP:
            rows = rows & (times >= since)
        norm = 0.0
        if F.MASS:
            norm, inverse = weigh(P, ref, tot, decay2, c0, H, F)
        head = head_of(queries, g)
        reading = turned_weights(head, q0, there, lk, norm, marks, H)
        dhead = head_of(douts, g)
        # [H.CHUNK, BLOCK_V], 0 where no row is: so are the gradients of its weights
        dout = load_rows(dhead[0], q0, dhead[1], rows, width, H.CHUNK, F.BLOCK_V,
                         F.DIM_V % F.BLOCK_V != 0, True)  # fmt: skip
        W = reading[1]
        if F.MASS:
            W = tl.where(rows[None, :], W, 0.0)
        wt, dW, centre, pairs = row_gradients(W, (ref, tot), P, R0, decay2, dout, v, 0, c0, H,
                                              F)  # fmt: skip
        if F.TAKES_STATES:
            wt *= ratio[:, None]
            pull += tl.sum(rounded_product(wt, centre, F), 1)
            G = mm_acc(wt, dout, G, F)
        sums = take_rows(head, dq_ptr + g * head_size, q0, stop - q0, rows, part, lk, reading,
                         dW, centre, sums, marks, H)  # fmt: skip
    if F.STEEP or F.CHUNK < F.SLOT:
        own = P
        if F.STEEP:
            own = tl.where((tl.arange(0, F.CHUNK) < length)[None, :], P, 0.0)
        ref, tot, acc, fall = end_of_chunk(own, v, ref, tot, held, decay2, length, F)
        ratio *= fall
    return (ref, tot, acc), (G, pull, ratio), sums, t0 + length


@triton.jit
def slot_rows(queries, keys, values, douts, keep_ptr, dq_ptr, since, start, stop, state, place,
              handed, sums, lq, lk, decay2, part, width, marks, problem, H: tl.constexpr,
              F: tl.constexpr):  # fmt: skip
    """(handed, sums, first token that rises too far) after a slot."""
    rise = stop
    if F.STEEP:
        # no `while` or `if`: what chunks need of landmarks and core would be kept in registers
        t0 = start
        for _ in tl.range(start, stop, disable_licm=True):
            for _ in tl.range((t0 < stop).to(tl.int32), disable_licm=True):
                state, handed, sums, t0 = chunk_rows(
                    queries, keys, values, douts, keep_ptr, dq_ptr, t0, since, stop, state, place,
                    handed, sums, lq, lk, decay2, part, width, marks, problem, H, F,
                )  # fmt: skip
    else:
        CHUNKS: tl.constexpr = F.SLOT // F.CHUNK
        for c in tl.range(CHUNKS, disable_licm=True):
            t0 = start + c * F.CHUNK
            # no row of a slot after a rise
            state, handed, sums, end = chunk_rows(
                queries, keys, values, douts, keep_ptr, dq_ptr, t0, t0,
                tl.where(rise < stop, t0, stop), state, place, handed, sums, lq, lk, decay2, part,
                width, marks, problem, H, F,
            )  # fmt: skip
            if (rise == stop) & (end < tl.minimum(t0 + F.CHUNK, stop)):
                rise = end
    return handed, sums, rise


@triton.jit
def add_to(ptrs, x, F: tl.constexpr):
    """Store x; pieces add it to what chunks have left."""
    if F.STEEP:
        x += tl.load(ptrs).to(tl.float32)
        tl.debug_barrier()  # several threads read an element that one of them overwrites
    tl.store(ptrs, x.to(ptrs.dtype.element_ty))


@triton.jit
def nothing_back(F: tl.constexpr):
    """(G, pull) of no slot yet: zeros."""
    G = 0.0
    if F.TAKES_STATES:
        G = zeros(F.PAD_M, F.BLOCK_V)
    return G, full(F.PAD_M, 0.0)


@triton.jit
def one_slot(queries, keys, values, douts, keep_ptr, dq_ptr, t0, start, stop, stored, reverse,
             rises, line, piece, back, sums, lq, lk, decay2, part, marks, problem,
             H: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """(back, sums) after the slot at t0 of a stretch, from those after the slot behind it.

    `back`, (G, pull), is what the rest of the stretch adds to the reverse state.
    """
    G, pull = back
    v0 = piece * F.BLOCK_V
    slot, end = slot_line(line, t0 - start, problem, F), tl.minimum(t0 + F.SLOT, stop)
    if F.TAKES_STATES:
        if end == stop:
            G, pull = nothing_back(F)
        add_to(state_ptrs(reverse.slots.G, slot, v0, F), G, F)
        add_to(vector_ptrs(reverse.slots.pull, slot * F.SLICES + piece, F), pull, F)
        left = tl.load(vector_ptrs(stored.joined.left, slot, F))
        G *= left[:, None]
        pull *= left
    since, own = t0, 1
    if F.STEEP:
        since = uniform(tl.load(rises + slot))
        own = (since < end).to(tl.int32)
    for _ in tl.range(own, disable_licm=True):  # no `if`, as in `slot_rows`
        place = stored, reverse, rises, line, slot, v0, piece
        ref, tot = start_of_slot(stored, slot, F)
        held = 0.0
        if F.STEEP or F.CHUNK < F.SLOT:
            held = load_held(place, F)
        handed, sums, rise = slot_rows(
            queries, keys, values, douts, keep_ptr, dq_ptr, since, t0, end,
            (ref, tot, held), place, (G, pull, tot), sums, lq, lk, decay2, part, F.DIM_V - v0,
            marks, problem, H, F,
        )  # fmt: skip
        G, pull = handed[0], handed[1]
        if not F.STEEP and (F.SLICES == 1 or piece == 0):
            if leads(part, F):
                tl.store(rises + slot, rise)
    if F.TAKES_STATES:
        if t0 == start:
            add_to(state_ptrs(reverse.G, line, v0, F), G, F)
            add_to(vector_ptrs(reverse.pull, line * F.SLICES + piece, F), pull, F)
    return (G, pull), sums


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
    H: tl.constexpr,
    F: tl.constexpr,
):
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    part, group, pair = locate(problem)
    part, piece = share_of(part, F.TAKES_QUERIES, F)
    b, h = pair // problem.heads, pair % problem.heads
    v0 = piece * F.BLOCK_V
    queries = tokens_of(q_ptr, q_strides, b, h * F.GROUP)
    keys = tokens_of(k_ptr, k_strides, b, h)
    values = tokens_of(v_ptr + v0, v_strides, b, h)
    douts = tokens_of(dout_ptr + v0, dout_strides, b, h * F.GROUP)
    share = tl.cast(pair, tl.int64) * F.SLICES + piece
    dq_ptr += share * F.GROUP * problem.tokens * F.DIM
    if F.KEEP:
        keep_ptr += tl.cast(b, tl.int64) * problem.tokens
    lq = landmark_queries(marks, b, h, q_ptr.dtype.element_ty, F)
    lk = split_keys(marks, b, h, q_ptr.dtype.element_ty, F)

    slots, first, turns, taken = turns_of(rises, group, b, pair, problem, table, F)
    sums = new_sums(F)
    back = nothing_back(F)
    # a loop over all slots of all stretches, and nothing computed in front of it: registers
    stretch, place = first + (turns - 1) // slots, (turns - 1) % slots
    for _ in tl.range(turns, disable_licm=True):
        start, stop, row = span_of(stretch, b, problem, table, F)
        line = tl.cast(pair, tl.int64) * problem.stretches + stretch
        t0 = start + place * F.SLOT
        due = 1
        if F.PACKED:
            due = (t0 < stop).to(tl.int32)
        for _ in tl.range(due, disable_licm=True):  # no `if`, as in `slot_rows`
            # not earlier: its product with times would sit in registers
            decay2 = load_decay(marks, h, F)
            back, sums = one_slot(
                queries, keys, values, douts, keep_ptr, dq_ptr, t0, start, stop, stored, reverse,
                rises, line, piece, back, sums, lq, lk, decay2, part, marks, problem, H, F,
            )  # fmt: skip
        stretch, place = turn_after(stretch, place, slots, -1)
    if F.STEEP:
        if taken:
            store_sums(partial, group, share, part, sums, problem, F)
    else:
        store_sums(partial, group, share, part, sums, problem, F)
