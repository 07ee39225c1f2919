"""dQ for Hopper in Gluon: one warp loads tiles of keys and values through TMA, and warpgroups of 64
queries each compute.

The ring is that of dK and dV, with K, V and their place in the mask in a stage. While a warpgroup
computes P, its dP is in flight; during dS, S of the next tile, which ends where this one's was.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .arguments import LaunchSizes
from .backward_gluon_bias import add_bias_gradient, load_bias
from .backward_gluon_bits import keep_across, words_of_queries
from .backward_gluon_tile import hold, operands_of
from .forward_gluon import LOADER_REGISTERS, REGISTERS
from .gluon_keep import keep_bits, keep_weights, words_across
from .gluon_loads import ROWS, barriers, buffers, get, integers, load_clipped, put
from .gluon_tile import operand
from .line import any_tile, walk_line
from .primitives import capped, keep_seen, padded_rows, probabilities, visible
from .walk import locate, next_tile, sample_bounds


class Stages(NamedTuple):
    """Shared memory: STAGES buffers of each kind, and their barriers."""

    k: object
    v: object
    start: object  # first key
    bits: object  # row of tile_bits, -1 where all of a tile is seen
    full: object
    empty: object
    clipped: object  # barrier of a copy that reaches beyond a sample's keys


class Rows(NamedTuple):
    """Pointers to what a query has one of, and to dQ, contiguous, with its factor."""

    lse: object
    delta: object
    dq: object
    scale: object


class Queries(NamedTuple):
    """Queries of a warpgroup: tiles in shared memory, and vectors [ROWS, 1]."""

    q: object
    dout: object
    lse: object
    residual: object
    delta: object
    first_row: object  # mask row of the first


class Line(NamedTuple):
    """The tiles of a line, FULL ones first."""

    n_full: object
    n_inside: object  # FULL tiles that end before the sample's keys do
    n_masked: object
    first: object
    run: object
    run_end: object
    start: object
    stop: object


class Work(NamedTuple):
    """Work of one program."""

    lists: object
    line: object
    sizes: object
    modifiers: object
    pair: object
    b: object
    h: object
    row0: object  # mask row of the first query
    offset: object  # of the sample's first query
    end_n: object
    bias_gradient: object


@gluon.jit
def load_tile(
    k_desc, v_desc, stages, work, t, start, bits, clips, F: gl.constexpr, STAGES: gl.constexpr
):
    """Load the t-th tile of keys and values, from key `start` on."""
    stage = t % STAGES
    full = stages.full.index(stage)
    mbarrier.wait(stages.empty.index(stage), (t // STAGES & 1) ^ 1)
    put(stages.start.index(stage), start)
    put(stages.bits.index(stage), bits)
    b, hk = work.b, work.h // work.sizes.group
    k = stages.k.index(stage)
    if F.LENGTHS and start + F.BLOCK_N > work.end_n:  # their dS is 0
        load_clipped(
            k_desc, k, stages.clipped.index(0), b, hk, start, work.end_n, clips & 1, F
        )  # fmt: skip
        clips += 1
        mbarrier.expect(full, v_desc.block_type.nbytes)
    else:
        mbarrier.expect(full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [b, hk, start, 0], full, k)
    tma.async_copy_global_to_shared(v_desc, [b, hk, start, 0], full, stages.v.index(stage))
    return clips


@gluon.jit
def load_tiles(k_desc, v_desc, stages, work, F: gl.constexpr, STAGES: gl.constexpr):
    """Load the tiles of keys and values: the work of the loading warp."""
    lists, line = work.lists, work.line
    run, start, stop = line.run, line.start, line.stop
    clips = 0
    for t in range(line.n_full + line.n_masked):
        n, bits = any_tile(lists, t, line.n_full, line.n_masked, line.first, start, F)
        clips = load_tile(k_desc, v_desc, stages, work, t, n, bits, clips, F, STAGES)
        run, start, stop = next_tile(
            lists, run, line.run_end, start, stop, F.BLOCK_N, F.BLOCK_KV, F
        )


@gluon.jit
def keys_of(stages, stage, F: gl.constexpr):
    """K [BLOCK_N, PAD] and V [BLOCK_N, PAD_V] in shared memory."""
    k = stages.k.index(stage).reshape([F.BLOCK_N, F.PAD])
    return k, stages.v.index(stage).reshape([F.BLOCK_N, F.PAD_V])


@gluon.jit
def hide(ds, start, bits, first_row, work, F: gl.constexpr):
    """The elements of dS [ROWS, BLOCK_N] in float32 whose keys are seen, else 0."""
    if F.KIND == "sparse":
        ds = keep_bits(ds, work.lists.bits, bits, start, first_row, work.end_n, 0.0, F)
    else:
        layout: gl.constexpr = ds.type.layout
        # [ROWS, 1], [1, BLOCK_N]
        r2 = (first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout)))[:, None]
        n2 = (start + gl.arange(0, F.BLOCK_N, gl.SliceLayout(0, layout)))[None, :]
        seen = visible(None, 0, start, r2, n2, work.end_n, work.sizes, True, F)
        ds = keep_seen(seen, ds, 0.0, True, F)
    return ds


@gluon.jit
def issue_scores(q, stages, t, layout: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr):
    """S = Q K^T of tile t [ROWS, BLOCK_N], in flight."""
    stage = t % STAGES
    mbarrier.wait(stages.full.index(stage), (t // STAGES) & 1)
    k, _ = keys_of(stages, stage, F)
    zero = gl.full([ROWS, F.BLOCK_N], 0.0, gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def issue_weights(dout, stages, t, layout: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr):
    """dP = dO V^T of tile t [ROWS, BLOCK_N], in flight."""
    _, v = keys_of(stages, t % STAGES, F)
    zero = gl.full([ROWS, F.BLOCK_N], 0.0, gl.float32, layout)
    return warpgroup_mma(dout, v.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def add_keys(
    s,
    dq,
    t,
    queries,
    stages,
    work,
    MORE: gl.constexpr,
    MASKED: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Add tile t, whose scores are s, to dQ [ROWS, PAD]; (dQ, scores of the next tile if MORE)."""
    stage = t % STAGES
    layout: gl.constexpr = s.type.layout
    k, _ = keys_of(stages, stage, F)
    # [ROWS, BLOCK_N]
    dp = issue_weights(queries.dout, stages, t, layout, F, STAGES)
    if MASKED or F.NATURAL or F.DROPOUT:
        start, first_row = get(stages.start.index(stage)), queries.first_row
    if MASKED:
        bits = get(stages.bits.index(stage))
    if MASKED and not F.NATURAL:
        word = words_of_queries(
            s, work.lists, start, bits, first_row, work.end_n, work.sizes, not MORE, F
        )  # fmt: skip
    p, slope = capped(s, work.modifiers, F)
    if F.NATURAL:
        p += load_bias(s, work.b, work.h, first_row, start, work.offset, work, False, MASKED, F)
    p = probabilities(p, queries.lse, queries.residual, work.modifiers, F)
    if F.SOFTCAP and not F.NATURAL:
        p = p * slope
    if MORE:
        s = issue_scores(queries.q, stages, t + 1, layout, F, STAGES)
    if F.DROPOUT:
        words = words_across(p, first_row - work.offset, start, work.pair, work.modifiers, F)
    dp = warpgroup_mma_wait(1 if MORE else 0, [dp])
    if F.DROPOUT:
        dp = keep_weights(words, dp, work.modifiers) * work.modifiers.keep_scale
    ds = p * (dp - queries.delta)
    if F.NATURAL:
        if MASKED:
            ds = hide(ds, start, bits, first_row, work, F)
        add_bias_gradient(
            ds, work.b, work.h, first_row, start, work.offset, work.bias_gradient, work.sizes, F
        )  # fmt: skip
        if F.SOFTCAP:
            ds = ds * slope
    ds = ds.to(k.dtype)
    if MASKED and not F.NATURAL:
        ds = keep_across(ds, word)
    ds = operand(ds, dq, k.dtype)
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    if MORE:
        s, dq, ds = warpgroup_mma_wait(0, [s, dq, ds])
        mbarrier.arrive(stages.empty.index(stage), count=1)
    else:
        dq, ds = warpgroup_mma_wait(0, [dq, ds])
    return dq, s


