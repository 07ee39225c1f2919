"""The forward pass for Hopper in Gluon: one warp loads tiles through TMA, two warpgroups of 64 rows
each (one, where BLOCK_M is 64) compute, and they meet over rings of STAGES buffers, the stages.
Run in emulation, race-checked; not yet run on a GPU.

A stage has two barriers. The loader waits until the stage is empty and starts a copy that completes
`full`; a warpgroup waits for `full` and, when its product is done, arrives at `empty`, which
completes when every warpgroup has. Why this cannot deadlock:

* The tiles of a line are counted once, before the warps part: the loader fills, and each warpgroup
  uses, exactly that many stages of either ring. Tile t is turn t // STAGES of stage t % STAGES.
  With no tile nothing waits for one. The queries are always loaded and awaited, so that no copy is
  in flight when the program ends.
* The n-th completion of a barrier, from 0, has parity n % 2, and waiting for a parity returns when
  the last completion had it; before the first, that counts as 1. Turn r waits for completion r of
  `full`, parity r % 2, and, to be filled, for completion r - 1 of `empty`, parity (r + 1) % 2: at
  once when r is 0, since stages start empty. No barrier completes twice while one waits: a stage is
  filled again only when all have emptied it, and emptied again only when it has been filled.
* The loader copies in the order K of tile 0, V of tile 0, K of tile 1, ... A warpgroup releases K
  of tile t after copies that come before V of tile t, and V of tile t after copies up to K of tile
  t + 1. The loader needs those stages again for K and V of tile t + STAGES, which come later, so it
  never waits for a warpgroup that waits for a copy not yet started. V of the last tile is not
  released, and nothing needs it.

The next product overlaps with the softmax: S of tile t + 1 is in flight during that of tile t.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashmark.block_sparse.call import Saved

from . import arguments as args
from . import configs
from .arguments import LaunchSizes
from .attend import normalise
from .line import any_tile
from .primitives import keep_seen, log2_factor, logits, online_softmax, visible
from .walk import next_tile, place, walk_keys

REGISTERS = gl.constexpr(240)  # of a thread that computes
LOADER_REGISTERS = gl.constexpr(24)
ROWS = gl.constexpr(64)  # of a warpgroup


class Rings(NamedTuple):
    """Shared memory: STAGES buffers for K and for V, and the barriers of each."""

    k: object
    v: object
    k_full: object
    k_empty: object
    v_full: object
    v_empty: object


class Line(NamedTuple):
    """The tiles of a line, as `walk_keys` gives them, and how many there are."""

    n_full: object
    n_masked: object
    first: object
    run: object
    run_end: object
    start: object
    stop: object
    n_tiles: object


class Work(NamedTuple):
    """Work of one program."""

    lists: object
    line: object
    sizes: object
    modifiers: object
    pair: object
    b: object
    h: object
    row0: object
    end_n: object


@gluon.jit
def load_tiles(k_desc, v_desc, rings, work, F: gl.constexpr, STAGES: gl.constexpr):
    """Load the tiles of keys and values: the work of the loading warp."""
    lists, line = work.lists, work.line
    b, hk = work.b, work.h // work.sizes.group
    run, start, stop = line.run, line.start, line.stop
    for t in range(line.n_tiles):
        stage = t % STAGES
        parity = (t // STAGES) & 1
        n, _ = any_tile(lists, t, line.n_full, line.n_masked, line.first, start, F)
        mbarrier.wait(rings.k_empty.index(stage), parity ^ 1)
        mbarrier.expect(rings.k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_desc, [b, hk, n, 0], rings.k_full.index(stage), rings.k.index(stage)
        )
        mbarrier.wait(rings.v_empty.index(stage), parity ^ 1)
        mbarrier.expect(rings.v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v_desc, [b, hk, n, 0], rings.v_full.index(stage), rings.v.index(stage)
        )
        run, start, stop = next_tile(
            lists, run, line.run_end, start, stop, F.BLOCK_N, F.BLOCK_KV, F
        )


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
def keep_bits(s, bits_ptr, bits, start_n, first_row, F: gl.constexpr):
    """The scores of a tile whose bits are set, else -inf; all of them where `bits` is -1.

    A word of 32 keys becomes a dimension: a thread has as many words as S has registers to 8
    columns, and the compiler knows the bit of each register but for a shift.
    """
    WIDTH: gl.constexpr = F.BLOCK_N if F.BLOCK_N < 32 else 32
    WORDS: gl.constexpr = F.BLOCK_N // WIDTH
    layout: gl.constexpr = s.type.layout
    # [ROWS, WORDS, WIDTH]
    parts = gl.reshape(s, [ROWS, WORDS, WIDTH])
    by_word: gl.constexpr = gl.SliceLayout(2, parts.type.layout)
    # [ROWS], [WORDS], [WIDTH]
    r = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, by_word))
    w = gl.arange(0, WORDS, gl.SliceLayout(0, by_word))
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, parts.type.layout)))
    per_row: gl.constexpr = (F.BLOCK_KV + 31) // 32
    rows = bits_ptr + (bits.to(gl.int64) * F.BLOCK_Q + r % F.BLOCK_Q) * per_row
    rows += (start_n % F.BLOCK_KV) // 32
    # [ROWS, WORDS]
    word = gl.load(rows[:, None] + w[None, :], mask=bits >= 0, other=-1)
    if F.BLOCK_N < 32:
        word >>= start_n % F.BLOCK_KV % 32
    # [ROWS, WORDS, WIDTH], as `tile_bits`
    seen = (word[:, :, None] >> (c % 8)[None, None, :], (1 << (c // 8 * 8))[None, None, :])
    kept = keep_seen(seen, parts, float("-inf"), True, F)
    return gl.convert_layout(gl.reshape(kept, [ROWS, F.BLOCK_N]), layout)


@gluon.jit
def softmax(s, m_i, l_i, t, first_row, work, MASKED: gl.constexpr, F: gl.constexpr):
    """`online_softmax` of the scores of tile t."""
    line = work.line
    n, bits = any_tile(work.lists, t, line.n_full, line.n_masked, line.first, line.start, F)
    # [1, BLOCK_N], [ROWS, 1]
    n2 = (n + gl.arange(0, F.BLOCK_N, gl.SliceLayout(0, s.type.layout)))[None, :]
    r2 = (first_row + gl.arange(0, ROWS, gl.SliceLayout(1, s.type.layout)))[:, None]
    s, _ = logits(s, None, r2, n2, 0, work.sizes, work.modifiers, F)
    if MASKED and F.KIND == "sparse":
        s = keep_bits(s, work.lists.bits, bits, n, first_row, F)
    elif MASKED:
        seen = visible(None, 0, n, r2, n2, work.end_n, work.sizes, MASKED, F)
        s = keep_seen(seen, s, float("-inf"), MASKED, F)
    return online_softmax(s, log2_factor(work.modifiers, F), m_i, l_i, MASKED, F.SLACK)


@gluon.jit
def add_tile(
    s,
    acc,
    l_i,
    m_i,
    t,
    q,
    rings,
    first_row,
    work,
    MASKED: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Take the scores of tile t into the running sums; O + P V is in flight, and P must live."""
    # weights [ROWS, BLOCK_N]; alpha, m_i, l_i [ROWS]
    weights, alpha, m_i, l_i = softmax(s, m_i, l_i, t, first_row, work, MASKED, F)
    if F.SLACK == 0 or gl.min(alpha, 0) < 1.0:
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
    first_row,
    work,
    MASKED: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Add tile t, not the last, while the scores of the next are computed, which it returns."""
    layout: gl.constexpr = s.type.layout
    # [ROWS, BLOCK_N]
    following = issue_scores(q, rings, t + 1, layout, F, STAGES)
    acc, p, l_i, m_i = add_tile(
        s, acc, l_i, m_i, t, q, rings, first_row, work, MASKED, F, STAGES
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
def compute(
    w: gl.constexpr,
    q_tiles,
    q_full,
    rings,
    work,
    out_ptr,
    lse_ptr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Compute rows ROWS * w .. ROWS * (w + 1) - 1 of the tile: the work of one warpgroup."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.PAD_V, 16])
    # [ROWS, PAD_V]
    acc = gl.full([ROWS, F.PAD_V], 0.0, gl.float32, o_layout)
    # [ROWS]
    m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    l_i = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
    line, sizes = work.line, work.sizes
    first_row = work.row0 + w * ROWS
    # [ROWS, PAD], in shared memory
    q = q_tiles.index(w).reshape([ROWS, F.PAD])
    mbarrier.wait(q_full.index(w), 0)
    if line.n_tiles > 0:
        # [ROWS, BLOCK_N]
        s = issue_scores(q, rings, 0, s_layout, F, STAGES)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(rings.k_empty.index(0), count=1)
        last = line.n_tiles - 1
        # two at a time, so that the next scores end where the first were, and nothing is copied; a
        # FULL tile that is left has no bits and goes with the PARTIAL ones
        pairs = gl.minimum(line.n_full, last) // 2
        for t in range(0, 2 * pairs, 2):
            for more in gl.static_range(2):
                s, acc, l_i, m_i = step(
                    s, acc, l_i, m_i, t + more, q, rings, first_row, work, False, F, STAGES
                )  # fmt: skip
        for t in range(2 * pairs, last):
            s, acc, l_i, m_i = step(
                s, acc, l_i, m_i, t, q, rings, first_row, work, True, F, STAGES
            )  # fmt: skip
        acc, p, l_i, m_i = add_tile(
            s, acc, l_i, m_i, last, q, rings, first_row, work, True, F, STAGES
        )
        acc, p = warpgroup_mma_wait(0, [acc, p])

    acc, lse, _ = normalise(acc, rows_of(l_i, acc), rows_of(m_i, acc), work.h, work.modifiers)
    i = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
    d = gl.arange(0, F.PAD_V, gl.SliceLayout(0, o_layout))
    row = gl.cast(work.pair, gl.int64) * sizes.q_len + i
    inside = i < sizes.q_len
    gl.store(
        out_ptr + row[:, None] * F.DIM_V + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (d < F.DIM_V)[None, :],
    )
    gl.store(lse_ptr + row, lse, mask=inside)


@gluon.jit
def ring(desc, STAGES: gl.constexpr, USERS: gl.constexpr):
    """Buffers for the blocks of a descriptor, and their barriers: (stages, full, empty)."""
    stages = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=USERS)
    return stages, full, empty


@gluon.jit(do_not_specialize=LaunchSizes._fields)
def forward_gluon_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    lists,
    modifiers,
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
    pair, b, h, _, end_n, leading, row0 = place(sizes, lists, modifiers, F)
    if row0 >= sizes.q_len:
        return
    n_full, n_masked, first, run, run_end, start, stop = walk_keys(
        sizes, lists, leading + row0 // F.BLOCK_Q, row0, end_n, F
    )
    n_tiles = n_full + n_masked
    line = Line(n_full, n_masked, first, run, run_end, start, stop, n_tiles)
    work = Work(lists, line, sizes, modifiers, pair, b, h, row0, end_n)

    WARPGROUPS: gl.constexpr = F.BLOCK_M // ROWS
    q_tiles, q_full, _ = ring(q_desc, WARPGROUPS, 1)
    k_stages, k_full, k_empty = ring(k_desc, STAGES, WARPGROUPS)
    v_stages, v_full, v_empty = ring(v_desc, STAGES, WARPGROUPS)
    rings = Rings(k_stages, v_stages, k_full, k_empty, v_full, v_empty)
    fence_async_shared()
    for w in gl.static_range(WARPGROUPS):
        mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_desc, [b, h, row0 + w * ROWS, 0], q_full.index(w), q_tiles.index(w)
        )
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (compute, (0, q_tiles, q_full, rings, work, out_ptr, lse_ptr, F, STAGES)),
                (compute, (1, q_tiles, q_full, rings, work, out_ptr, lse_ptr, F, STAGES)),
                (load_tiles, (k_desc, v_desc, rings, work, F, STAGES)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (compute, (0, q_tiles, q_full, rings, work, out_ptr, lse_ptr, F, STAGES)),
                (load_tiles, (k_desc, v_desc, rings, work, F, STAGES)),
            ],
            [1],
            [LOADER_REGISTERS],
        )


def describe(tensor: Tensor, rows: int, width: int) -> TensorDescriptor:
    """A (B, H, N, D) tensor, read as tiles (1, 1, rows, width); 0 beyond N and D."""
    block = [1, 1, rows, width]
    dtype = {"torch.float16": gl.float16, "torch.bfloat16": gl.bfloat16}[str(tensor.dtype)]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    # a stride that is never taken can be anything, except in a descriptor
    steps = [
        step if size > 1 else tensor.stride(2)
        for size, step in zip(tensor.shape[:2], tensor.stride()[:2], strict=True)
    ]
    strides = [*steps, tensor.stride(2), 1]
    return TensorDescriptor(tensor, list(tensor.shape), strides, block, layout)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    call: args.KernelArguments,
    sizes: LaunchSizes,
    features: args.Features,
    config: configs.Config,
) -> None:
    """Run the kernel; num_warps of `config` is that of a warpgroup, 4."""
    if config.block_m not in (ROWS.value, 2 * ROWS.value) or config.num_warps != 4:
        raise ValueError(f"form 'gluon': expected 64 or 128 rows and 4 warps, got {config}")
    forward_gluon_kernel[(sizes.tiles * sizes.pairs,)](
        describe(query, ROWS.value, features.PAD),
        describe(key, config.block_n, features.PAD),
        describe(value, config.block_n, features.PAD_V),
        saved.out,
        saved.lse,
        call.rows,
        call.modifiers,
        *sizes,
        F=features,
        STAGES=config.num_stages,
        num_warps=4,
        maxnreg=None if config.block_m == 128 else 128,  # two programs of one warpgroup to an SM
    )
