"""States at the start of each slot, and reverse states at its end, from what is stored of them.

A stretch is cut into slots of SLOT tokens. The state before a slot is that at the stretch's start
and what the stretch holds by itself so far, joined; the reverse state after it is what the rest of
the stretch adds by itself, and that at the stretch's end. All numbers a landmark that this takes
are computed once, by a kernel of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse.arguments import on_device
from . import arguments as args
from .arguments import Problem
from .primitives import locate, span_of, state_ptrs, vector_ptrs
from .reading import load_decay
from .states import decayed, joined

SLOTS = 8  # that a program of `join_slots_kernel` takes


@triton.jit(do_not_specialize=Problem._fields)
def join_slots_kernel(
    stored,
    reverse,
    marks,
    table,
    heads,
    parts,
    groups,
    stretches,
    units,
    span,
    tokens,
    ROWS: tl.constexpr,
    F: tl.constexpr,
):
    """From totals at the start of each stretch, and what it holds by itself up to each slot, to
    those of `stored.joined`, and the ratios of `reverse`: ROWS slots of a stretch.
    """
    problem = Problem(heads, parts, groups, stretches, units, span, tokens)
    part, stretch, pair = locate(problem)
    start, stop, _ = span_of(stretch, pair // problem.heads, problem, table, F)
    decay2 = load_decay(marks, pair % problem.heads, F)
    line = tl.cast(pair, tl.int64) * problem.stretches + stretch
    slot = part * ROWS + tl.arange(0, ROWS)
    # [ROWS, 1]: tokens of the stretch before a slot, and up to its end
    before = (slot * F.SLOT)[:, None]
    length = stop - start
    there = before < length
    until = tl.minimum(before + F.SLOT, length)
    if F.DECAY:
        decay2 = decay2[None, :]
    # [1, PAD_M]
    offs_m = tl.arange(0, F.PAD_M)[None, :]
    at = line * F.PAD_M + offs_m
    ref, tot = tl.load(stored.saved.ref + at), tl.load(stored.saved.tot + at)
    own_ref, own_tot = tl.load(stored.ref + at), tl.load(stored.tot + at)
    last_ref, last_tot, past, new = joined_later(ref, tot, own_ref, own_tot, decay2, length, F)
    if part == 0:
        left = share_left(ref, tot, last_ref, last_tot, decay2, length, F)
        tl.store(reverse.ratio + at, left, mask=length > 0)
    # [ROWS, PAD_M]
    lines = (line * tl.cdiv(problem.span, F.SLOT) + slot)[:, None] * F.PAD_M + offs_m
    some_ref = tl.load(stored.slots.ref + lines, mask=there, other=0.0)
    some_tot = tl.load(stored.slots.tot + lines, mask=there, other=0.0)
    inner = until < length
    next_ref = tl.load(stored.slots.ref + lines + F.PAD_M, mask=inner, other=0.0)
    next_tot = tl.load(stored.slots.tot + lines + F.PAD_M, mask=inner, other=0.0)
    next_ref, next_tot = tl.where(inner, next_ref, own_ref), tl.where(inner, next_tot, own_tot)
    next_ref, next_tot, past, new = joined_later(ref, tot, next_ref, next_tot, decay2, until, F)
    left = share_left(next_ref, next_tot, last_ref, last_tot, decay2, length - until, F)
    tl.store(reverse.slots.ratio + lines, tl.where(inner, left, 1.0), mask=there)
    ref, tot, past, new = joined_later(ref, tot, some_ref, some_tot, decay2, before, F)
    left = share_left(ref, tot, next_ref, next_tot, decay2, until - before, F)
    tl.store(stored.joined.ref + lines, ref, mask=there)
    tl.store(stored.joined.tot + lines, tot, mask=there)
    tl.store(stored.joined.past + lines, past, mask=there)
    tl.store(stored.joined.new + lines, new, mask=there)
    tl.store(stored.joined.left + lines, left, mask=there)
    # [ROWS]
    empty = (tl.min(tot, 1) == 0.0).to(tl.int32)
    first = line * tl.cdiv(problem.span, F.SLOT)
    tl.store(stored.joined.empty + first + slot, empty, mask=slot * F.SLOT < length)


@triton.jit
def joined_later(ref, tot, own_ref, own_tot, decay2, tokens, F: tl.constexpr):
    """`joined` of a state so many tokens later and another; the factors of what each holds."""
    ref, tot, fade = decayed(ref, tot, decay2, tokens, F)
    ref, tot, past, new = joined(ref, tot, own_ref, own_tot)
    return ref, tot, past * fade, new


@triton.jit
def share_left(ref, tot, end_ref, end_tot, decay2, tokens, F: tl.constexpr):
    """e^{L - L_end}: the part of the total `tokens` later that is this one's; 0 of nothing."""
    ref, tot, fade = decayed(ref, tot, decay2, tokens, F)
    part = tl.exp2(ref - end_ref) * tot / end_tot
    return tl.where(tot == 0.0, 0.0, part)


