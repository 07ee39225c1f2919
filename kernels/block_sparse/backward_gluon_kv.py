"""dK and dV for Hopper in Gluon: one warp loads tiles of queries through TMA, warpgroups of 64 keys
each compute, and they meet over a ring of STAGES buffers, the stages.

A stage holds all that a tile of queries brings: Q, dO, lse, Delta and its place in the mask.
Its two barriers work as those of the forward, whose docstring says why it cannot deadlock; a
warpgroup gives tile t back after it has waited for tile t + 1, so there are two stages at least.
The tiles are those of all heads of a group, counted before the warps part, FULL ones first.

Tiles are transposed, keys down and queries across, so that P^T and dS^T enter their products from
the registers where they were computed. While a warpgroup computes P^T, dP^T is in flight, and dV
while it computes dS^T; S^T of the next tile follows dK.
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

from .arguments import LaunchSizes
from .backward_gluon_bias import load_bias
from .backward_gluon_bits import keep_across, keep_down, keep_where, words_of_keys
from .backward_gluon_dropout import draw_bits, keep_bits
from .backward_gluon_loads import Inputs, Stages, Work, load_tiles, walk_head
from .backward_gluon_tile import hold, operands_of
from .forward_gluon import LOADER_REGISTERS, REGISTERS
from .gluon_loads import ROWS, barriers, buffers, get, integers, put
from .gluon_tile import operand
from .primitives import capped, probabilities
from .walk import locate, sample_bounds


class Outputs(NamedTuple):
    """Pointers to dK and dV, contiguous over (batch, key head, key), and the factor of dK."""

    dk: object
    dv: object
    scale: object


@gluon.jit
def queries_of(stages, stage, F: gl.constexpr):
    """Q [BLOCK_M, PAD] and dO [BLOCK_M, PAD_V] in shared memory."""
    q = stages.q.index(stage).reshape([F.BLOCK_M, F.PAD])
    return q, stages.dout.index(stage).reshape([F.BLOCK_M, F.PAD_V])


@gluon.jit
def issue_scores(k, stages, t, layout: gl.constexpr, F: gl.constexpr, STAGES: gl.constexpr):
    """S^T = K Q^T of tile t [ROWS, BLOCK_M], in flight."""
    stage = t % STAGES
    mbarrier.wait(stages.full.index(stage), (t // STAGES) & 1)
    q, _ = queries_of(stages, stage, F)
    zero = gl.full([ROWS, F.BLOCK_M], 0.0, gl.float32, layout)
    return warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def keep(x, word, F: gl.constexpr):
    """The elements of P^T or dS^T [ROWS, BLOCK_M] whose keys are seen, else 0."""
    if F.KIND == "sparse":
        x = keep_down(x, word)
    elif F.KIND == "causal":
        x = keep_across(x, word)
    return x


@gluon.jit
def add_bias(s, lse, stages, stage, first_key, work, MASKED: gl.constexpr, F: gl.constexpr):
    """(logits [ROWS, BLOCK_M], lse [1, BLOCK_M], its residual) of a tile of scores, which lack the
    bias.
    """
    layout: gl.constexpr = s.type.layout
    start, head = get(stages.start.index(stage)), get(stages.head.index(stage))
    b = work.pair // work.sizes.heads
    check: gl.constexpr = MASKED or F.OFFSET
    s += load_bias(s, b, head, start, first_key, work.offset, work, True, check, F)
    if F.OFFSET:  # no query, so no P, before the first and after the last
        i = start - work.offset + gl.arange(0, F.BLOCK_M, gl.SliceLayout(0, layout))
        lse = gl.where(((i >= 0) & (i < work.sizes.q_len))[None, :], lse, float("inf"))
    return s, lse, stages.residual.index(stage).load(layout)


@gluon.jit
def draw_keys(stages, t, first_key, work, F: gl.constexpr, STAGES: gl.constexpr):
    """Bits of what dropout keeps of tile t, which has come."""
    bits = 0
    if F.DROPOUT:
        sizes, stage = work.sizes, t % STAGES
        pair = work.pair // sizes.heads * (sizes.heads * sizes.group)
        pair += get(stages.head.index(stage))
        first_i = get(stages.start.index(stage)) - work.offset
        bits = draw_bits(first_i, first_key, pair, work.modifiers)
    return bits


@gluon.jit
def add_tile(
    s,
    drawn,
    dk,
    dv,
    t,
    v,
    stages,
    first_key,
    work,
    MASKED: gl.constexpr,
    LAST: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Take tile t, whose scores are s, and of which dropout keeps the bits `drawn`, into dK
    [ROWS, PAD] and dV [ROWS, PAD_V], both in flight; P^T and dS^T must live.
    """
    stage = t % STAGES
    layout: gl.constexpr = s.type.layout
    # [BLOCK_M, PAD] and [BLOCK_M, PAD_V], in shared memory
    q, dout = queries_of(stages, stage, F)
    # [ROWS, BLOCK_M], without dropout from -Delta on, which then takes no registers
    dp = gl.full([ROWS, F.BLOCK_M], 0.0, gl.float32, layout)
    if not F.DROPOUT:
        dp -= stages.delta.index(stage).load(layout)
    dp = warpgroup_mma(v, dout.permute((1, 0)), dp, is_async=True)
    # [1, BLOCK_M]
    lse = stages.lse.index(stage).load(layout)
    residual = lse
    # [ROWS, BLOCK_M]
    p, slope = capped(s, work.modifiers, F)
    if F.NATURAL:
        p, lse, residual = add_bias(p, lse, stages, stage, first_key, work, MASKED, F)
    p = probabilities(p, lse, residual, work.modifiers, F)
    weights = p.to(q.dtype)
    if F.DROPOUT:
        weights = keep_bits(weights, drawn)
    if F.SOFTCAP:
        p = p * slope
    if MASKED:
        start, bits = get(stages.start.index(stage)), get(stages.bits.index(stage))
        word = words_of_keys(s, work.lists, start, bits, first_key, work.sizes, LAST, F)
        weights = keep(weights, word, F)
    p_t = operand(weights, dv, q.dtype)
    # [ROWS, PAD_V]
    dv = warpgroup_mma(p_t, dout, dv, is_async=True)
    # [ROWS, BLOCK_M]
    dp = warpgroup_mma_wait(1, [dp])
    if F.DROPOUT:
        dp = keep_bits(dp, drawn) * work.modifiers.keep_scale
        dp -= stages.delta.index(stage).load(layout)
    ds = (p * dp).to(q.dtype)
    # whatever Q, dO and V are where nothing is seen
    if MASKED and F.DROPOUT:  # a weight may be 0 where something is; kept, the word would spill
        word = words_of_keys(s, work.lists, start, bits, first_key, work.sizes, LAST, F)
        ds = keep(ds, word, F)
    elif MASKED:
        ds = keep_where(ds, weights)
    ds_t = operand(ds, dk, q.dtype)
    # [ROWS, PAD]
    dk = warpgroup_mma(ds_t, q, dk, is_async=True)
    return dk, dv, p_t, ds_t


