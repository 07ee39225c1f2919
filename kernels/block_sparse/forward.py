"""Forward pass: one program holds a tile of queries and walks the tiles of keys that the mask lets
it see.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments as args
from . import configs
from .arguments import Problem
from .attend import attend, normalise, store_rows
from .decode import decode, is_decode
from .forms import can_use_form
from .primitives import (
    bias_base,
    head_of,
    keys_of,
    load_tile,
    masked_tile,
    next_tile,
    place,
    row_stride,
    walk_keys,
)


@triton.jit(do_not_specialize=Problem._fields)
def forward_kernel(
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
    if row0 >= offset + problem.q_len:
        return

    q_ptr = head_of(inputs.query, inputs.query_strides, b, h)
    k_ptr, v_ptr, kv_strides = keys_of(inputs, b, h // problem.group, F)
    base = bias_base(modifiers, b, h, F)
    start_i = row0 - offset
    q_stride = row_stride(inputs.query_strides, F)
    q = load_tile(q_ptr, start_i, q_stride, problem.q_len, F.BLOCK_M, F.DIM, F.PAD, True)

    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD_V: tl.constexpr = F.PAD_V
    acc = tl.zeros([BLOCK_M, PAD_V], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    r2 = (row0 + tl.arange(0, BLOCK_M))[:, None]
    line = leading + row0 // F.BLOCK_Q
    n_full, n_masked, first, run, run_end, start, stop = walk_keys(
        problem, lists, line, row0, end_n, F
    )
    full_start = start
    # a loop that may run zero times makes ptxas wait for every product before the next
    if n_full > 0:
        for _ in range(n_full):
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, k_ptr, v_ptr, kv_strides, start, lists.bits, 0,
                r2, offset, end_n, pair, base, problem, modifiers, False, F,
            )  # fmt: skip
            run, start, stop = next_tile(lists, run, run_end, start, stop, F.BLOCK_N, F.BLOCK_KV, F)
    if n_masked > 0:
        for t in range(n_masked):
            start, bits = masked_tile(lists, first, t, full_start, n_full, F.BLOCK_N, F.BLOCK_KV, F)
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, k_ptr, v_ptr, kv_strides, start, lists.bits, bits,
                r2, offset, end_n, pair, base, problem, modifiers, True, F,
            )  # fmt: skip

    acc, lse = normalise(acc, l_i, m_i, h, modifiers)
    store_rows(out_ptr, lse_ptr, acc, lse, start_i, pair, problem, F)


def launch(
    kernel: triton.JITFunction,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    call: args.Call,
    problem: Problem,
    features: args.Features,
    config: configs.Config,
) -> None:
    """Run a kernel that takes the arguments of `forward_kernel`."""
    kernel[(problem.tiles * problem.pairs,)](
        args.inputs(query, key, value),
        out,
        lse,
        call.rows,
        call.modifiers,
        *problem,
        F=features,
        **config.options,
    )


def forward_tiles(
    query: Tensor, key: Tensor, value: Tensor, mask, call: args.Call
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: (out, lse)."""
    config = args.choose_config("forward", query, call)
    can_use_form(config.form, query, key, value, call, raise_error=True)
    problem, features = args.over_queries(call, mask, query, config)
    batch, heads, q_len, _ = query.shape
    out = torch.empty(batch, heads, q_len, value.shape[-1], dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
    with args.on_device(query):
        launcher(config.form)(query, key, value, out, lse, call, problem, features, config)
    return out, lse


def launcher(form: str) -> Callable[..., None]:
    """What runs a form of the kernel. Gluon is imported by those who ask for it alone."""
    if form == "pointers":
        return functools.partial(launch, forward_kernel)
    module = importlib.import_module(f"{__package__}.forward_{form}")
    return module.launch


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask,
    bias: Tensor | None,
    sinks: Tensor | None,
    query_offset: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that `mask` (a BlockMask) shows.

    query (B, Hq, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv), last strides 1, float16,
    bfloat16 or float32; the rest as `flashmark.block_sparse_attention`, validated there. Returns
    out (B, Hq, Nq, Dv) in query's dtype and lse (B, Hq, Nq) float32, the natural log of the whole
    denominator.
    """
    call = args.describe(
        query, key, value, mask, bias, sinks, query_offset, kv_lengths, dropout_seed,
        scale, softcap, dropout_p,
    )  # fmt: skip
    launch = decode if is_decode(call) else forward_tiles
    return launch(query, key, value, mask, call)