@gluon.jit
def compute(
    w: gl.constexpr,
    held,
    stages,
    work,
    rows,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Compute rows ROWS * w .. ROWS * (w + 1) - 1 of the tile: the work of one warpgroup."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.BLOCK_N, 16])
    q_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.PAD, 16])
    # [ROWS, PAD]
    dq = gl.full([ROWS, F.PAD], 0.0, gl.float32, q_layout)
    line, sizes = work.line, work.sizes
    first_row = work.row0 + w * ROWS
    # [ROWS]
    i = first_row - work.offset + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    here = (i >= 0) & (i < sizes.q_len)
    padded = gl.cast(work.pair, gl.int64) * padded_rows(sizes.q_len)
    PARTS: gl.constexpr = 2 if F.NATURAL else 1
    lse_ptr = rows.lse + PARTS * padded
    # [ROWS, 1]
    lse = gl.load(lse_ptr + i, mask=here, other=float("inf"))[:, None]
    residual = lse
    if F.NATURAL:
        residual = gl.load(lse_ptr + padded_rows(sizes.q_len) + i, mask=here, other=0.0)[:, None]
    delta = gl.load(rows.delta + (padded + i), mask=here, other=0.0)[:, None]
    # [ROWS, PAD], [ROWS, PAD_V], in shared memory
    q, dout = operands_of(held, w, F)
    queries = Queries(q, dout, lse, residual, delta, first_row)
    n_tiles = line.n_full + line.n_masked
    if n_tiles > 0:
        # [ROWS, BLOCK_N]
        s = issue_scores(q, stages, 0, s_layout, F, STAGES)
        s = warpgroup_mma_wait(0, [s])
        last = n_tiles - 1
        n_full = gl.minimum(line.n_inside, last)
        for t in range(n_full):
            dq, s = add_keys(s, dq, t, queries, stages, work, True, False, F, STAGES)
        # a FULL tile that is left has no bits and goes with the PARTIAL ones
        for t in range(n_full, last):
            dq, s = add_keys(s, dq, t, queries, stages, work, True, True, F, STAGES)
        dq, s = add_keys(s, dq, last, queries, stages, work, False, True, F, STAGES)

    i = first_row - work.offset + gl.arange(0, ROWS, gl.SliceLayout(1, q_layout))
    d = gl.arange(0, F.PAD, gl.SliceLayout(0, q_layout))
    row = gl.cast(work.pair, gl.int64) * sizes.q_len + i
    gl.store(
        rows.dq + row[:, None] * F.DIM + d[None, :],
        (dq * rows.scale).to(rows.dq.dtype.element_ty),
        mask=((i >= 0) & (i < sizes.q_len))[:, None] & (d < F.DIM)[None, :],
    )


