"""Lines of tiles of the Hopper form of the forward kernel: those that a program computes, one after
the other, and each as one sequence of tiles, FULL ones first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .walk import load_run, query_tile, walk_keys


@triton.jit
def any_tile(lists, t, n_full, n_masked, first, full_start, F: tl.constexpr):
    """Start of the t-th tile of a line and its row of tile_bits, -1 when it is FULL.

    `full_start` is where the FULL tile starts that `next_tile` has come to.
    """
    if F.KIND == "sparse":
        split: tl.constexpr = F.BLOCK_KV // F.BLOCK_N
        rest = t - n_full
        partial = (rest >= 0) & (rest < n_masked)
        entry = lists.partials + 2 * (first + rest // split)
        block = tl.load(entry, mask=partial, other=0)
        start = tl.where(rest >= 0, block * F.BLOCK_KV + rest % split * F.BLOCK_N, full_start)
        bits = tl.load(entry + 1, mask=partial, other=-1)
    else:
        start = t * F.BLOCK_N
        bits = 0
    return start, bits


@triton.jit
def tiles_inside(lists, run, run_end, end_n, F: tl.constexpr):
    """The number of FULL tiles of a line, which come in order, that lie within a sample's keys."""
    inside = 0
    for r in range(run, run_end):
        start, stop = load_run(lists, r, True, F.BLOCK_KV)
        inside += tl.minimum(tl.maximum(end_n - start, 0), stop - start) // F.BLOCK_N
    return inside


@triton.jit
def lines_of_program(sizes):
    """The number of lines that this program computes: every program a line in turn."""
    total = sizes.pairs * sizes.tiles
    programs = tl.num_programs(0)
    whole = total // programs
    return whole + (dealt(whole, sizes) < total).to(tl.int32)


@triton.jit
def dealt(turn, sizes):
    """The line of this program's turn, heavy lines first; each other turn goes backwards, so that
    what a program has more in one it has less in the next.
    """
    programs, pid = tl.num_programs(0), tl.program_id(0)
    backwards = (turn & 1) == 1
    return turn * programs + tl.where(backwards, programs - 1 - pid, pid)


@triton.jit
def walk_line(index, offset, end_n, leading, sizes, lists, F: tl.constexpr):
    """(first mask row, FULL tiles, those that end before the sample's keys do, PARTIAL tiles, first
    PARTIAL entry, run, end of runs, start, stop) of the index-th tile of queries.
    """
    row0 = query_tile(sizes, lists, index, offset, leading, F) * F.BLOCK_M
    end_r = offset + sizes.q_len
    line = leading + tl.minimum(row0, end_r - 1) // F.BLOCK_Q
    n_full, n_masked, first, run, run_end, start, stop = walk_keys(
        sizes, lists, line, row0, end_n, F
    )
    n_inside = n_full
    if F.CLIP:
        n_inside = tiles_inside(lists, run, run_end, end_n, F)
    if row0 >= end_r:
        n_full, n_inside, n_masked = 0, 0, 0
    return row0, n_full, n_inside, n_masked, first, run, run_end, start, stop
