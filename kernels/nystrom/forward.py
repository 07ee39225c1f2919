"""Forward pass: outputs from the states at the start of each stretch, chunk after chunk."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse.arguments import on_device, strides
from . import arguments as args
from . import configs
from .arguments import Problem
from .chunks import (
    enter_calm_chunk,
    enter_chunk,
    exponent,
    first_rise,
    may_have_risen,
    rescaled,
    turned_norms,
    turned_sums,
)
from .primitives import (
    TINY,
    full,
    head_of,
    incoming_state,
    inverse,
    load_state,
    locate,
    lower,
    mm,
    mm_acc,
    operand,
    reciprocal,
    span_of,
    store_end_state,
    store_rows,
    tokens_of,
)
from .reading import landmark_keys, landmark_queries, load_decay, read_weights
from .states import start_states


@triton.jit
def output_chunk(queries, keys, values, keep_ptr, out_ptr, t0, since, stop, state, lq,
                 lk, decay2, v0, marks, problem, F: tl.constexpr):  # fmt: skip
    """(state, end, totals) after the chunk or piece at t0, whose rows at or after `since` are
    stored; rows of a chunk behind a steep rise are of no use.
    """
    offs = tl.arange(0, F.CHUNK)
    length, there = tl.minimum(stop - t0, F.CHUNK), offs < stop - t0
    if F.STEEP:
        keep, v, P, first, ref, tot, acc, _ = enter_chunk(keys, values, keep_ptr, t0, stop, state,
                                                          lq, decay2, v0, marks, F)  # fmt: skip
        length = tl.minimum(length, first)
        rows = (offs < length) & (t0 + offs >= since)
        own = tl.where((offs < length)[None, :], P, 0.0)
    else:
        v, P, ref, tot, acc = enter_calm_chunk(keys, values, keep_ptr, t0, stop, state, lq,
                                               decay2, v0, marks, F)  # fmt: skip
        rows, own = there, P
    # [CHUNK, PAD_M]
    if F.MASS:
        cum = turned_sums(P, tot, F)
        share = reciprocal(cum)
    else:
        cum = turned_sums(P, tl.maximum(tot, TINY), F)
        share = inverse(cum)
    norm = turned_norms(ref, cum, decay2, F)
    # [PAD_M, BLOCK_V]
    R0 = operand(acc, F)
    # [PAD_M]
    tot += tl.sum(own.to(tl.float32), 1)
    ref, new_tot, ratio = rescaled(ref, tot, decay2, length, F)
    acc = mm_acc(own, v, acc, F) * ratio[:, None]
    head_size = tl.cast(problem.tokens, tl.int64) * F.DIM_V
    # out = (W e^{L0-L}) R0 + [(W e^{ref-L}) (e^{s-ref})^T, selected where j <= i] V
    for g in range(F.GROUP):
        W = read_weights(head_of(queries, g), t0, there, lk, norm, marks, F)
        # [CHUNK, PAD_M]
        wt = operand(W * share, F)
        # [CHUNK, CHUNK]
        between = tl.where(lower(t0, F), mm(wt, P, F), 0.0)
        # [CHUNK, BLOCK_V]
        out = mm_acc(between, v, mm(wt, R0, F), F)
        store_rows(out_ptr + g * head_size, t0, F.DIM_V, rows, F.DIM_V - v0, out, F.CHUNK,
                   F.BLOCK_V, F.DIM_V % F.BLOCK_V != 0)  # fmt: skip
    return (ref, new_tot, acc), t0 + length, tot


@triton.jit
def start_state(saved, ends, line, stretch_line, v0, F: tl.constexpr):
    """(ref, tot, acc) at a stretch's first token."""
    if F.ONE_PASS:
        state = incoming_state(ends.L0, ends.R0, line, v0, 0, F.PAD_M, F)
    else:
        state = load_state(saved, stretch_line, v0, F)
    return state


