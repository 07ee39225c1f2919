"""The forward pass for Hopper in Gluon: one warp loads tiles through TMA, two warpgroups of 64 rows
each (one, where BLOCK_M is 64) compute, and they meet over rings of STAGES buffers, the stages.
Run in emulation, race-checked; not yet run on a GPU.

A program computes lines, tiles of queries, one after the other: as many programs run as fit the
GPU, and lines are dealt to them, heavy ones first. The loading warp is in the next line while the
warpgroups end this one, and tells them by integers in shared memory what a line and a tile hold.
The tiles of a program are counted through all its lines: tile t is turn t // STAGES of stage
t % STAGES of either ring.

A stage has two barriers. The loader waits until the stage is empty and starts a copy that completes
`full`; a warpgroup waits for `full` and, when its product is done, arrives at `empty`, which
completes when every warpgroup has. The queries are a ring of one stage, whose turns are the lines.
Why this cannot deadlock:

* The loader fills, and each warpgroup uses and releases, every stage of each turn exactly once, in
  the same order: the queries of a line, then K of its tile 0, V of its tile 0, K of its tile 1, ...
* The n-th completion of a barrier, from 0, has parity n % 2, and waiting for a parity returns when
  the last completion had it; before the first, that counts as 1. Turn r waits for completion r of
  `full`, parity r % 2, and, to be filled, for completion r - 1 of `empty`, parity (r + 1) % 2: at
  once when r is 0, since stages start empty. No barrier completes twice while one waits: a stage is
  filled again only when all have emptied it, and emptied again only when it has been filled.
* A warpgroup releases K of tile t after copies that come before V of tile t, V of tile t after
  copies up to K of the line's next tile, and the queries before V of the line's last tile. Each is
  waited for only by copies that come later. So the loader never waits for a warpgroup that waits
  for a copy not yet started.
* An integer is overwritten when its readers have released what came with it: that of a tile after
  V of the tile STAGES + 1 before, that of a line after the queries of the line between.

The next product overlaps with the softmax: S of tile t + 1 is in flight during that of tile t.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashmark.block_sparse.call import Saved

from . import arguments as args
from . import configs
from .arguments import LaunchSizes
from .attend import normalise
from .gluon_loads import (
    ROWS,
    Problem,
    buffers,
    get,
    load_lines,
    make_queries,
    make_rings,
)
from .gluon_tile import attend_line, rows_of
from .line import lines_of_program

REGISTERS = gl.constexpr(240)  # of a thread that computes
LOADER_REGISTERS = gl.constexpr(24)


class Results(NamedTuple):
    """Places of the results: a descriptor of the output, and room for a part of it to each
    warpgroup; pointers to lse and its residual, contiguous over (batch, head, query).
    """

    desc: object
    lse: object
    residual: object  # of lse, where F.NATURAL
    staging: object
    falls: object  # a float32 for each warp, where F.SLACK


@gluon.jit
def compute(
    w: gl.constexpr,
    results,
    queries,
    rings,
    problem,
    F: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Compute rows ROWS * w .. ROWS * (w + 1) - 1 of each line: the work of one warpgroup."""
    sizes = problem.sizes
    tile = 0
    for turn in range(lines_of_program(sizes)):
        mbarrier.wait(queries.full.index(0), turn & 1)
        slot = turn & 1
        falls = None
        if F.SLACK > 0:
            falls = results.falls.index(w)
        acc, l_i, m_i, n_tiles = attend_line(
            w, queries, slot, rings, tile, problem, falls, F, STAGES
        )  # fmt: skip
        tile += n_tiles
        # read anew, not to hold a register in the loops
        pair, start_i = get(queries.pair.index(slot)), get(queries.start_i.index(slot)) + w * ROWS
        b, h = pair // sizes.heads, pair % sizes.heads
        acc, lse, residual = normalise(
            acc, rows_of(l_i, acc), rows_of(m_i, acc), h, problem.modifiers, F.NATURAL
        )
        store_output(results.desc, results.staging.index(w), acc, b, h, start_i)
        i = start_i + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
        row = gl.cast(pair, gl.int64) * sizes.q_len + i
        inside = (i >= 0) & (i < sizes.q_len)
        gl.store(results.lse + row, lse, mask=inside)
        if F.NATURAL:
            gl.store(results.residual + row, residual, mask=inside)
    tma.store_wait(0)


@gluon.jit
def store_output(desc, staging, acc, b, h, start_i):
    """Store [ROWS, PAD_V] as rows start_i .. of the output, through shared memory."""
    tma.store_wait(0)
    staging.reshape(acc.shape).store(acc.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [b, h, start_i, 0], staging)


@gluon.jit(do_not_specialize=LaunchSizes._fields)
def forward_gluon_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse_ptr,
    residual_ptr,
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
    problem = Problem(lists, sizes, modifiers)
    WARPGROUPS: gl.constexpr = F.BLOCK_M // ROWS
    queries = make_queries(q_desc, WARPGROUPS)
    rings = make_rings(k_desc, v_desc, WARPGROUPS, STAGES)
    staging = buffers(out_desc, WARPGROUPS)
    fence_async_shared()
    falls = None
    if F.SLACK > 0:
        layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        falls = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, 4], layout)
    results = Results(out_desc, lse_ptr, residual_ptr, staging, falls)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (compute, (0, results, queries, rings, problem, F, STAGES)),
                (compute, (1, results, queries, rings, problem, F, STAGES)),
                (load_lines, (q_desc, k_desc, v_desc, queries, rings, problem, F, STAGES)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (compute, (0, results, queries, rings, problem, F, STAGES)),
                (load_lines, (q_desc, k_desc, v_desc, queries, rings, problem, F, STAGES)),
            ],
            [1],
            [LOADER_REGISTERS],
        )


@functools.cache
def layout_of(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Layout of a tile in shared memory."""
    kind = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], kind)


@functools.cache
def frame(rows: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Fields of a descriptor of such tiles, but for the tensor's."""
    some = torch.empty(1, 1, rows, width, dtype=dtype)
    shape = [1, 1, rows, width]
    return vars(TensorDescriptor(some, shape, some.stride(), shape, layout_of(rows, width, dtype)))


def describe(tensor: Tensor, rows: int, width: int) -> TensorDescriptor:
    """A (B, H, N, D) tensor, as tiles (1, 1, rows, width); read as 0 beyond N and D."""
    (batch, heads, *_), (b, h, n, _) = tensor.shape, tensor.stride()
    # a stride that is never taken can be anything, except in a descriptor
    strides = [b if batch > 1 else n, h if heads > 1 else n, n, 1]
    made = object.__new__(TensorDescriptor)  # forms.py has checked what its constructor would
    made.__dict__ |= frame(rows, width, tensor.dtype)
    made.__dict__ |= {"base": tensor, "shape": list(tensor.shape), "strides": strides}
    return made


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
    # one program of two warpgroups to a multiprocessor, or two of one
    wide = config.block_m == 2 * ROWS.value
    places = configs.processors(query.device) * (1 if wide else 2)
    forward_gluon_kernel[(min(places, sizes.tiles * sizes.pairs),)](
        describe(query, ROWS.value, features.PAD),
        describe(key, config.block_n, features.PAD),
        describe(value, config.block_n, features.PAD_V),
        describe(saved.out, ROWS.value, features.PAD_V),
        saved.lse,
        saved.residual,
        call.rows,
        call.modifiers,
        *sizes,
        F=features,
        STAGES=config.num_stages,
        num_warps=4,
        maxnreg=None if wide else 128,
    )
