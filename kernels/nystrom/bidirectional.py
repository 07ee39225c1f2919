"""Nyström without causality: every query reads the states of all visible keys.

The summaries are the states of slots and their scan; reading them, and the backward of both, is
here. The reverse state needs no time: what each slot of queries adds is summed in order.
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
from .backward_rows import centre_of, store_partials, take_rows
from .forward import read_weights
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
    key_scores,
    load_landmarks,
    load_rows,
    locate,
    mm,
    mm_acc,
    operand,
    parameters,
    reciprocal,
    span_of,
    state_ptrs,
    store_rows,
    zeros,
)
from .states import start_states


@triton.jit(do_not_specialize=["problem"])
def read_kernel(q_ptr, out_ptr, q_strides, marks, ends, table, problem, F: tl.constexpr):
    part, slot, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    start, stop, row = span_of(slot, b, problem, table, F)
    v0 = part * F.BLOCK_V
    b64, h64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    q_ptr += b64 * q_strides[0] + h64 * F.GROUP * q_strides[1]
    out_ptr += (b64 * problem.heads + h64) * F.GROUP * problem.tokens * F.DIM_V + v0
    _, lk_ptr, _, lk, core, _, half2 = parameters(marks, b, h, q_ptr.dtype.element_ty, F)
    line = tl.cast(row, tl.int64) * problem.heads + h
    ref, tot, acc = incoming_state(ends.L, ends.R, line, v0, F)
    R = operand(tl.trans(acc * reciprocal(tot)[None, :]), F)
    norm = (ref + tl.log2(tot))[None, :] + zeros(F.CHUNK, F.PAD_M)
    for t0 in range(start, stop, F.CHUNK):
        there = t0 + tl.arange(0, F.CHUNK) < stop
        for g in range(F.GROUP):
            features, W, factor = read_weights(
                head_of(q_ptr, g, q_strides),
                t0,
                q_strides[2],
                there,
                lk,
                lk_ptr,
                marks,
                core,
                norm,
                half2,
                F,
            )
            store_rows(out_ptr + tl.cast(g, tl.int64) * problem.tokens * F.DIM_V, t0, F.DIM_V,
                       there, F.DIM_V - v0, mm(W, R, F), F.CHUNK, F.BLOCK_V,
                       F.DIM_V % F.BLOCK_V != 0)  # fmt: skip


@triton.jit(do_not_specialize=["problem"])
def read_backward_kernel(q_ptr, dout_ptr, dq_ptr, q_strides, dout_strides, marks, ends, own,
                         partial, table, problem, F: tl.constexpr):  # fmt: skip
    """dQ, the gradients of core and landmark keys, and what each slot gives to the states."""
    part, group, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    b64, h64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    d0 = part * F.BLOCK_D
    q_ptr += b64 * q_strides[0] + h64 * F.GROUP * q_strides[1]
    dout_ptr += b64 * dout_strides[0] + h64 * F.GROUP * dout_strides[1]
    head_size = tl.cast(problem.tokens, tl.int64) * F.DIM
    dq_ptr += (b64 * problem.heads + h64) * F.GROUP * head_size + d0
    _, lk_ptr, _, lk, core, _, half2 = parameters(marks, b, h, q_ptr.dtype.element_ty, F)
    own_lk = load_landmarks(lk_ptr, marks.lk_strides[2], part, tl.float32, F)
    dcore = zeros(F.PAD_M, F.PAD_M)
    dlk = zeros(F.BLOCK_D, F.PAD_M)
    dhalf = full(F.PAD_M, 0.0)
    ddecay = full(F.PAD_M, 0.0)
    for slot in range(group * problem.units,
                      tl.minimum((group + 1) * problem.units, problem.slots)):  # fmt: skip
        start, stop, row = span_of(slot, b, problem, table, F)
        line = tl.cast(row, tl.int64) * problem.heads + h
        ref, tot, acc = incoming_state(ends.L, ends.R, line, 0, F)
        R = acc * reciprocal(tot)[None, :]
        norm = (ref + tl.log2(tot))[None, :] + zeros(F.CHUNK, F.PAD_M)
        G = zeros(F.BLOCK_V, F.PAD_M)
        pull = full(F.PAD_M, 0.0)
        for t0 in range(start, stop, F.CHUNK):
            there = t0 + tl.arange(0, F.CHUNK) < stop
            for g in range(F.GROUP):
                head_ptr = head_of(q_ptr, g, q_strides)
                features, W, factor = read_weights(head_ptr, t0, q_strides[2], there, lk, lk_ptr,
                                                   marks, core, norm, half2, F)  # fmt: skip
                dout = load_rows(head_of(dout_ptr, g, dout_strides), t0, dout_strides[2], there,
                                 F.DIM_V, F.CHUNK, F.BLOCK_V, F.DIM_V != F.BLOCK_V)  # fmt: skip
                dW = mm(dout, R, F)
                centre = centre_of(W, dW, F)
                G = mm_acc(tl.trans(dout), W, G, F)
                pull += tl.sum(W * centre, 0)
                dcore, dlk, dhalf, ddecay = take_rows(
                    head_ptr, dq_ptr + g * head_size, t0, q_strides[2], there, marks, lk, own_lk,
                    lk_ptr, core, half2, d0, features, W, factor, dW, centre, dcore, dlk, dhalf,
                    ddecay, F,
                )  # fmt: skip
        slot_line = tl.cast(pair, tl.int64) * problem.slots + slot
        pull_ptrs, G_ptrs = state_ptrs(own.pull, own.G, slot_line, 0, F)
        ratio_ptrs, _ = state_ptrs(own.ratio, own.G, slot_line, 0, F)
        tl.store(pull_ptrs, pull)
        tl.store(G_ptrs, G)
        tl.store(ratio_ptrs, full(F.PAD_M, 1.0))
    store_partials(partial, group, pair, part, dcore, dlk, dhalf, ddecay, problem, F)


@triton.jit(do_not_specialize=["problem"])
def summary_backward_kernel(k_ptr, v_ptr, dk_ptr, dv_ptr, k_strides, v_strides, marks, keep_ptr,
                            ends, reverse, partial, table, problem, F: tl.constexpr):  # fmt: skip
    """ds_lj = e^{s_lj - L_l} (G_l . v_j - g_l), dK, dV and the gradient of landmark queries."""
    part, group, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    b64, h64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    NARROW_V: tl.constexpr = F.DIM_V != F.BLOCK_V
    NARROW_D: tl.constexpr = F.DIM % F.BLOCK_D != 0
    d0 = part * F.BLOCK_D
    k_ptr += b64 * k_strides[0] + h64 * k_strides[1]
    v_ptr += b64 * v_strides[0] + h64 * v_strides[1]
    dk_ptr += tl.cast(pair, tl.int64) * problem.tokens * F.DIM + d0
    dv_ptr += tl.cast(pair, tl.int64) * problem.tokens * F.DIM_V
    if F.KEEP:
        keep_ptr += b64 * problem.tokens
    lq_ptr, _, lq, _, _, decay2, _ = parameters(marks, b, h, k_ptr.dtype.element_ty, F)
    own_lq = load_landmarks(lq_ptr, marks.lq_strides[2], part, tl.float32, F)
    dlq = zeros(F.BLOCK_D, F.PAD_M)
    for slot in range(group * problem.units,
                      tl.minimum((group + 1) * problem.units, problem.slots)):  # fmt: skip
        start, stop, row = span_of(slot, b, problem, table, F)
        line = tl.cast(row, tl.int64) * problem.heads + h
        ref, tot, _ = incoming_state(ends.L, ends.R, line, 0, F)
        pull_ptrs, G_ptrs = state_ptrs(reverse.pull, reverse.G, line, 0, F)
        pull, G = tl.load(pull_ptrs), tl.load(G_ptrs)
        share = reciprocal(tot)
        for t0 in range(start, stop, F.CHUNK):
            there = t0 + tl.arange(0, F.CHUNK) < stop
            keep = kept_tokens(keep_ptr, t0, stop, F)
            s = key_scores(k_ptr, t0, k_strides[2], keep, lq, marks, lq_ptr, decay2, F)
            v = load_rows(v_ptr, t0, v_strides[2], keep, F.DIM_V, F.CHUNK, F.BLOCK_V, NARROW_V)
            E = tl.exp2(s - ref[None, :]) * share[None, :]
            ds = E * (mm(v, G, F) - pull[None, :])
            dv = mm(E, tl.trans(G), F)
            dk = mm(ds, tl.trans(own_lq), F) * marks.scale
            store_rows(dk_ptr, t0, F.DIM, there, F.DIM - d0, dk, F.CHUNK, F.BLOCK_D, NARROW_D)
            if part == 0:
                store_rows(dv_ptr, t0, F.DIM_V, there, F.DIM_V, dv, F.CHUNK, F.BLOCK_V, NARROW_V)
            k = load_rows(k_ptr + d0, t0, k_strides[2], keep, F.DIM - d0, F.CHUNK, F.BLOCK_D,
                          NARROW_D)  # fmt: skip
            dlq = mm_acc(tl.trans(operand(k, F)), ds, dlq, F)
    line = tl.cast(pair, tl.int64) * problem.groups + group
    offs_m = tl.arange(0, F.PAD_M)
    rows = line * problem.parts * F.BLOCK_D + part * F.BLOCK_D + tl.arange(0, F.BLOCK_D)
    tl.store(partial.dlq + rows[:, None] * F.PAD_M + offs_m[None, :], dlq)
    if part == 0:
        tl.store(partial.ddecay + line * F.PAD_M + offs_m, full(F.PAD_M, 0.0))


def reading(call: args.Call, config: configs.Config) -> tuple[args.Features, args.Slots]:
    """Features and slots of the kernels that walk queries: their state is that at the end."""
    F = dataclasses.replace(args.features(call, config), STATE=True)
    return F, args.cut(call, configs.READ_SPAN, call.query.shape[2])


def bidirectional_forward(call: args.Call) -> tuple[Tensor, Tensor, Tensor]:
    """(out, L_end, R_end) of `forward` with is_causal=False."""
    query = call.query
    _, ends = start_states(call, args.cut(call, configs.FORWARD_SPAN, call.key.shape[2]))
    out = torch.empty(*query.shape[:3], call.value.shape[3], dtype=query.dtype, device=query.device)
    config = args.choose_config("read", call)
    F, slots = reading(call, config)
    problem = args.problem_of(call, slots, triton.cdiv(F.DIM_V, F.BLOCK_V), tokens=query.shape[2])
    pairs = call.key.shape[0] * problem.heads
    with on_device(query):
        read_kernel[(pairs * problem.groups * problem.parts,)](
            query, out, strides(query), call.marks, ends, slots.table, problem, F,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, ends.L, ends.R


def bidirectional_sweep(
    call: args.Call, dout: Tensor, dL, dR, wide: bool
) -> dict[str, Tensor | None]:
    """All gradients of a call whose values fit one block; token gradients in float32 if `wide`."""
    query, key, value = call.query, call.key, call.value
    pairs = key.shape[0] * key.shape[1]
    key_slots = args.cut(call, configs.FORWARD_SPAN, key.shape[2])
    _, ends = start_states(call, key_slots)
    config = args.choose_config("rows", call)
    run = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    F, slots = reading(call, config)
    grads = args.new_token_gradients(call, wide)
    problem = args.problem_of(
        call, slots, F.BLOCKS_D, configs.slots_of_a_program(pairs * slots.count), query.shape[2]
    )
    key_problem = args.problem_of(
        call, key_slots, F.BLOCKS_D, configs.slots_of_a_program(pairs * key_slots.count)
    )
    reverse = new_reverse(query, pairs * slots.count, F)
    rows = new_row_partials(query, pairs, problem.groups, F)
    keys = new_key_partials(query, pairs, key_problem.groups, F)
    pull, G = outgoing(call, ends, dL, dR, F)
    with on_device(query):
        read_backward_kernel[(pairs * problem.groups * problem.parts,)](
            query, dout, grads["query"], strides(query), strides(dout), call.marks, ends, reverse,
            rows, slots.table, problem, F, **run,
        )  # fmt: skip
        reverse_scan(call, reverse, pull, G, slots, problem, F)
        reverse = reverse._replace(pull=pull, G=G)
        summary_backward_kernel[(pairs * key_problem.groups * key_problem.parts,)](
            key, value, grads["key"], grads["value"], strides(key), strides(value), call.marks,
            call.keep, ends, reverse, keys, key_slots.table, key_problem, F, **run,
        )  # fmt: skip
    grads |= parameter_gradients(call, rows, keys, F)
    if call.L0 is not None:
        marks = slice(F.MARKS)
        empty = call.L0 == -torch.inf
        kept = torch.exp(call.L0 - ends.L).masked_fill(empty, 0.0)
        dR0 = G[:, : F.DIM_V, marks].mT.reshape(call.R0.shape)
        held = call.R0.masked_fill(empty.unsqueeze(-1), 0.0)
        grads["L0"] = kept * ((dR0 * held).sum(-1) - pull[:, marks].reshape(empty.shape))
        grads["R0"] = kept.unsqueeze(-1) * dR0
    return grads