def join_slots(
    call: args.Inputs, stored: args.Stored, reverse, stretches: args.Stretches, F: args.Features
) -> None:
    """Write `stored.joined` and the ratios of `reverse`."""
    parts = triton.cdiv(stretches.span, F.SLOT * SLOTS)
    problem = args.problem_of(call, stretches, parts)
    pairs = call.key.shape[0] * problem.heads
    with on_device(call.query):
        join_slots_kernel[(pairs * problem.groups * parts,)](
            stored, reverse, call.marks, stretches.table, *problem, SLOTS, F
        )


@triton.jit
def start_of_slot(stored, slot, F: tl.constexpr):
    """(ref, tot) before a slot."""
    ref, tot = vector_ptrs(stored.joined.ref, slot, F), vector_ptrs(stored.joined.tot, slot, F)
    return tl.load(ref), tl.load(tot)


@triton.jit
def is_empty(place):
    """Does any landmark hold nothing at the start of a slot?"""
    stored, reverse, rises, line, slot, v0, piece = place
    return tl.load(stored.joined.empty + slot) != 0


@triton.jit
def load_held(place, F: tl.constexpr):
    """BLOCK_V columns of `acc` before a slot, [PAD_M, BLOCK_V]."""
    stored, reverse, rises, line, slot, v0, piece = place
    past = tl.load(vector_ptrs(stored.joined.past, slot, F))
    new = tl.load(vector_ptrs(stored.joined.new, slot, F))
    acc = tl.load(state_ptrs(stored.saved.acc, line, v0, F)) * past[:, None]
    own = tl.load(state_ptrs(stored.slots.acc, slot, v0, F)).to(tl.float32)
    return acc + own * new[:, None]


@triton.jit
def end_of_slot(place, F: tl.constexpr, AGAIN: tl.constexpr = False):
    """(G, pull) after a slot: BLOCK_V columns, [PAD_M, BLOCK_V], of which `piece` is the number.

    AGAIN where they are loaded once more, and must not stay in registers till then.
    """
    stored, reverse, rises, line, slot, v0, piece = place
    ratio = tl.load(vector_ptrs(reverse.slots.ratio, slot, F))
    pull = tl.load(vector_ptrs(reverse.slots.pull, slot * F.SLICES + piece, F))
    pull += tl.load(vector_ptrs(reverse.pull, line * F.SLICES + piece, F)) * ratio
    MODIFIER: tl.constexpr = ".ca" if AGAIN else ""  # the default, by another name
    G = tl.load(state_ptrs(reverse.slots.G, slot, v0, F), cache_modifier=MODIFIER).to(tl.float32)
    G += tl.load(state_ptrs(reverse.G, line, v0, F), cache_modifier=MODIFIER) * ratio[:, None]
    return G, pull