@gluon.jit(do_not_specialize=LaunchSizes._fields)
def backward_q_gluon_kernel(
    q_desc,
    dout_desc,
    k_desc,
    v_desc,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    bias_gradient,
    lists,
    modifiers,
    scale,
    pairs,
    heads,
    group,
    q_len,
    kv_len,
    rows,
    line_batch,
    line_head,
    tiles,
    section,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    sizes = LaunchSizes(
        pairs, heads, group, q_len, kv_len, rows, line_batch, line_head, tiles, section
    )
    index, pair = locate(sizes)
    b, h = pair // sizes.heads, pair % sizes.heads
    offset, end_n = sample_bounds(sizes, modifiers, b, F)
    leading = b * sizes.line_batch + h * sizes.line_head
    row0, n_full, n_inside, n_masked, first, run, run_end, start, stop = walk_line(
        index, offset, end_n, leading, sizes, lists, F
    )
    if row0 >= offset + sizes.q_len:
        return
    if F.NATURAL:  # rows that do not exist have no bias
        end_r = gl.minimum(offset + sizes.q_len, sizes.rows)
        n_inside = gl.where((row0 >= offset) & (row0 + F.BLOCK_M <= end_r), n_inside, 0)
    line = Line(n_full, n_inside, n_masked, first, run, run_end, start, stop)
    work = Work(lists, line, sizes, modifiers, pair, b, h, row0, offset, end_n, bias_gradient)
    per_row = Rows(lse_ptr, delta_ptr, dq_ptr, scale)

    WARPGROUPS: gl.constexpr = F.BLOCK_M // ROWS
    stages = Stages(
        buffers(k_desc, STAGES),
        buffers(v_desc, STAGES),
        integers(STAGES),
        integers(STAGES),
        barriers(STAGES, 1),
        barriers(STAGES, WARPGROUPS),
        barriers(1, 1),
    )
    held = hold(q_desc, dout_desc, b, h, row0 - offset, WARPGROUPS)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (compute, (0, held, stages, work, per_row, F, STAGES)),
                (compute, (1, held, stages, work, per_row, F, STAGES)),
                (load_tiles, (k_desc, v_desc, stages, work, F, STAGES)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (compute, (0, held, stages, work, per_row, F, STAGES)),
                (load_tiles, (k_desc, v_desc, stages, work, F, STAGES)),
            ],
            [1],
            [LOADER_REGISTERS],
        )
