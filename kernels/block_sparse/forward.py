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

from flashmark.block_sparse import eager
from flashmark.block_sparse.call import Call, Saved

from . import arguments as args
from . import configs, passes
from .arguments import LaunchSizes
from .attend import attend, normalise, store_rows
from .decode import decode, is_decode
from .forms import choose_forward
from .primitives import bias_base, head_of, keys_of, load_tile, row_stride
from .walk import masked_tile, next_tile, place, walk_keys


@triton.jit(do_not_specialize=LaunchSizes._fields)
def forward_kernel(
    inputs,
    out_ptr,
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
    F: tl.constexpr,
):
    sizes = LaunchSizes(
        pairs, heads, group, q_len, kv_len, rows, line_batch, line_head, tiles, section
    )
    pair, b, h, offset, end_n, leading, row0 = place(sizes, lists, modifiers, F)
    if row0 >= offset + sizes.q_len:
        return

    q_ptr = head_of(inputs.query, inputs.query_strides, b, h)
    k_ptr, v_ptr, kv_strides = keys_of(inputs, b, h // sizes.group, F)
    base = bias_base(modifiers, b, h, F)
    start_i = row0 - offset
    q_stride = row_stride(inputs.query_strides, F)
    # [BLOCK_M, PAD]
    q = load_tile(q_ptr, start_i, q_stride, sizes.q_len, F.BLOCK_M, F.DIM, F.PAD, True)

    BLOCK_M: tl.constexpr = F.BLOCK_M
    PAD_V: tl.constexpr = F.PAD_V
    # [BLOCK_M, PAD_V]
    acc = tl.zeros([BLOCK_M, PAD_V], tl.float32)
    # [BLOCK_M]
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, 1]
    r2 = (row0 + tl.arange(0, BLOCK_M))[:, None]
    line = leading + row0 // F.BLOCK_Q
    n_full, n_masked, first, run, run_end, start, stop = walk_keys(
        sizes, lists, line, row0, end_n, F
    )
    full_start = start
    # a loop that may run zero times makes ptxas wait for every product before the next
    if n_full > 0:
        for _ in range(n_full):
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, k_ptr, v_ptr, kv_strides, start, lists.bits, 0,
                r2, offset, end_n, pair, base, sizes, modifiers, False, F,
            )  # fmt: skip
            run, start, stop = next_tile(lists, run, run_end, start, stop, F.BLOCK_N, F.BLOCK_KV, F)
    if n_masked > 0:
        for t in range(n_masked):
            start, bits = masked_tile(lists, first, t, full_start, n_full, F.BLOCK_N, F.BLOCK_KV, F)
            acc, l_i, m_i = attend(
                acc, l_i, m_i, q, k_ptr, v_ptr, kv_strides, start, lists.bits, bits,
                r2, offset, end_n, pair, base, sizes, modifiers, True, F,
            )  # fmt: skip

    acc, lse, residual = normalise(acc, l_i, m_i, h, modifiers, F.NATURAL)
    store_rows(out_ptr, lse_ptr, residual_ptr, acc, lse, residual, start_i, pair, sizes, F)


def launch(
    kernel: triton.JITFunction,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Saved,
    call: args.KernelArguments,
    sizes: LaunchSizes,
    features: args.Features,
    config: configs.Config,
) -> None:
    """Run a kernel that takes the arguments of `forward_kernel`."""
    kernel[(sizes.tiles * sizes.pairs,)](
        args.inputs(query, key, value),
        saved.out,
        saved.lse,
        saved.residual,
        call.rows,
        call.modifiers,
        *sizes,
        F=features,
        **config.options,
    )


def launcher(form: str) -> Callable[..., None]:
    """Launcher of a form of the kernel. Gluon is imported only where its form is asked for."""
    if form == "pointers":
        return functools.partial(launch, forward_kernel)
    module = importlib.import_module(f"{__package__}.forward_{form}")
    return module.launch


def forward(call: Call) -> Saved:
    """Softmax attention over the keys that the mask shows: out in query's dtype, lse float32."""
    query, key, value = call.query, call.key, call.value
    if not query.numel() or not key.numel():
        return eager.forward(call)  # nothing to launch
    described = args.describe(call)
    if is_decode(described):
        return decode(call, described)
    config = choose_forward(query, key, value, described)
    sizes, features = passes.over_queries(described, call.mask, query, config)
    batch, heads, q_len, _ = query.shape
    out = torch.empty(batch, heads, q_len, value.shape[-1], dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
    saved = Saved(out, lse, args.residual_of(call, lse))
    with args.on_device(query):
        run = launcher(config.form)
        run(query, key, value, saved, described, sizes, features, config)
    return saved
