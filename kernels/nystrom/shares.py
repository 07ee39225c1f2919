"""Shares of the parameter gradients, a place of its own to every program: no order matters."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import full, zeros


@triton.jit
def new_sums(F: tl.constexpr):
    """(dcore, dlk, dhalf, ddecay) of nothing yet."""
    dcore, dlk = 0.0, 0.0
    if F.TAKES_CORE:
        dcore = zeros(F.PAD_M, F.PAD_M)
    if F.TAKES_QUERIES:
        dlk = zeros(F.PAD_M, F.BLOCK_D)
    return dcore, dlk, full(F.PAD_M, 0.0), full(F.PAD_M, 0.0)


@triton.jit
def put_share(ptrs, x, F: tl.constexpr):
    """A share of a sum, to its place; that of the pieces comes on top of it."""
    if F.STEEP:
        x += tl.load(ptrs)
        tl.debug_barrier()  # several threads read an element that one of them overwrites
    tl.store(ptrs, x)


@triton.jit
def leads(part, F: tl.constexpr):
    """Is this the program for all that columns of queries and keys do not share out?"""
    first = True
    if F.BLOCKS_D > 1:
        first = part == 0
    return first


@triton.jit
def line_of(group, share, problem, F: tl.constexpr):
    """Line of a program's shares. Its own number where it has all columns: no register is held."""
    if F.SLICES == 1 and F.BLOCKS_D == 1:
        line = tl.cast(tl.program_id(0), tl.int64)
    else:
        line = tl.cast(share, tl.int64) * problem.groups + group
    return line


@triton.jit
def columns_ptrs(base, line, part, F: tl.constexpr):
    """Pointers to a program's columns of line `line` of (lines, PAD_M, columns)."""
    rows = line * F.PAD_M + tl.arange(0, F.PAD_M)
    cols = part * F.BLOCK_D + tl.arange(0, F.BLOCK_D)
    return base + rows[:, None] * (F.BLOCKS_D * F.BLOCK_D) + cols[None, :]


@triton.jit
def store_sums(partial, group, share, part, sums, problem, F: tl.constexpr):
    """This program's share of the parameter gradients, a place of its own; `share` counts pairs
    and slices of columns.
    """
    dcore, dlk, dhalf, ddecay = sums
    line = line_of(group, share, problem, F)
    offs_m = tl.arange(0, F.PAD_M)
    marks = line * F.PAD_M + offs_m
    if F.TAKES_CORE:
        if leads(part, F):
            put_share(partial.dcore + marks[:, None] * F.PAD_M + offs_m[None, :], dcore, F)
    if F.TAKES_QUERIES:
        put_share(columns_ptrs(partial.dlk, line, part, F), dlk, F)
        if leads(part, F):
            put_share(partial.dhalf + marks, dhalf, F)
            put_share(partial.ddecay + marks, ddecay, F)
