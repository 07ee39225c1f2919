"""Forward pass: outputs from the states at the start of each slot, chunk after chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse.arguments import on_device, strides
from . import arguments as args
from . import configs
from .primitives import (
    end_of_chunk,
    exponentials,
    full,
    head_of,
    incoming_state,
    kept_tokens,
    key_scores,
    landmark_features,
    landmark_products,
    load_rows,
    load_state,
    locate,
    lower,
    mm,
    mm_acc,
    parameters,
    reciprocal,
    running_sums,
    span_of,
    store_end_state,
    store_rows,
    times_steps,
    weights,
)
from .states import start_states
from .steep import exact_between, exact_norm, rebased


@triton.jit
def norms(norm, decay2, F: tl.constexpr):
    """log2 of Z for the rows of a chunk, from that in the chunk's own time; [CHUNK, PAD_M]."""
    if F.DECAY:
        norm -= times_steps(decay2[None, :], F)
    return norm


@triton.jit
def read_weights(q_ptr, t0, stride, there, lk, lk_ptr, marks, core, norm, half2, F: tl.constexpr):
    """(features, W, factor) of a chunk of queries of one head."""
    dots = landmark_products(q_ptr, t0, stride, there, lk, lk_ptr, marks.lk_strides[2], F)
    features = landmark_features(dots, half2, marks, F)
    W, factor = weights(features, core, norm, half2, F)
    return features, W, factor


@triton.jit(do_not_specialize=["problem"])
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
    table,
    problem,
    F: tl.constexpr,
):
    part, slot, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    start, stop, row = span_of(slot, b, problem, table, F)
    v0 = part * F.BLOCK_V
    b64, h64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    NARROW_V: tl.constexpr = F.DIM_V % F.BLOCK_V != 0
    q_ptr += b64 * q_strides[0] + h64 * F.GROUP * q_strides[1]
    k_ptr += b64 * k_strides[0] + h64 * k_strides[1]
    v_ptr += b64 * v_strides[0] + h64 * v_strides[1] + v0
    head_size = tl.cast(problem.tokens, tl.int64) * F.DIM_V
    out_ptr += (b64 * problem.heads + h64) * F.GROUP * head_size + v0
    if F.KEEP:
        keep_ptr += b64 * problem.tokens
    lq_ptr, lk_ptr, lq, lk, core, decay2, half2 = parameters(marks, b, h, q_ptr.dtype.element_ty, F)

    line = tl.cast(row, tl.int64) * problem.heads + h
    if F.ONE_PASS:
        ref, tot, acc = incoming_state(ends.L0, ends.R0, line, v0, F)
    else:
        ref, tot, acc = load_state(saved, tl.cast(pair, tl.int64) * problem.slots + slot, v0, F)
    for t0 in range(start, stop, F.CHUNK):
        keep = kept_tokens(keep_ptr, t0, stop, F)
        s = key_scores(k_ptr, t0, k_strides[2], keep, lq, marks, lq_ptr, decay2, F)
        v = load_rows(v_ptr, t0, v_strides[2], keep, F.DIM_V - v0, F.CHUNK, F.BLOCK_V, NARROW_V)
        ref, P, first = exponentials(s, keep, ref, tot, F)
        cum = running_sums(P, tot, F)
        inverse = reciprocal(cum)
        norm = norms(ref[None, :] + tl.log2(cum), decay2, F) if F.MASS else 0.0
        offs = tl.arange(0, F.CHUNK)
        there = t0 + offs < stop
        # out = (W e^{L0-L}) R0 + [(W e^{ref-L}) (e^{s-ref})^T, selected where j <= i] V
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
            wt = W * inverse
            between = tl.where(lower(F), mm(wt, tl.trans(P), F), 0.0)
            out = mm_acc(between, v, mm(wt, tl.trans(acc), F), F)
            store_rows(out_ptr + g * head_size, t0, F.DIM_V, there & (offs < first), F.DIM_V - v0,
                       out, F.CHUNK, F.BLOCK_V, NARROW_V)  # fmt: skip
        ratio = full(F.PAD_M, 1.0)
        if first < F.CHUNK:
            s = key_scores(k_ptr, t0, k_strides[2], keep, lq, marks, lq_ptr, decay2, F)
            exact = exact_norm(s, ref, tot, F)
            Z = norms(exact, decay2, F)
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
                    Z,
                    half2,
                    F,
                )
                between = exact_between(s, exact, W, first, F)
                wt = tl.where((offs >= first)[:, None], W * tl.exp2(ref[None, :] - exact), 0.0)
                out = mm_acc(between, v, mm(wt, tl.trans(acc), F), F)
                store_rows(out_ptr + g * head_size, t0, F.DIM_V, there & (offs >= first),
                           F.DIM_V - v0, out, F.CHUNK, F.BLOCK_V, NARROW_V)  # fmt: skip
            P, ref, ratio = rebased(s, ref, tot, F)
        length = tl.minimum(stop - t0, F.CHUNK)
        E, ref, tot, ratio = end_of_chunk(P, ref, tot, ratio, decay2, length, F)
        acc = mm_acc(tl.trans(v), E, acc * ratio[None, :], F)
    if F.ONE_PASS:
        store_end_state(ends.L, ends.R, line, v0, ref, tot, acc, F)


def causal_forward(call: args.Call) -> tuple[Tensor, Tensor, Tensor]:
    """(out, L_end, R_end) of `forward` with is_causal=True."""
    query, tokens = call.query, call.query.shape[2]
    out = torch.empty(*query.shape[:3], call.value.shape[3], dtype=query.dtype, device=query.device)
    decode = tokens <= configs.DECODE_TOKENS and call.cu_seqlens is None
    config = args.choose_config("decode" if decode else "forward", call)
    pairs = call.key.shape[0] * call.key.shape[1]
    one_pass = call.cu_seqlens is None and configs.fills_device(query.device, pairs, tokens)
    F = args.features(call, config, one_pass)
    if one_pass:
        slots = args.cut(call, max(1, tokens), tokens)
        saved, ends = None, args.new_ends(call)
    else:
        slots = args.cut(call, configs.FORWARD_SPAN, tokens)
        saved, ends = start_states(call, slots)
    problem = args.problem_of(call, slots, triton.cdiv(F.DIM_V, F.BLOCK_V))
    with on_device(query):
        output_kernel[(pairs * problem.groups * problem.parts,)](
            query, call.key, call.value, out, strides(query), strides(call.key),
            strides(call.value), call.marks, call.keep, saved, ends, slots.table, problem, F,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, ends.L, ends.R
