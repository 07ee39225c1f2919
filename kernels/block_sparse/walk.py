"""Place of a program in a launch, and the tiles that it walks: by the lists of a mask, or by
comparison.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(sizes):
    """`locate_at` of this program, the only one of its tile.

    One grid axis, because the others end at 65535.
    """
    return locate_at(tl.program_id(0), sizes)


@triton.jit
def locate_at(pid, sizes):
    """Index of a tile within its (batch, head) pair, and the number of the pair, from that of the
    tile in the launch.

    Indices are outermost within a section of pairs: its heavy tiles start first while its keys and
    values stay in the L2 cache.
    """
    per_section = sizes.tiles * sizes.section
    section = pid // per_section
    rest = pid - section * per_section
    first = section * sizes.section
    width = tl.minimum(sizes.section, sizes.pairs - first)
    return rest // width, first + rest % width


@triton.jit
def sample_bounds(sizes, modifiers, b, F: tl.constexpr):
    """Row of the mask of query 0, and the number of keys, of sample b."""
    offset = 0
    end_n = sizes.kv_len
    if F.OFFSET:
        offset = tl.load(modifiers.offsets + b * modifiers.offset_stride)
    if F.LENGTHS:
        end_n = tl.minimum(end_n, tl.load(modifiers.lengths + b))
    return offset, end_n


@triton.jit
def query_tile(sizes, lists, index, offset, leading, F: tl.constexpr):
    """The tile of mask rows of a program's index, heavy ones first where they are known."""
    split: tl.constexpr = F.BLOCK_Q // F.BLOCK_M
    if F.OFFSET:
        tile = offset // F.BLOCK_M + index
    elif F.KIND == "sparse":
        tile = tl.load(lists.order + leading + index // split) * split + index % split
    elif F.KIND == "causal":
        tile = sizes.tiles - 1 - index
    else:
        tile = index
    return tile


@triton.jit
def place(sizes, lists, modifiers, F: tl.constexpr):
    """Work of a program with a tile of queries: (pair, sample, head, mask row of query 0, number
    of keys, first line of the pair, first mask row of the tile).
    """
    index, pair = locate(sizes)
    b, h = pair // sizes.heads, pair % sizes.heads
    offset, end_n = sample_bounds(sizes, modifiers, b, F)
    leading = b * sizes.line_batch + h * sizes.line_head
    row0 = query_tile(sizes, lists, index, offset, leading, F) * F.BLOCK_M
    return pair, b, h, offset, end_n, leading, row0


@triton.jit
def load_run(lists, run, exists, BLOCK: tl.constexpr):
    """Start and stop of a run, in elements."""
    start = tl.load(lists.runs + 2 * run, mask=exists, other=0) * BLOCK
    return start, start + tl.load(lists.runs + 2 * run + 1, mask=exists, other=0) * BLOCK


@triton.jit
def sparse_line(lists, line, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Entries of a line: (FULL tiles, PARTIAL tiles, first PARTIAL entry, run, end of runs, start,
    stop).
    """
    split: tl.constexpr = BLOCK // STEP
    entry = tl.load(lists.partial_offsets + line)
    n_partial = tl.load(lists.partial_offsets + line + 1) - entry
    n_full = tl.load(lists.counts + line) - n_partial
    run = tl.load(lists.run_offsets + line)
    run_end = tl.load(lists.run_offsets + line + 1)
    start, stop = load_run(lists, run, run < run_end, BLOCK)
    return n_full * split, n_partial * split, entry, run, run_end, start, stop


@triton.jit
def next_tile(
    lists, run, run_end, start, stop, STEP: tl.constexpr, BLOCK: tl.constexpr, F: tl.constexpr
):
    """Step to the next FULL tile, and into the next run when this one is used up.

    One flat loop over all runs, so that the software pipeline does not drain between short ones.
    """
    start += STEP
    if F.KIND == "sparse":
        jump = start >= stop
        run += jump.to(tl.int32)
        fresh_start, fresh_stop = load_run(lists, run, jump & (run < run_end), BLOCK)
        start = tl.where(jump, fresh_start, start)
        stop = tl.where(jump, fresh_stop, stop)
    return run, start, stop


@triton.jit
def masked_tile(
    lists,
    first,
    t,
    full_start,
    n_full,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Start of the t-th tile that needs masking, and its row of tile_bits."""
    if F.KIND == "sparse":
        split: tl.constexpr = BLOCK // STEP
        entry = lists.partials + 2 * (first + t // split)
        start = tl.load(entry) * BLOCK + (t % split) * STEP
        bits = tl.load(entry + 1)
    else:  # masked tiles lie on both sides of the full ones
        start = first + t * STEP
        start += tl.where(start >= full_start, n_full * STEP, 0)
        bits = 0
    return start, bits


@triton.jit
def walk_keys(sizes, lists, line, row0, end_n, F: tl.constexpr):
    """The key tiles that a tile of queries visits: `sparse_line`, or the same by comparison."""
    if F.KIND == "sparse":
        n_full, n_masked, first, run, run_end, start, stop = sparse_line(
            lists, line, F.BLOCK_N, F.BLOCK_KV
        )
    else:
        seen_by_all = end_n
        seen_by_any = end_n
        if F.KIND == "causal":
            shift = sizes.kv_len - sizes.rows
            seen_by_all = tl.maximum(tl.minimum(row0 + shift + 1, end_n), 0)
            seen_by_any = tl.maximum(tl.minimum(row0 + shift + F.BLOCK_M, end_n), 0)
        n_full = seen_by_all // F.BLOCK_N
        n_masked = tl.cdiv(seen_by_any, F.BLOCK_N) - n_full
        first, run, run_end, start, stop = 0, 0, 0, 0, 0
    return n_full, n_masked, first, run, run_end, start, stop


@triton.jit
def walk_queries(sizes, lists, line, start_n, offset, end_n, F: tl.constexpr):
    """The tiles of mask rows that a tile of keys is visited by: `sparse_line`, or the same by
    comparison.
    """
    if F.KIND == "sparse":
        n_full, n_masked, first, run, run_end, start, stop = sparse_line(
            lists, line, F.BLOCK_M, F.BLOCK_Q
        )
    else:
        low = offset
        all_see = offset
        end_r = offset + sizes.q_len
        if F.KIND == "causal":
            shift = sizes.kv_len - sizes.rows
            low = tl.maximum(low, start_n - shift)
            all_see = tl.maximum(all_see, start_n + F.BLOCK_N - 1 - shift)
        low = low // F.BLOCK_M
        all_see = tl.cdiv(all_see, F.BLOCK_M)
        n_full = tl.maximum(end_r // F.BLOCK_M - all_see, 0)
        n_full = tl.where(start_n + F.BLOCK_N > end_n, 0, n_full)  # ragged keys: mask them all
        n_masked = tl.maximum(tl.cdiv(end_r, F.BLOCK_M) - low, 0) - n_full
        first, run, run_end, start, stop = low * F.BLOCK_M, 0, 0, all_see * F.BLOCK_M, 0
    n_full = tl.where(start_n < end_n, n_full, 0)
    n_masked = tl.where(start_n < end_n, n_masked, 0)
    return n_full, n_masked, first, run, run_end, start, stop
