"""Turns of a program of the backward, on either side: the slots of its stretches, and whether any
score rises too far.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import span_of, uniform
from .states import slot_line


@triton.jit
def share_of(part, TAKES_COLUMNS: tl.constexpr, F: tl.constexpr):
    """(block of columns of queries and keys, slice of those of values) of a program. All blocks
    have a program of their own where it takes gradients of those columns.
    """
    block, piece = 0, 0
    if F.SLICES > 1:
        piece = part % F.SLICES
    if TAKES_COLUMNS and F.BLOCKS_D > 1:
        block = part // F.SLICES
    return block, piece


@triton.jit
def risen(rises, start, stop, line, slots, F: tl.constexpr):
    """Does any score of a stretch rise too far, by the notes of its slots from `line` on?"""
    MOST: tl.constexpr = 16
    found = False
    for n in range(0, slots, MOST):
        offs = n + tl.arange(0, MOST)
        ends = tl.minimum(start + (offs + 1) * F.SLOT, stop)
        noted = tl.load(rises + line + offs, mask=offs < slots, other=2**31 - 1)
        found = found | (tl.max((noted < ends).to(tl.int32), 0) > 0)
    return found


@triton.jit
def any_risen(rises, first, count, b, pair, problem, table, F: tl.constexpr):
    """Does any score of a program's stretches rise too far?"""
    found = False
    for stretch in range(first, first + count):
        start, stop, row = span_of(stretch, b, problem, table, F)
        line = slot_line(tl.cast(pair, tl.int64) * problem.stretches + stretch, 0, problem, F)
        slots = tl.cdiv(stop - start, F.SLOT)
        found = found | risen(rises, start, stop, line, slots, F)
    return found


@triton.jit
def turns_of(rises, group, b, pair, problem, table, F: tl.constexpr):
    """(slots of a stretch, first stretch, slots of all, is anything to do) of a program."""
    slots = tl.cdiv(problem.span, F.SLOT)  # of a stretch
    first = group * problem.units
    count = tl.minimum(problem.units, problem.stretches - first)
    turns, taken = count * slots, True
    if not F.PACKED:  # no slot behind the end
        turns = tl.minimum(turns, tl.cdiv(problem.tokens - first * problem.span, F.SLOT))
    if F.STEEP:
        taken = any_risen(rises, first, count, b, pair, problem, table, F)
        turns = uniform(tl.where(taken, turns, 0))
    return slots, first, turns, taken


@triton.jit
def turn_after(stretch, place, slots, STEP: tl.constexpr):
    """(stretch, number of the slot within it) of the next turn: one on, or one back."""
    place += STEP
    if STEP > 0:
        over = place == slots
        place = tl.where(over, 0, place)
    else:
        over = place < 0
        place = tl.where(over, slots - 1, place)
    return tl.where(over, stretch + STEP, stretch), place
