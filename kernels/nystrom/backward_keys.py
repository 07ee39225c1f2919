"""Backward, key side: against time, from the reverse states at the end of each slot.

The reverse state of a landmark is (G, pull), referenced to L at the boundary that it is about:
G = sum over later i of W_i e^{L - L(i)} dO_i, held transposed, and pull likewise with dW.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_rows import exact_row_gradients, row_gradients
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
    operand,
    parameters,
    reciprocal,
    running_sums,
    span_of,
    state_ptrs,
    store_rows,
    times_steps,
    zeros,
)
from .steep import exact_between, exact_dscores, exact_norm, rebased


@triton.jit
def later_sums(x, F: tl.constexpr):
    """sum over i >= j of x_i, [CHUNK, PAD_M]."""
    if F.SCAN:
        sums = tl.cumsum(x, 0, reverse=True)
    else:
        offs = tl.arange(0, F.CHUNK)
        sums = mm((offs[:, None] <= offs[None, :]).to(tl.float32), x, F)
    return sums


@triton.jit
def chunk_scores(k_ptr, v_ptr, keep_ptr, t0, stop, k_stride, v_stride, lq, marks, lq_ptr, decay2,
                 ref, tot, F: tl.constexpr):  # fmt: skip
    """(keys kept, s, v, ref, P, first token of a rise) of the chunk at t0."""
    keep = kept_tokens(keep_ptr, t0, stop, F)
    s = key_scores(k_ptr, t0, k_stride, keep, lq, marks, lq_ptr, decay2, F)
    v = load_rows(v_ptr, t0, v_stride, keep, F.DIM_V, F.CHUNK, F.BLOCK_V, F.DIM_V != F.BLOCK_V)
    ref, P, first = exponentials(s, keep, ref, tot, F)
    return keep, s, v, ref, P, first


@triton.jit
def walk(k_ptr, v_ptr, keep_ptr, start, until, stop, k_stride, v_stride, lq, marks, lq_ptr, decay2,
         ref, tot, acc, F: tl.constexpr):  # fmt: skip
    """The state at `until`, a chunk's start or the slot's end, from the state at `start`."""
    for t0 in range(start, until, F.CHUNK):
        keep, s, v, ref, P, first = chunk_scores(
            k_ptr, v_ptr, keep_ptr, t0, stop, k_stride, v_stride, lq, marks, lq_ptr, decay2,
            ref, tot, F,
        )  # fmt: skip
        ratio = full(F.PAD_M, 1.0)
        if first < F.CHUNK:
            P, ref, ratio = rebased(s, ref, tot, F)
        length = tl.minimum(stop - t0, F.CHUNK)
        E, ref, tot, ratio = end_of_chunk(P, ref, tot, ratio, decay2, length, F)
        acc = mm_acc(tl.trans(v), E, acc * ratio[None, :], F)
    return ref, tot, acc


@triton.jit
def key_gradients(P, wt, centre, v, dout, ds, dv, F: tl.constexpr):
    """Add what the rows of the chunk itself give to ds [CHUNK, PAD_M] and dv [CHUNK, BLOCK_V].

    ds_lj += sum over i >= j of W_il D_lj(i) (dO_i . v_j - centre_il)
    dv_j  += sum over i >= j of W_il D_lj(i) dO_i
    """
    seen = tl.trans(lower(F))  # [key, query]
    turned = tl.dot(v, tl.trans(dout), input_precision=F.PRECISION)
    inner = mm(tl.where(seen, turned, 0.0), wt, F)
    ds += P * (inner - later_sums(wt * centre, F))
    between = tl.where(seen, mm(P, tl.trans(wt), F), 0.0)
    return ds, mm_acc(between, dout, dv, F)


@triton.jit
def exact_key_gradients(s, exact, W, centre, pairs, dout, first, ds, dv, F: tl.constexpr):
    """The same from the rows at or after `first`."""
    between = exact_between(s, exact, W, first, F)
    ds += exact_dscores(s, exact, W, centre, pairs, first, F)
    return ds, mm_acc(tl.trans(between), dout, dv, F)


@triton.jit(do_not_specialize=["problem"])
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
    partial,
    table,
    problem,
    F: tl.constexpr,
):
    part, group, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    b64, h64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    NARROW_V: tl.constexpr = F.DIM_V != F.BLOCK_V
    NARROW_D: tl.constexpr = F.DIM % F.BLOCK_D != 0
    q_ptr += b64 * q_strides[0] + h64 * F.GROUP * q_strides[1]
    k_ptr += b64 * k_strides[0] + h64 * k_strides[1]
    v_ptr += b64 * v_strides[0] + h64 * v_strides[1]
    dout_ptr += b64 * dout_strides[0] + h64 * F.GROUP * dout_strides[1]
    d0 = part * F.BLOCK_D
    dk_ptr += tl.cast(pair, tl.int64) * problem.tokens * F.DIM + d0
    dv_ptr += tl.cast(pair, tl.int64) * problem.tokens * F.DIM_V
    if F.KEEP:
        keep_ptr += b64 * problem.tokens
    lq_ptr, lk_ptr, lq, lk, core, decay2, half2 = parameters(marks, b, h, q_ptr.dtype.element_ty, F)
    own_lq = load_landmarks(lq_ptr, marks.lq_strides[2], part, tl.float32, F)

    dlq = zeros(F.BLOCK_D, F.PAD_M)
    ddecay = full(F.PAD_M, 0.0)
    for slot in range(group * problem.units,
                      tl.minimum((group + 1) * problem.units, problem.slots)):  # fmt: skip
        start, stop, _ = span_of(slot, b, problem, table, F)
        line = tl.cast(pair, tl.int64) * problem.slots + slot
        pull_ptrs, G_ptrs = state_ptrs(reverse.pull, reverse.G, line, 0, F)
        pull, G = tl.load(pull_ptrs), tl.load(G_ptrs)
        chunks = tl.cdiv(stop - start, F.CHUNK)
        for n in range(chunks):
            t0 = start + (chunks - 1 - n) * F.CHUNK
            ref, tot, acc = load_state(saved, line, 0, F)
            ref, tot, acc = walk(
                k_ptr,
                v_ptr,
                keep_ptr,
                start,
                t0,
                stop,
                k_strides[2],
                v_strides[2],
                lq,
                marks,
                lq_ptr,
                decay2,
                ref,
                tot,
                acc,
                F,
            )
            keep, s, v, ref, P, first = chunk_scores(
                k_ptr, v_ptr, keep_ptr, t0, stop, k_strides[2], v_strides[2], lq, marks, lq_ptr,
                decay2, ref, tot, F,
            )  # fmt: skip
            cum = running_sums(P, tot, F)
            inverse = reciprocal(cum)
            norm = norms(ref[None, :] + tl.log2(cum), decay2, F) if F.MASS else 0.0
            offs = tl.arange(0, F.CHUNK)
            there = t0 + offs < stop
            end_P, end_ref, ratio = P, ref, full(F.PAD_M, 1.0)
            if first < F.CHUNK:
                end_P, end_ref, ratio = rebased(s, ref, tot, F)
            length = tl.minimum(stop - t0, F.CHUNK)
            E, end_ref, end_tot, ratio = end_of_chunk(end_P, end_ref, tot, ratio, decay2, length, F)
            if F.DECAY:  # the chunk's length times the gradient of L at its end
                last = mm_acc(tl.trans(v), E, acc * ratio[None, :], F)
                ddecay -= length * (tl.sum(G * last, 0) * reciprocal(end_tot) - pull)
            E *= reciprocal(end_tot)[None, :]  # e^{s - L at the chunk's end}
            ratio *= tot * reciprocal(end_tot)
            ds = E * (mm(v, G, F) - pull[None, :])
            dv = mm(E, tl.trans(G), F)
            G *= ratio[None, :]
            pull *= ratio
            for g in range(F.GROUP):
                rows = there & (offs < first)
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
                dout = load_rows(head_of(dout_ptr, g, dout_strides), t0, dout_strides[2], rows,
                                 F.DIM_V, F.CHUNK, F.BLOCK_V, NARROW_V)  # fmt: skip
                pairs = tl.dot(dout, tl.trans(v), input_precision=F.PRECISION)
                wt, dW, centre = row_gradients(P, W, inverse, rows, pairs, dout, acc, F)
                ds, dv = key_gradients(P, wt, centre, v, dout, ds, dv, F)
                wt *= tot[None, :]
                G = mm_acc(tl.trans(dout), wt, G, F)
                pull += tl.sum(wt * centre, 0)
            if first < F.CHUNK:
                s = key_scores(k_ptr, t0, k_strides[2], keep, lq, marks, lq_ptr, decay2, F)
                exact = exact_norm(s, ref, tot, F)
                Z = norms(exact, decay2, F)
                for g in range(F.GROUP):
                    rows = there & (offs >= first)
                    features, W, factor = read_weights(
                        head_of(q_ptr, g, q_strides), t0, q_strides[2], there, lk, lk_ptr, marks,
                        core, Z, half2, F,
                    )  # fmt: skip
                    dout = load_rows(head_of(dout_ptr, g, dout_strides), t0, dout_strides[2], rows,
                                     F.DIM_V, F.CHUNK, F.BLOCK_V, NARROW_V)  # fmt: skip
                    pairs = tl.dot(dout, tl.trans(v), input_precision=F.PRECISION)
                    wt, dW, centre = exact_row_gradients(s, exact, W, pairs, dout, ref, acc, first,
                                                        F)  # fmt: skip
                    ds, dv = exact_key_gradients(s, exact, W, centre, pairs, dout, first, ds, dv,
                                                 F)  # fmt: skip
                    wt *= tot[None, :]
                    G = mm_acc(tl.trans(dout), wt, G, F)
                    pull += tl.sum(wt * centre, 0)
            dk = mm(ds, tl.trans(own_lq), F) * marks.scale
            store_rows(dk_ptr, t0, F.DIM, there, F.DIM - d0, dk, F.CHUNK, F.BLOCK_D, NARROW_D)
            if part == 0:
                store_rows(dv_ptr, t0, F.DIM_V, there, F.DIM_V, dv, F.CHUNK, F.BLOCK_V, NARROW_V)
            k = load_rows(k_ptr + d0, t0, k_strides[2], keep, F.DIM - d0, F.CHUNK, F.BLOCK_D,
                          NARROW_D)  # fmt: skip
            dlq = mm_acc(tl.trans(operand(k, F)), ds, dlq, F)
            if F.DECAY:
                ddecay += tl.sum(times_steps(ds, F), 0)
    line = tl.cast(pair, tl.int64) * problem.groups + group
    offs_m = tl.arange(0, F.PAD_M)
    rows = line * problem.parts * F.BLOCK_D + part * F.BLOCK_D + tl.arange(0, F.BLOCK_D)
    tl.store(partial.dlq + rows[:, None] * F.PAD_M + offs_m[None, :], dlq)
    if part == 0:
        tl.store(partial.ddecay + line * F.PAD_M + offs_m, ddecay)
