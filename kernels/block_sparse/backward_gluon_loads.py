"""Loads of the Gluon kernel of dK and dV: the tiles of queries of a group of heads that see a tile
of keys.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .gluon_loads import put
from .walk import masked_tile, next_tile, walk_queries


class Inputs(NamedTuple):
    """Descriptors of what a stage holds."""

    q: object
    dout: object
    lse: object
    delta: object


class Stages(NamedTuple):
    """Shared memory: STAGES buffers of each kind, and their barriers."""

    q: object
    dout: object
    lse: object
    delta: object
    residual: object  # of lse, where F.NATURAL
    head: object  # query head, where F.NATURAL or F.DROPOUT
    start: object  # mask row of the first query
    bits: object  # its row of tile_bits, negative where all of a tile is seen
    full: object
    empty: object


class Work(NamedTuple):
    """Work of one program: a tile of keys, and how many tiles of queries see it."""

    lists: object
    sizes: object
    modifiers: object
    pair: object
    start_n: object
    end_n: object
    n_full: object
    n_tiles: object
    offset: object  # mask row of the sample's first query


@gluon.jit
def walk_head(lists, sizes, b, head, start_n, offset, end_n, F: gl.constexpr):
    """`walk_queries` of one query head."""
    line = b * sizes.line_batch + head * sizes.line_head + start_n // F.BLOCK_KV
    return walk_queries(sizes, lists, line, start_n, offset, end_n, F)


@gluon.jit
def load_tile(inputs, stages, work, t, head, start, bits, F: gl.constexpr, STAGES: gl.constexpr):
    """Load the t-th tile of queries, from mask row `start` on. Before a sample's first query all is
    0, and so are dP, Delta and, but for a bias, dS.
    """
    stage = t % STAGES
    full = stages.full.index(stage)
    mbarrier.wait(stages.empty.index(stage), (t // STAGES & 1) ^ 1)
    put(stages.start.index(stage), start)
    put(stages.bits.index(stage), bits)
    if F.NATURAL or F.DROPOUT:
        put(stages.head.index(stage), head)
    rows: gl.constexpr = inputs.lse.block_type.nbytes
    tiles: gl.constexpr = inputs.q.block_type.nbytes + inputs.dout.block_type.nbytes
    PARTS: gl.constexpr = 2 if F.NATURAL else 1
    mbarrier.expect(full, tiles + (PARTS + 1) * rows)
    b = work.pair // work.sizes.heads
    pair = b * (work.sizes.heads * work.sizes.group) + head
    i = start - work.offset
    tma.async_copy_global_to_shared(inputs.q, [b, head, i, 0], full, stages.q.index(stage))
    tma.async_copy_global_to_shared(inputs.dout, [b, head, i, 0], full, stages.dout.index(stage))
    lse = inputs.lse
    tma.async_copy_global_to_shared(lse, [pair * PARTS, i], full, stages.lse.index(stage))
    if F.NATURAL:
        residual = stages.residual.index(stage)
        tma.async_copy_global_to_shared(lse, [pair * PARTS + 1, i], full, residual)
    tma.async_copy_global_to_shared(inputs.delta, [pair, i], full, stages.delta.index(stage))


@gluon.jit
def load_tiles(inputs, stages, work, F: gl.constexpr, STAGES: gl.constexpr):
    """Load the tiles of queries: the work of the loading warp."""
    lists, sizes = work.lists, work.sizes
    start_n, end_n = work.start_n, work.end_n
    b, hk = work.pair // sizes.heads, work.pair % sizes.heads
    t = 0
    for g in range(sizes.group):
        head = hk * sizes.group + g
        n_full, _, _, run, run_end, start, stop = walk_head(
            lists, sizes, b, head, start_n, work.offset, end_n, F
        )
        for _ in range(n_full):
            load_tile(inputs, stages, work, t, head, start, -1, F, STAGES)
            t += 1
            run, start, stop = next_tile(lists, run, run_end, start, stop, F.BLOCK_M, F.BLOCK_Q, F)
    for g in range(sizes.group):
        head = hk * sizes.group + g
        n_full, n_masked, first, _, _, full_start, _ = walk_head(
            lists, sizes, b, head, start_n, work.offset, end_n, F
        )
        for rest in range(n_masked):
            start, bits = masked_tile(
                lists, first, rest, full_start, n_full, F.BLOCK_M, F.BLOCK_Q, F
            )
            bits = bits * F.BLOCK_Q + start % F.BLOCK_Q
            load_tile(inputs, stages, work, t, head, start, bits, F, STAGES)
            t += 1
