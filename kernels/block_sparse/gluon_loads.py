"""Loads of the forward pass for Hopper: rings of tiles in shared memory, which a warp of their own
fills through TMA. forward_gluon.py says how they are used, and why that cannot deadlock.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .line import any_tile, dealt, lines_of_program, walk_line
from .walk import locate_at, next_tile, sample_bounds

ROWS = gl.constexpr(64)  # of a warpgroup


class Rings(NamedTuple):
    """Shared memory: STAGES buffers for K and for V, the barriers of each, and STAGES + 1
    entries of the mask's lists.
    """

    k: object
    v: object
    k_full: object
    k_empty: object
    v_full: object
    v_empty: object
    starts: object  # first key of a tile
    bits: object  # its row of tile_bits
    clipped: object  # barrier of a copy that reaches beyond a sample's keys


class Queries(NamedTuple):
    """Shared memory: the tile of queries of a line, its barriers, and integers of two lines in
    turn: a warpgroup may read those of a line until it has released the next queries.
    """

    tiles: object
    full: object
    empty: object
    pair: object
    start_i: object  # first query
    row0: object  # its mask row
    end_n: object  # keys of the sample
    n_inside: object  # FULL tiles among them
    n_tiles: object


class Problem(NamedTuple):
    """A call, to those who compute it."""

    lists: object
    sizes: object
    modifiers: object


@gluon.jit
def put(buffer, value):
    """Store an integer in shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    buffer.store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def get(buffer):
    """Load an integer from shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(buffer.load(layout), 0)


@gluon.jit
def load_lines(
    q_desc, k_desc, v_desc, queries, rings, problem, F: gl.constexpr, STAGES: gl.constexpr
):
    """Load the queries, keys and values of all lines: the work of the loading warp."""
    sizes, lists = problem.sizes, problem.lists
    tile, clips = 0, 0
    for turn in range(lines_of_program(sizes)):
        index, pair = locate_at(dealt(turn, sizes), sizes)
        b, h = pair // sizes.heads, pair % sizes.heads
        offset, end_n = sample_bounds(sizes, problem.modifiers, b, F)
        leading = b * sizes.line_batch + h * sizes.line_head
        row0, n_full, n_inside, n_masked, first, run, run_end, start, stop = walk_line(
            index, offset, end_n, leading, sizes, lists, F
        )
        n_tiles = n_full + n_masked
        mbarrier.wait(queries.empty.index(0), (turn & 1) ^ 1)
        slot = turn & 1
        put(queries.pair.index(slot), pair)
        put(queries.start_i.index(slot), row0 - offset)
        put(queries.row0.index(slot), row0)
        put(queries.end_n.index(slot), end_n)
        put(queries.n_inside.index(slot), n_inside)
        put(queries.n_tiles.index(slot), n_tiles)
        WARPGROUPS: gl.constexpr = F.BLOCK_M // ROWS
        full = queries.full.index(0)
        mbarrier.expect(full, WARPGROUPS * q_desc.block_type.nbytes)
        for w in gl.static_range(WARPGROUPS):
            tma.async_copy_global_to_shared(
                q_desc, [b, h, row0 - offset + w * ROWS, 0], full, queries.tiles.index(w)
            )
        hk = h // sizes.group
        for t in range(n_tiles):
            n, bits = any_tile(lists, t, n_full, n_masked, first, start, F)
            clips = load_tile(
                k_desc, v_desc, rings, tile + t, b, hk, n, bits, end_n, clips, F, STAGES
            )
            run, start, stop = next_tile(lists, run, run_end, start, stop, F.BLOCK_N, F.BLOCK_KV, F)
        tile += n_tiles


@gluon.jit
def load_tile(
    k_desc,
    v_desc,
    rings,
    t,
    b,
    hk,
    n,
    bits,
    end_n,
    clips,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load keys and values n .. n + BLOCK_N as tile t of the program."""
    stage = t % STAGES
    parity = (t // STAGES) & 1 ^ 1
    mbarrier.wait(rings.k_empty.index(stage), parity)
    # the entry in its place was read before V of tile t - STAGES - 1 was released
    put(rings.starts.index(t % (STAGES + 1)), n)
    if F.KIND == "sparse":
        put(rings.bits.index(t % (STAGES + 1)), bits)
    mbarrier.expect(rings.k_full.index(stage), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(
        k_desc, [b, hk, n, 0], rings.k_full.index(stage), rings.k.index(stage)
    )
    mbarrier.wait(rings.v_empty.index(stage), parity)
    if F.LENGTHS and n + F.BLOCK_N > end_n:
        load_clipped(
            v_desc, rings.v.index(stage), rings.clipped.index(0), b, hk, n, end_n, clips & 1, F
        )
        mbarrier.arrive(rings.v_full.index(stage), count=1)
        clips += 1
    else:
        mbarrier.expect(rings.v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v_desc, [b, hk, n, 0], rings.v_full.index(stage), rings.v.index(stage)
        )
    return clips


@gluon.jit
def load_clipped(desc, buffer, barrier, b, hk, n, end_n, parity, F: gl.constexpr):
    """Load a tile of keys or values, and make those beyond a sample's keys 0: they may be anything,
    and a weight of 0 leaves a NaN.
    """
    mbarrier.expect(barrier, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [b, hk, n, 0], barrier, buffer)
    mbarrier.wait(barrier, parity)
    WIDTH: gl.constexpr = desc.block_shape[3]
    BLOCK_N: gl.constexpr = F.BLOCK_N
    # [BLOCK_N, WIDTH], in shared memory
    tile = buffer.reshape([BLOCK_N, WIDTH])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 1], [1, 0])
    rows = gl.arange(0, 8, gl.SliceLayout(1, layout))
    for first in gl.static_range(0, BLOCK_N, 8):
        if n + first + 8 > end_n:
            part = tile.slice(first, 8)
            inside = n + first + rows < end_n
            part.store(gl.where(inside[:, None], part.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def barriers(SIZE: gl.constexpr, ARRIVALS: gl.constexpr):
    """SIZE barriers that complete when as many have arrived."""
    made = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(SIZE):
        mbarrier.init(made.index(n), count=ARRIVALS)
    return made


@gluon.jit
def buffers(desc, SIZE: gl.constexpr):
    """SIZE buffers for the blocks of a descriptor."""
    return gl.allocate_shared_memory(desc.dtype, [SIZE] + desc.block_shape, desc.layout)


@gluon.jit
def integers(SIZE: gl.constexpr):
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [SIZE, 1], layout)


@gluon.jit
def make_rings(k_desc, v_desc, USERS: gl.constexpr, STAGES: gl.constexpr):
    """Rings whose stages are empty when USERS have released them."""
    return Rings(
        buffers(k_desc, STAGES),
        buffers(v_desc, STAGES),
        barriers(STAGES, 1),
        barriers(STAGES, USERS),
        barriers(STAGES, 1),
        barriers(STAGES, USERS),
        integers(STAGES + 1),
        integers(STAGES + 1),
        barriers(1, 1),
    )


@gluon.jit
def make_queries(q_desc, USERS: gl.constexpr):
    """Room for a tile of queries, which is empty when USERS have released it."""
    tiles = buffers(q_desc, USERS)
    return Queries(
        tiles, barriers(1, 1), barriers(1, USERS),
        integers(2), integers(2), integers(2), integers(2), integers(2), integers(2),
    )  # fmt: skip
