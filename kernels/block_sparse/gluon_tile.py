"""A line of tiles in the forward pass for Hopper, as one warpgroup computes it: the scores of the
next tile are in flight during the softmax of this one.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_keep import keep_bits, keep_weights, words_across
from .gluon_loads import ROWS, get
from .primitives import bias_base, keep_seen, log2_factor, logits, online_softmax, visible


class Work(NamedTuple):
    """A warpgroup's part of a line. What few tiles need is read there: registers are scarce."""

    problem: object
    queries: object
    slot: object  # of the line's integers
    first_row: object  # mask row of the warpgroup's first query
    falls: object  # shared memory for an entry of each warp, where F.SLACK


@gluon.jit
def issue_scores(q, rings, t, layout: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr):
    """S = Q K^T of tile t [ROWS, BLOCK_N], in flight."""
    stage = t % STAGES
    mbarrier.wait(rings.k_full.index(stage), (t // STAGES) & 1)
    # [BLOCK_N, PAD], in shared memory
    k = rings.k.index(stage).reshape([F.BLOCK_N, F.PAD])
    # [ROWS, BLOCK_N]
    zero = gl.full([ROWS, F.BLOCK_N], 0.0, gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def issue_output(p, acc, rings, t, F: gl.constexpr, STAGES: gl.constexpr):
    """O + P V of tile t [ROWS, PAD_V], in flight."""
    stage = t % STAGES
    mbarrier.wait(rings.v_full.index(stage), (t // STAGES) & 1)
    # [BLOCK_N, PAD_V], in shared memory
    v = rings.v.index(stage).reshape([F.BLOCK_N, F.PAD_V])
    return warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def query_offset(work, F: gl.constexpr):
    """Mask row of the sample's first query."""
    offset = 0
    if F.OFFSET:
        line = work.queries
        offset = get(line.row0.index(work.slot)) - get(line.start_i.index(work.slot))
    return offset


@gluon.jit
def finish_scores(s, t, rings, work, MASKED: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr):
    """The logits of tile t from its scores, -inf where a PARTIAL tile hides them."""
    sizes, modifiers, line = work.problem.sizes, work.problem.modifiers, work.queries
    n = get(rings.starts.index(t % (STAGES + 1)))
    # [1, BLOCK_N], [ROWS, 1]
    n2 = (n + gl.arange(0, F.BLOCK_N, gl.SliceLayout(0, s.type.layout)))[None, :]
    r2 = (work.first_row + gl.arange(0, ROWS, gl.SliceLayout(1, s.type.layout)))[:, None]
    offset = query_offset(work, F)
    pair = get(line.pair.index(work.slot))
    base = bias_base(modifiers, pair // sizes.heads, pair % sizes.heads, F)
    s, _ = logits(s, base, r2, n2, offset, sizes, modifiers, F)
    end_n = sizes.kv_len
    if F.LENGTHS:
        end_n = get(line.end_n.index(work.slot))
    if MASKED and F.KIND == "sparse":
        bits = get(rings.bits.index(t % (STAGES + 1)))
        s = keep_bits(s, work.problem.lists.bits, bits, n, work.first_row, end_n, float("-inf"), F)
    elif MASKED:
        seen = visible(None, 0, n, r2, n2, end_n, sizes, MASKED, F)
        s = keep_seen(seen, s, float("-inf"), MASKED, F)
    return s


@gluon.jit
def least(alpha, falls):
    """The least of a warpgroup's factors, from those of its warps in shared memory. A reduction
    over all rows would go through shared memory twice.
    """
    # [4]
    falls.store(gl.min(gl.reshape(alpha, [4, ROWS // 4]), 1))
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    return gl.min(falls.load(layout), 0)


@gluon.jit
def add_tile(
    s,
    acc,
    l_i,
    m_i,
    t,
    q,
    rings,
    work,
    MASKED: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Take the logits of tile t into the running sums; O + P V is in flight, and P must live."""
    safe: gl.constexpr = MASKED or F.BIAS != "none"
    factor = log2_factor(work.problem.modifiers, F)
    # weights [ROWS, BLOCK_N]; alpha, m_i, l_i [ROWS]
    weights, alpha, m_i, l_i = online_softmax(s, factor, m_i, l_i, safe, F.SLACK, F.NATURAL)
    if F.DROPOUT:
        n = get(rings.starts.index(t % (STAGES + 1)))
        first_i = work.first_row - query_offset(work, F)
        pair = get(work.queries.pair.index(work.slot))
        words = words_across(weights, first_i, n, pair, work.problem.modifiers, F)
        weights = keep_weights(words, weights, work.problem.modifiers)
    if F.SLACK == 0 or least(alpha, work.falls) < 1.0:
        acc = acc * rows_of(alpha, acc)[:, None]
    p = operand(weights, acc, q.dtype)
    return issue_output(p, acc, rings, t, F, STAGES), p, l_i, m_i


@gluon.jit
def step(
    s,
    acc,
    l_i,
    m_i,
    t,
    q,
    rings,
    work,
    MASKED: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Add the logits of tile t, not the last, while the scores of the next are computed, which it
    returns.
    """
    layout: gl.constexpr = s.type.layout
    # [ROWS, BLOCK_N]
    following = issue_scores(q, rings, t + 1, layout, F, STAGES)
    acc, p, l_i, m_i = add_tile(
        s, acc, l_i, m_i, t, q, rings, work, MASKED, F, STAGES
    )  # fmt: skip
    following, acc, p = warpgroup_mma_wait(0, [following, acc, p])
    mbarrier.arrive(rings.k_empty.index((t + 1) % STAGES), count=1)
    mbarrier.arrive(rings.v_empty.index(t % STAGES), count=1)
    return following, acc, l_i, m_i


@gluon.jit
def rows_of(vector, acc):
    """A vector over the rows of S as one over the rows of O."""
    return gl.convert_layout(vector, gl.SliceLayout(1, acc.type.layout))


@gluon.jit
def operand(weights, acc, dtype: gl.constexpr):
    """P as the left operand of P V, in registers."""
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, k_width=2)
    return gl.convert_layout(weights.to(dtype), layout)


@gluon.jit
def attend_line(
    w: gl.constexpr,
    queries,
    slot,
    rings,
    tile,
    problem,
    falls,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attention of a warpgroup's queries over the tiles of a line, which begins at the program's
    number `tile`: (output [ROWS, PAD_V], row sums, row maxima, number of tiles).
    """
    # [ROWS, PAD], in shared memory
    q = queries.tiles.index(w).reshape([ROWS, F.PAD])
    n_inside, n_tiles = get(queries.n_inside.index(slot)), get(queries.n_tiles.index(slot))
    first_row = get(queries.row0.index(slot)) + w * ROWS
    work = Work(problem, queries, slot, first_row, falls)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.PAD_V, 16])
    # [ROWS, PAD_V]
    acc = gl.full([ROWS, F.PAD_V], 0.0, gl.float32, o_layout)
    # [ROWS]
    m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    l_i = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
    if n_tiles > 0:
        # [ROWS, BLOCK_N]
        s = issue_scores(q, rings, tile, s_layout, F, STAGES)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(rings.k_empty.index(tile % STAGES), count=1)
        last = tile + n_tiles - 1
        # two at a time, so that the next scores end where the first were, and nothing is copied; a
        # FULL tile that is left has no bits and goes with the PARTIAL ones
        pairs_end = tile + gl.minimum(n_inside, n_tiles - 1) // 2 * 2
        for t in range(tile, pairs_end, 2):
            for more in gl.static_range(2):
                s = finish_scores(s, t + more, rings, work, False, F, STAGES)
                s, acc, l_i, m_i = step(
                    s, acc, l_i, m_i, t + more, q, rings, work, False, F, STAGES
                )  # fmt: skip
        # hiding copies the scores, so that the next can end where they were
        s = finish_scores(s, pairs_end, rings, work, True, F, STAGES)
        for t in range(pairs_end, last):
            s, acc, l_i, m_i = step(s, acc, l_i, m_i, t, q, rings, work, True, F, STAGES)
            s = finish_scores(s, t + 1, rings, work, True, F, STAGES)
        mbarrier.arrive(queries.empty.index(0), count=1)
        acc, p, l_i, m_i = add_tile(s, acc, l_i, m_i, last, q, rings, work, True, F, STAGES)
        acc, p = warpgroup_mma_wait(0, [acc, p])
        mbarrier.arrive(rings.v_empty.index(last % STAGES), count=1)
    else:
        mbarrier.arrive(queries.empty.index(0), count=1)
    return acc, l_i, m_i, n_tiles