@triton.jit(do_not_specialize=Problem._fields)
def output_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    q_strides,
    k_strides,
    v_strides,
    marks,
    keep_ptr,
    saved,
    ends,
    rises,
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
    """Chunks, right up to the first rise of a stretch; or pieces, from a stretch's first rise on.

    `rises` is what the one leaves to the other: a token for each stretch, its end if nothing rises.
    Without it, a launch of pieces stores all rows.
    """
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    part, stretch, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    start, stop, row = span_of(stretch, b, problem, table, F)
    v0 = part * F.BLOCK_V
    queries = tokens_of(q_ptr, q_strides, b, h * F.GROUP)
    keys, values = tokens_of(k_ptr, k_strides, b, h), tokens_of(v_ptr, v_strides, b, h)
    out_ptr += tl.cast(pair, tl.int64) * F.GROUP * problem.tokens * F.DIM_V + v0
    if F.KEEP:
        keep_ptr += tl.cast(b, tl.int64) * problem.tokens
    line = tl.cast(row, tl.int64) * problem.heads + h
    stretch_line = tl.cast(pair, tl.int64) * problem.stretches + stretch
    since = start
    if F.STEEP and rises is not None:
        since = tl.load(rises + stretch_line)
        if since >= stop:
            return
    lq = landmark_queries(marks, b, h, q_ptr.dtype.element_ty, F)
    lk = landmark_keys(marks, b, h, q_ptr.dtype.element_ty, F)
    decay2 = load_decay(marks, h, F)
    state = start_state(saved, ends, line, stretch_line, v0, F)
    if F.STEEP:
        t0 = start
        while t0 < stop:
            state, t0, totals = output_chunk(
                queries, keys, values, keep_ptr, out_ptr, t0, since, stop, state,
                lq, lk, decay2, v0, marks, problem, F,
            )  # fmt: skip
    else:
        ref, tot, acc = state
        highest = full(F.PAD_M, 0.0)
        # what follows from landmarks alone would else be kept in registers
        LATE: tl.constexpr = F.DECAY or F.MASS or F.PAD_M * F.CHUNK > 64 * 64
        for t0 in tl.range(start, stop, F.CHUNK, disable_licm=LATE):
            state, end, totals = output_chunk(
                queries, keys, values, keep_ptr, out_ptr, t0, start, stop, state,
                lq, lk, decay2, v0, marks, problem, F,
            )  # fmt: skip
            highest = tl.maximum(highest, exponent(totals))
        rise = stop
        if may_have_risen(highest):
            rise = first_rise(keys, keep_ptr, start, stop, ref, tot, lq, decay2, marks, F)
        tl.store(rises + stretch_line, rise)
    if F.ONE_PASS:
        store_end_state(ends.L, ends.R, line, v0, 0, state[0], state[1], state[2], F.PAD_M, F)


def causal_forward(
    call: args.Inputs, state_out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, args.Ends]:
    """The output, and the states after the last token, which a decoding step writes into
    `state_out`.
    """
    query, tokens = call.query, call.query.shape[2]
    out = args.new_output(call)
    pairs = call.key.shape[0] * call.key.shape[1]
    one_pass = call.cu_seqlens is None and configs.fills_device(query.device, pairs, tokens)
    if one_pass:
        stretches = args.cut(call, max(1, tokens), tokens)
        saved, ends = None, args.new_ends(call, state_out)
    else:
        span = configs.forward_span(query.device, pairs, tokens)
        stretches = args.cut(call, span, tokens)
        saved, ends = start_states(call, stretches)
    if one_pass and tokens <= configs.DECODE_TOKENS:
        rises, passes = None, ("decode",)
    elif call.marks.lq.shape[-2] > configs.MOST_IN_CHUNKS:
        rises, passes = None, ("pieces",)
    else:
        rises, passes = args.new_rises(call, stretches), ("forward", "pieces")
    for pass_ in passes:
        config = args.choose_config(pass_, call)
        F = args.features(call, config, ONE_PASS=one_pass, STEEP=pass_ != "forward")
        parts = triton.cdiv(F.DIM_V, F.BLOCK_V)
        problem = args.problem_of(call, stretches, parts)
        if state_out is not None and call.L0 is not None and parts > 1:
            ends = ends._replace(L0=call.L0.clone())  # all parts read what one may overwrite
        with on_device(query):
            output_kernel[(pairs * problem.groups * problem.parts,)](
                query, call.key, call.value, out, strides(query), strides(call.key),
                strides(call.value), call.marks, call.keep, saved, ends, rises, stretches.table,
                *problem, F, **config.options,
            )  # fmt: skip
    return out, ends
