"""Nyström without causality: every query reads the states of all visible keys.

The summaries are the states of stretches and their scan; reading them, and the backward of both, is
here. The reverse state needs no time: what each stretch of queries adds is summed in order.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse.arguments import on_device, strides
from . import arguments as args
from . import configs
from .arguments import Problem
from .backward_keys import take_keys
from .backward_rows import centre_of, new_sums, store_sums, take_rows
from .chunks import key_scores
from .gradients import (
    new_key_partials,
    new_reverse,
    new_row_partials,
    outgoing,
    parameter_gradients,
    reverse_scan,
)
from .primitives import (
    full,
    head_of,
    incoming_state,
    kept_tokens,
    load_rows,
    locate,
    mm,
    mm_acc,
    operand,
    reciprocal,
    span_of,
    state_ptrs,
    store_rows,
    tokens_of,
    vector_ptrs,
    zeros,
)
from .reading import (
    landmark_keys,
    landmark_queries,
    read_weights,
    split_keys,
    turned_weights,
)
from .shares import columns_ptrs, leads, line_of, put_share
from .states import start_states


@triton.jit(do_not_specialize=Problem._fields)
def read_kernel(q_ptr, out_ptr, q_strides, marks, ends, table, heads, parts, groups, stretches,
                units, span, tokens, F: tl.constexpr):  # fmt: skip
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    part, stretch, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    start, stop, row = span_of(stretch, b, problem, table, F)
    v0 = part * F.BLOCK_V
    queries = tokens_of(q_ptr, q_strides, b, h * F.GROUP)
    out_ptr += tl.cast(pair, tl.int64) * F.GROUP * problem.tokens * F.DIM_V + v0
    lk = landmark_keys(marks, b, h, q_ptr.dtype.element_ty, F)
    line = tl.cast(row, tl.int64) * problem.heads + h
    ref, tot, acc = incoming_state(ends.L, ends.R, line, v0, 0, F.PAD_M, F)
    R = operand(acc * reciprocal(tot)[:, None], F)
    norm = (ref + tl.log2(tot))[None, :] + zeros(F.CHUNK, F.PAD_M)
    for t0 in range(start, stop, F.CHUNK):
        there = t0 + tl.arange(0, F.CHUNK) < stop
        for g in range(F.GROUP):
            W = read_weights(head_of(queries, g), t0, there, lk, norm, marks, F)
            store_rows(out_ptr + tl.cast(g, tl.int64) * problem.tokens * F.DIM_V, t0, F.DIM_V,
                       there, F.DIM_V - v0, mm(W, R, F), F.CHUNK, F.BLOCK_V,
                       F.DIM_V % F.BLOCK_V != 0)  # fmt: skip


@triton.jit(do_not_specialize=Problem._fields)
def read_backward_kernel(q_ptr, dout_ptr, dq_ptr, q_strides, dout_strides, marks, ends, own,
                         partial, table, heads, parts, groups, stretches, units, span, tokens,
                         F: tl.constexpr):  # fmt: skip
    """dQ, the gradients of core and landmark keys, and what each stretch gives to the states."""
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    part, group, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    queries = tokens_of(q_ptr, q_strides, b, h * F.GROUP)
    douts = tokens_of(dout_ptr, dout_strides, b, h * F.GROUP)
    head_size = tl.cast(problem.tokens, tl.int64) * F.DIM
    dq_ptr += tl.cast(pair, tl.int64) * F.GROUP * head_size
    lk = split_keys(marks, b, h, q_ptr.dtype.element_ty, F)
    sums = new_sums(F)
    for stretch in range(group * problem.units,
                      tl.minimum((group + 1) * problem.units, problem.stretches)):  # fmt: skip
        start, stop, row = span_of(stretch, b, problem, table, F)
        line = tl.cast(row, tl.int64) * problem.heads + h
        ref, tot, acc = incoming_state(ends.L, ends.R, line, 0, 0, F.PAD_M, F)
        R = operand(acc * reciprocal(tot)[:, None], F)
        norm = (ref + tl.log2(tot))[:, None] + zeros(F.PAD_M, F.CHUNK)
        G, pull = 0.0, 0.0
        if F.TAKES_STATES:
            G, pull = zeros(F.PAD_M, F.BLOCK_V), full(F.PAD_M, 0.0)
        for t0 in range(start, stop, F.CHUNK):
            there = t0 + tl.arange(0, F.CHUNK) < stop
            for g in range(F.GROUP):
                head, dhead = head_of(queries, g), head_of(douts, g)
                reading = turned_weights(head, t0, there, lk, norm, marks, F)
                dout = load_rows(dhead[0], t0, dhead[1], there, F.DIM_V, F.CHUNK, F.BLOCK_V,
                                 F.DIM_V != F.BLOCK_V)  # fmt: skip
                W = reading[1]
                dW = mm(R, tl.trans(dout), F)
                centre = centre_of(W, dW, F)
                if F.TAKES_STATES:
                    G = mm_acc(W, dout, G, F)
                    pull += tl.sum(W * centre, 1)
                sums = take_rows(head, dq_ptr + g * head_size, t0, F.CHUNK, there, part, lk,
                                 reading, dW, centre, sums, marks, F)  # fmt: skip
        if F.TAKES_STATES:
            stretch_line = tl.cast(pair, tl.int64) * problem.stretches + stretch
            tl.store(vector_ptrs(own.pull, stretch_line, F), pull)
            tl.store(state_ptrs(own.G, stretch_line, 0, F), G)
            tl.store(vector_ptrs(own.ratio, stretch_line, F), full(F.PAD_M, 1.0))
    store_sums(partial, group, pair, part, sums, problem, F)


@triton.jit(do_not_specialize=Problem._fields)
def summary_backward_kernel(k_ptr, v_ptr, dk_ptr, dv_ptr, k_strides, v_strides, marks, keep_ptr,
                            ends, reverse, partial, table, heads, parts, groups, stretches, units,
                            span, tokens, F: tl.constexpr):  # fmt: skip
    """ds_lj = e^{s_lj - L_l} (G_l . v_j - g_l), dK, dV and the gradient of landmark queries."""
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    part, group, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    keys, values = tokens_of(k_ptr, k_strides, b, h), tokens_of(v_ptr, v_strides, b, h)
    dk_ptr += tl.cast(pair, tl.int64) * problem.tokens * F.DIM
    dv_ptr += tl.cast(pair, tl.int64) * problem.tokens * F.DIM_V
    if F.KEEP:
        keep_ptr += tl.cast(b, tl.int64) * problem.tokens
    lq = landmark_queries(marks, b, h, k_ptr.dtype.element_ty, F)
    dlq = 0.0
    if F.TAKES_KEYS:
        dlq = zeros(F.PAD_M, F.BLOCK_D)
    for stretch in range(group * problem.units,
                      tl.minimum((group + 1) * problem.units, problem.stretches)):  # fmt: skip
        start, stop, row = span_of(stretch, b, problem, table, F)
        line = tl.cast(row, tl.int64) * problem.heads + h
        ref, tot, acc = incoming_state(ends.L, ends.R, line, 0, 0, F.PAD_M, F)
        pull = tl.load(vector_ptrs(reverse.pull, line, F))
        G = tl.load(state_ptrs(reverse.G, line, 0, F))
        share = reciprocal(tot)
        for t0 in range(start, stop, F.CHUNK):
            there = t0 + tl.arange(0, F.CHUNK) < stop
            keep = kept_tokens(keep_ptr, t0, stop, F)
            s, k = key_scores(keys, t0, keep, lq, 0.0, marks, F)
            v = load_rows(values[0], t0, values[1], keep, F.DIM_V, F.CHUNK, F.BLOCK_V,
                          F.DIM_V != F.BLOCK_V)  # fmt: skip
            E = tl.exp2(s - ref[:, None]) * share[:, None]
            if F.TAKES_VALUES:
                dv = mm(tl.trans(operand(E, F)), G, F)
                if part == 0:
                    store_rows(dv_ptr, t0, F.DIM_V, there, F.DIM_V, dv, F.CHUNK, F.BLOCK_V,
                               F.DIM_V != F.BLOCK_V)  # fmt: skip
            if F.TAKES_KEYS:
                ds = operand(E * (mm(G, tl.trans(v), F) - pull[:, None]), F)
                dlq = take_keys(k, keys, dk_ptr, t0, there, keep, ds, dlq, lq, part, marks, F)
    if F.TAKES_KEYS:
        line = line_of(group, pair, problem, F)
        put_share(columns_ptrs(partial.dlq, line, part, F), dlq, F)
        if leads(part, F):
            put_share(vector_ptrs(partial.ddecay, line, F), full(F.PAD_M, 0.0), F)


def features(call: args.Inputs, config: configs.Config, **extra: bool) -> args.Features:
    """Features of kernels whose state is that at the end."""
    return dataclasses.replace(args.features(call, config, **extra), STATE=True)


def key_stretches(call: args.Inputs) -> args.Stretches:
    """The cut of the keys."""
    batch, heads, tokens, _ = call.key.shape
    return args.cut(call, configs.forward_span(call.key.device, batch * heads, tokens), tokens)


def bidirectional_forward(call: args.Inputs) -> tuple[Tensor, args.Ends]:
    """The output, and the states of all keys."""
    query = call.query
    _, ends = start_states(call, key_stretches(call))
    out = args.new_output(call)
    if not query.shape[2]:  # the states alone are wanted
        return out, ends
    config = args.choose_config("read", call)
    F, stretches = features(call, config), args.cut(call, configs.READ_SPAN, query.shape[2])
    problem = args.problem_of(
        call, stretches, triton.cdiv(F.DIM_V, F.BLOCK_V), tokens=query.shape[2]
    )
    pairs = call.key.shape[0] * problem.heads
    with on_device(query):
        read_kernel[(pairs * problem.groups * problem.parts,)](
            query, out, strides(query), call.marks, ends, stretches.table, *problem,
            F, **config.options,
        )  # fmt: skip
    return out, ends


def bidirectional_sweep(call: args.Inputs, dout: Tensor, dL, dR, wide: bool) -> dict[str, Tensor]:
    """All gradients of one slice of the columns of values; those of tokens float32 if `wide`."""
    query, key, value = call.query, call.key, call.value
    pairs = key.shape[0] * key.shape[1]
    cut = key_stretches(call)
    _, ends = start_states(call, cut)
    row_config, key_config = (args.choose_config(pass_, call) for pass_ in ("rows", "keys"))
    row_config = dataclasses.replace(row_config, chunk=min(row_config.chunk, 32))
    F, stretches = features(call, row_config), args.cut(call, configs.READ_SPAN, query.shape[2])
    grads = args.new_token_gradients(call, wide)
    problem = args.problem_of(
        call,
        stretches,
        F.BLOCKS_D,
        configs.stretches_of_a_program(pairs * stretches.count),
        query.shape[2],
    )
    key_problem = args.problem_of(
        call, cut, F.BLOCKS_D, configs.stretches_of_a_program(pairs * cut.count)
    )
    reverse = new_reverse(query, pairs * stretches.count, F)
    rows = new_row_partials(query, pairs, problem.groups, F)
    keys = new_key_partials(query, pairs, key_problem.groups, F)
    pull, G = outgoing(call, ends, dL, dR, F)
    with on_device(query):
        if query.shape[2]:
            for takes in configs.launches("rows", row_config.shares):
                own = problem if takes["TAKES_QUERIES"] else problem._replace(parts=1)
                read_backward_kernel[(pairs * own.groups * own.parts,)](
                    query, dout, grads["query"], strides(query), strides(dout), call.marks, ends,
                    reverse, rows, stretches.table, *own, features(call, row_config, **takes),
                    **row_config.options,
                )  # fmt: skip
            reverse_scan(call, reverse, pull, G, stretches, problem, F)
        else:
            for shares in rows:
                shares.zero_()
        reverse = reverse._replace(pull=pull, G=G)
        for takes in configs.launches("keys", key_config.shares):
            own = key_problem if takes["TAKES_KEYS"] else key_problem._replace(parts=1)
            summary_backward_kernel[(pairs * own.groups * own.parts,)](
                key, value, grads["key"], grads["value"], strides(key), strides(value), call.marks,
                call.keep, ends, reverse, keys, cut.table, *own,
                features(call, key_config, **takes),
                **key_config.options,
            )  # fmt: skip
    grads |= parameter_gradients(call, rows, keys, F)
    if call.L0 is not None:
        marks = slice(F.MARKS)
        empty = call.L0 == -torch.inf
        kept = torch.exp(call.L0 - ends.L).masked_fill(empty, 0.0)
        dR0 = G[:, marks, : F.DIM_V].reshape(call.R0.shape)
        held = call.R0.masked_fill(empty.unsqueeze(-1), 0.0)
        grads["L0"] = kept * ((dR0 * held).sum(-1) - pull[:, 0, marks].reshape(empty.shape))
        grads["R0"] = kept.unsqueeze(-1) * dR0
    return grads