@gluon.jit
def step(
    s,
    drawn,
    dk,
    dv,
    t,
    k,
    v,
    stages,
    first_key,
    work,
    MASKED: gl.constexpr,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Add tile t, not the last, and compute the scores of the next, and dropout's bits, which it
    returns.
    """
    layout: gl.constexpr = s.type.layout
    dk, dv, p_t, ds_t = add_tile(
        s, drawn, dk, dv, t, v, stages, first_key, work, MASKED, False, F, STAGES
    )  # fmt: skip
    s = issue_scores(k, stages, t + 1, layout, F, STAGES)
    drawn = draw_keys(stages, t + 1, first_key, work, F, STAGES)
    s, dk, dv, p_t, ds_t = warpgroup_mma_wait(0, [s, dk, dv, p_t, ds_t])
    mbarrier.arrive(stages.empty.index(t % STAGES), count=1)
    return s, drawn, dk, dv


@gluon.jit
def store(base, tile, place, w, sizes, DIM: gl.constexpr, PAD: gl.constexpr, F: gl.constexpr):
    """Store a tile of dK or dV, [ROWS, PAD], without what lies beyond the keys; 0 beyond those of a
    sample, where the tile may hold anything.
    """
    layout: gl.constexpr = tile.type.layout
    down: gl.constexpr = gl.SliceLayout(1, layout)
    # [ROWS], [PAD]
    n = place.index(1).load(down) + (w * ROWS + gl.arange(0, ROWS, down))
    d = gl.arange(0, PAD, gl.SliceLayout(0, layout))
    row = place.index(0).load(down).to(gl.int64) * sizes.kv_len + n
    if F.LENGTHS:
        tile = gl.where((n < place.index(2).load(down))[:, None], tile, 0.0)
    gl.store(
        base + row[:, None] * DIM + d[None, :],
        tile.to(base.dtype.element_ty),
        mask=(n < sizes.kv_len)[:, None] & (d < DIM)[None, :],
    )


@gluon.jit
def compute(
    w: gl.constexpr,
    held,
    place,
    stages,
    work,
    outputs,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Compute keys ROWS * w .. ROWS * (w + 1) - 1 of the tile: the work of one warpgroup. `place`
    has its pair, first key and sample's keys until they are stored: registers are short.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.BLOCK_M, 16])
    k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.PAD, 16])
    v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F.PAD_V, 16])
    # [ROWS, PAD], [ROWS, PAD_V]
    dk = gl.full([ROWS, F.PAD], 0.0, gl.float32, k_layout)
    dv = gl.full([ROWS, F.PAD_V], 0.0, gl.float32, v_layout)
    first_key = work.start_n + w * ROWS
    # [ROWS, PAD], [ROWS, PAD_V], in shared memory
    k, v = operands_of(held, w, F)
    if work.n_tiles > 0:
        # [ROWS, BLOCK_M]
        s = issue_scores(k, stages, 0, s_layout, F, STAGES)
        drawn = draw_keys(stages, 0, first_key, work, F, STAGES)
        s = warpgroup_mma_wait(0, [s])
        last = work.n_tiles - 1
        n_full = gl.minimum(work.n_full, last)
        for t in range(n_full):
            s, drawn, dk, dv = step(
                s, drawn, dk, dv, t, k, v, stages, first_key, work, False, F, STAGES
            )  # fmt: skip
        # a FULL tile that is left has no bits and goes with the PARTIAL ones
        for t in range(n_full, last):
            s, drawn, dk, dv = step(
                s, drawn, dk, dv, t, k, v, stages, first_key, work, True, F, STAGES
            )  # fmt: skip
        dk, dv, p_t, ds_t = add_tile(
            s, drawn, dk, dv, last, v, stages, first_key, work, True, True, F, STAGES
        )  # fmt: skip
        dk, dv, p_t, ds_t = warpgroup_mma_wait(0, [dk, dv, p_t, ds_t])
    store(outputs.dk, dk * outputs.scale, place, w, work.sizes, F.DIM, F.PAD, F)
    store(outputs.dv, dv * work.modifiers.keep_scale, place, w, work.sizes, F.DIM_V, F.PAD_V, F)


@gluon.jit(do_not_specialize=LaunchSizes._fields)
def backward_kv_gluon_kernel(
    q_desc,
    dout_desc,
    lse_desc,
    delta_desc,
    k_desc,
    v_desc,
    dk_ptr,
    dv_ptr,
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
    inputs = Inputs(q_desc, dout_desc, lse_desc, delta_desc)
    index, pair = locate(sizes)
    b, hk = pair // sizes.heads, pair % sizes.heads
    tile = index
    if F.KIND == "sparse":
        split: gl.constexpr = F.BLOCK_KV // F.BLOCK_N
        lines = lists.order + b * sizes.line_batch + hk * sizes.group * sizes.line_head
        tile = gl.load(lines + index // split) * split + index % split
    start_n = tile * F.BLOCK_N
    if start_n >= sizes.kv_len:
        return
    offset, end_n = sample_bounds(sizes, modifiers, b, F)
    all_full, all_tiles = 0, 0
    for g in range(sizes.group):
        n_full, n_masked, _, _, _, _, _ = walk_head(
            lists, sizes, b, hk * sizes.group + g, start_n, offset, end_n, F
        )
        all_full += n_full
        all_tiles += n_full + n_masked
    work = Work(lists, sizes, modifiers, pair, start_n, end_n, all_full, all_tiles, offset)
    outputs = Outputs(dk_ptr, dv_ptr, scale)

    WARPGROUPS: gl.constexpr = F.BLOCK_N // ROWS
    place = integers(3)
    put(place.index(0), pair)
    put(place.index(1), start_n)
    put(place.index(2), end_n)
    stages = Stages(
        buffers(q_desc, STAGES),
        buffers(dout_desc, STAGES),
        buffers(lse_desc, STAGES),
        buffers(delta_desc, STAGES),
        buffers(lse_desc, STAGES if F.NATURAL else 1),
        integers(STAGES),
        integers(STAGES),
        integers(STAGES),
        barriers(STAGES, 1),
        barriers(STAGES, WARPGROUPS),
    )
    held = hold(k_desc, v_desc, b, hk, start_n, WARPGROUPS)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (compute, (0, held, place, stages, work, outputs, F, STAGES)),
                (compute, (1, held, place, stages, work, outputs, F, STAGES)),
                (load_tiles, (inputs, stages, work, F, STAGES)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (compute, (0, held, place, stages, work, outputs, F, STAGES)),
                (load_tiles, (inputs, stages, work, F, STAGES)),
            ],
            [1],
            [LOADER_REGISTERS],
        )
