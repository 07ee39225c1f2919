"""States of the stretches of a sequence: each on its own, then an exclusive scan over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..block_sparse.arguments import on_device, strides
from . import arguments as args
from . import configs
from .arguments import Problem
from .chunks import exponent
from .primitives import (
    LOG2E,
    cut_operand,
    full,
    incoming_state,
    kept_tokens,
    load_rows,
    locate,
    mm_acc,
    operand,
    span_of,
    store_end_state,
    store_state,
    zeros,
)
from .reading import landmark_dots, landmark_queries, load_decay


@triton.jit(do_not_specialize=Problem._fields)
def states_kernel(
    k_ptr,
    v_ptr,
    k_strides,
    v_strides,
    marks,
    keep_ptr,
    saved,
    slots,
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
    """The state of each stretch by itself, at its last token: an online softmax over its keys.

    `slots`, if any, are left what precedes each slot of the stretch, at the token before it.
    """
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    part, stretch, pair = locate(problem)
    b, h = pair // problem.heads, pair % problem.heads
    start, stop, _ = span_of(stretch, b, problem, table, F)
    v0 = part * F.BLOCK_V
    b64, h64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    keys = (k_ptr + b64 * k_strides[0] + h64 * k_strides[1], k_strides[2])
    v_ptr += b64 * v_strides[0] + h64 * v_strides[1] + v0
    if F.KEEP:
        keep_ptr += b64 * problem.tokens
    lq = landmark_queries(marks, b, h, k_ptr.dtype.element_ty, F)
    decay2 = load_decay(marks, h, F)

    line = tl.cast(pair, tl.int64) * problem.stretches + stretch

    top = full(F.PAD_M, float("-inf"))
    tot = full(F.PAD_M, 0.0)
    acc = zeros(F.PAD_M, F.BLOCK_V)
    for t0 in tl.range(start, stop, F.CHUNK):
        keep = kept_tokens(keep_ptr, t0, stop, F)
        if F.SLOT > 0:
            if (t0 - start) % F.SLOT == 0:
                slot = slot_line(line, t0 - start, problem, F)
                store_state(slots, slot, v0, known(top), tot, operand(acc, F), F)
        dots, k = landmark_dots(keys, t0, keep, lq, F)
        s = dots * marks.scale2
        fade = 0.0
        if F.DECAY:  # times are those of the chunk's last token
            length = tl.minimum(stop - t0, F.CHUNK)
            s -= decay2[:, None] * (length - 1 - tl.arange(0, F.CHUNK)).to(tl.float32)[None, :]
            fall = decay2 * length
            whole = tl.floor(fall + 0.5)
            top -= whole
            fade = whole - fall
        s = tl.where(keep[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.ceil(tl.max(s, 1)))
        pivot = known(higher)
        P = cut_operand(tl.exp2(s - pivot[:, None]), F)
        alpha = tl.exp2(top - pivot + fade)
        v = load_rows(v_ptr, t0, v_strides[2], keep, F.DIM_V - v0, F.CHUNK, F.BLOCK_V,
                      F.DIM_V % F.BLOCK_V != 0)  # fmt: skip
        acc = mm_acc(P, v, acc * alpha[:, None], F)
        tot = tot * alpha + tl.sum(P, 1)
        top = higher
    store_state(saved, line, v0, known(top), tot, acc, F)


@triton.jit
def known(ref):
    """A reference that may be -inf, where nothing is held, as states have it: 0 then."""
    return tl.where(ref == float("-inf"), 0.0, ref)


@triton.jit
def slot_line(line, elapsed, problem, F: tl.constexpr):
    """Line of the slot that starts so many tokens after its stretch, which has line `line`."""
    return line * tl.cdiv(problem.span, F.SLOT) + elapsed // F.SLOT


@triton.jit
def decayed(ref, tot, decay2, tokens, F: tl.constexpr):
    """(ref, tot, factor of totals) of a state so many tokens later."""
    fade = 1.0
    if F.DECAY:
        fall = decay2 * tokens
        whole = tl.floor(fall + 0.5)
        fade = tl.exp2(whole - fall)
        ref, tot = ref - whole, tot * fade
    return ref, tot, fade


@triton.jit
def joined(ref, tot, own_ref, own_tot):
    """(ref, tot, factors of the two totals) of two states together, tot in [1, 2)."""
    top = known(tl.maximum(tl.where(tot == 0.0, float("-inf"), ref),
                           tl.where(own_tot == 0.0, float("-inf"), own_ref)))  # fmt: skip
    # at most 1, also where nothing is held, which is 0 times it
    past, new = tl.exp2(tl.minimum(ref - top, 0.0)), tl.exp2(tl.minimum(own_ref - top, 0.0))
    tot = tot * past + own_tot * new
    bits = tl.where(tot > 0.0, exponent(tot), 0.0)
    shrink = tl.exp2(-bits)
    return top + bits, tot * shrink, past * shrink, new * shrink


@triton.jit
def load_rows_of(own, line, v0, r0, there, ROWS: tl.constexpr, F: tl.constexpr):
    """(ref, tot, acc) of ROWS landmarks of a line from r0 on; of no use unless `there`."""
    at = line * F.PAD_M + r0 + tl.arange(0, ROWS)
    ptrs = own.acc + at[:, None] * F.PAD_V + (v0 + tl.arange(0, F.BLOCK_V))[None, :]
    on = there & (at >= 0)
    ref, tot = tl.load(own.ref + at, mask=on, other=0.0), tl.load(own.tot + at, mask=on, other=0.0)
    # [ROWS, BLOCK_V]
    return ref, tot, tl.load(ptrs, mask=on[:, None], other=0.0)


@triton.jit(do_not_specialize=Problem._fields)
def scan_kernel(own, saved, ends, marks, table, sequences, heads, parts, groups, stretches, units,
                span, tokens, ROWS: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """From what each stretch holds by itself to the state at its start, and the states at the end.

    A program has ROWS landmarks and BLOCK_V columns. `own` and `saved` share acc, of which each
    element belongs to one thread of one program; loads run three stretches ahead.
    """
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    part, row, h = locate(problem)
    BLOCKS: tl.constexpr = F.PAD_M // ROWS
    v0, r0 = part // BLOCKS * F.BLOCK_V, part % BLOCKS * ROWS
    b = row
    first, count = 0, problem.stretches
    if F.PACKED:
        b = 0
        first = tl.load(sequences + 2 * row)
        count = tl.load(sequences + 2 * row + 1)
    # [ROWS]
    rows = r0 + tl.arange(0, ROWS)
    if F.DECAY:
        decay2 = tl.load(
            marks.decay + h * marks.decay_stride + rows, mask=rows < F.MARKS, other=0.0
        )
        decay2 = decay2.to(tl.float32) * LOG2E
    line0 = (tl.cast(b, tl.int64) * problem.heads + h) * problem.stretches + first
    end_line = tl.cast(row, tl.int64) * problem.heads + h
    ref, tot, acc = incoming_state(ends.L0, ends.R0, end_line, v0, r0, ROWS, F)
    one = load_rows_of(own, line0, v0, r0, count > 0, ROWS, F)
    two = load_rows_of(own, line0 + 1, v0, r0, count > 1, ROWS, F)
    three = load_rows_of(own, line0 + 2, v0, r0, count > 2, ROWS, F)
    for n in range(count):
        four = load_rows_of(own, line0 + n + 3, v0, r0, n + 3 < count, ROWS, F)
        own_ref, own_tot, own_acc = one
        at = (line0 + n) * F.PAD_M + rows
        tl.store(saved.ref + at, ref)
        tl.store(saved.tot + at, tot)
        tl.store(saved.acc + at[:, None] * F.PAD_V + (v0 + tl.arange(0, F.BLOCK_V))[None, :], acc)
        if F.DECAY:
            start, stop, _ = span_of(first + n, b, problem, table, F)
            ref, tot, fade = decayed(ref, tot, decay2, stop - start, F)
            acc *= fade[:, None]
        ref, tot, past, new = joined(ref, tot, own_ref, own_tot)
        acc = acc * past[:, None] + own_acc * new[:, None]
        one, two, three = two, three, four
    store_end_state(ends.L, ends.R, end_line, v0, r0, ref, tot, acc, ROWS, F)


def start_states(call: args.Inputs, stretches: args.Stretches) -> tuple[args.Saved, args.Ends]:
    """States at the start of every stretch, and at the end of every sequence."""
    stored, ends = slot_states(call, stretches, args.choose_config("states", call), 0)
    return stored.saved, ends


def slot_states(
    call: args.Inputs, stretches: args.Stretches, config: configs.Config, slot: int
) -> tuple[args.Stored, args.Ends]:
    """`start_states`, and what states at the start of every slot of `slot` tokens follow from."""
    F = args.features(call, config, SLOT=slot)
    parts, (batch, heads) = F.PAD_V // F.BLOCK_V, call.key.shape[:2]
    lines = batch * heads * stretches.count
    own, slots, joined = args.new_states(call, lines, F), None, None
    if slot:
        dtype = torch.bfloat16 if F.BFLOAT16 else torch.float32
        slots = args.new_states(call, lines * (stretches.span // slot), F, dtype)
        empty = slots.ref.new_empty(len(slots.ref), dtype=torch.int32)
        joined = args.Joined(*own.ref.new_empty(5, *slots.ref.shape), empty)
    saved = own._replace(ref=torch.empty_like(own.ref), tot=torch.empty_like(own.tot))
    ends = args.new_ends(call)
    problem = args.problem_of(call, stretches, parts)
    with on_device(call.query):
        states_kernel[(batch * heads * problem.groups * parts,)](
            call.key, call.value, strides(call.key), strides(call.value), call.marks, call.keep,
            own, slots, stretches.table, *problem, F, **config.options,
        )  # fmt: skip
        parts *= F.PAD_M // configs.SCAN_ROWS
        scan_kernel[(call.rows * heads * parts,)](
            own, saved, ends, call.marks, stretches.table, stretches.sequences,
            *problem._replace(parts=parts, groups=call.rows), configs.SCAN_ROWS, F,
            num_warps=max(1, F.BLOCK_V // 64),
        )  # fmt: skip
    return args.Stored(saved, own.ref, own.tot, slots, joined), ends
