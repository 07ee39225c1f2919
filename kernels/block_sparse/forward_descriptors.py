"""The forward pass for Hopper in Triton: tiles come through tensor descriptors (TMA), and the
compiler gives loading and computing to different warps. Interpreted and compiled, not run on a GPU.

It specialises warps where num_warps is 4, the descriptors are made on the device, and one loop
takes every tile: so a FULL tile goes through the masking of a PARTIAL one, with all bits set. Rows
are shared out between two warpgroups; with BLOCK_M = 64 both would do all of them, so there it is
off. What a descriptor reads beyond a sample's keys, or beyond a row, is 0.
"""

from __future__ import annotations

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments as args
from . import configs
from .arguments import Problem
from .attend import attend_tile, normalise, store_rows
from .forward import launch as launch_kernel
from .line import any_tile, bit_words
from .primitives import head_of, keys_of, next_tile, place, walk_keys


@triton.jit(do_not_specialize=Problem._fields)
def forward_descriptors_kernel(
    inputs,
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
    F: tl.constexpr,
):
    problem = Problem(
        pairs, heads, group, q_len, kv_len, rows, line_batch, line_head, tiles, section
    )
    pair, b, h, offset, end_n, leading, row0 = place(problem, lists, modifiers, F)
    q_ptr = head_of(inputs.query, inputs.query_strides, b, h)
    k_ptr, v_ptr, kv_strides = keys_of(inputs, b, h // problem.group)
    q = matrix(q_ptr, inputs.query_strides[2], problem.q_len, F.DIM, F.BLOCK_M, F.PAD)
    k = matrix(k_ptr, kv_strides[0], end_n, F.DIM, F.BLOCK_N, F.PAD)
    v = matrix(v_ptr, kv_strides[1], end_n, F.DIM_V, F.BLOCK_N, F.PAD_V)
    start_i = row0 - offset
    q_tile = q.load([start_i, 0])

    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD_V: tl.constexpr = F.PAD_V
    acc = tl.zeros([BLOCK_M, PAD_V], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    r2 = (row0 + tl.arange(0, BLOCK_M))[:, None]
    line = leading + row0 // F.BLOCK_Q
    n_full, n_masked, first, run, run_end, full_start, stop = walk_keys(
        problem, lists, line, row0, end_n, F
    )
    # the pass that specialises warps takes no early return: a tile beyond the queries sees no key
    needed = (start_i < problem.q_len) & (end_n > 0)
    n_tiles = tl.where(needed, n_full + n_masked, 0)
    start, bits = any_tile(lists, 0, n_full, n_masked, first, full_start, F)
    words = bit_words(lists.bits, bits, start, r2, F)
    for t in tl.range(n_tiles, warp_specialize=BLOCK_M == 128):
        acc, l_i, m_i = attend_tile(
            acc, l_i, m_i, q_tile, k.load([start, 0]), v.load([start, 0]), start, None, words,
            r2, offset, end_n, pair, None, problem, modifiers, True, F,
        )  # fmt: skip
        run, full_start, stop = next_tile(
            lists, run, run_end, full_start, stop, F.BLOCK_N, F.BLOCK_KV, F
        )
        start, bits = any_tile(lists, t + 1, n_full, n_masked, first, full_start, F)
        words = bit_words(lists.bits, bits, start, r2, F)

    acc, lse = normalise(acc, l_i, m_i, h, modifiers)
    store_rows(out_ptr, lse_ptr, acc, lse, start_i, pair, problem, F)


@triton.jit
def matrix(ptr, stride, rows, DIM: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr):
    """Descriptor of the (rows, DIM) matrix at `ptr`, read in tiles [SIZE, PAD]."""
    rows = tl.maximum(rows, 1)  # a descriptor of nothing is not allowed
    return tl.make_tensor_descriptor(ptr, [rows, DIM], [stride, 1], [SIZE, PAD])


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    call: args.KernelArguments,
    problem: Problem,
    features: args.Features,
    config: configs.Config,
) -> None:
    """Run the kernel. The descriptors that its programs make live in memory allocated for it."""

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=query.device)

    # a context of its own: the allocator of the caller, if any, stays
    context = contextvars.copy_context()
    context.run(triton.set_allocator, allocate)
    operands = query, key, value, out, lse
    kernel = forward_descriptors_kernel
    context.run(launch_kernel, kernel, *operands, call, problem, features, config)
