"""n_l, K_l and V_l of every chunk: routing and sums in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse.arguments import on_device
from ..nystrom.primitives import full, load_landmarks, locate, mm_acc, operand, zeros
from . import arguments as args
from .arguments import LaunchSizes
from .primitives import chunk_of, load_columns, slot_rows, tile_of


@triton.jit(do_not_specialize=LaunchSizes._fields)
def sums_kernel(inputs, n_ptr, K_ptr, V_ptr, heads, parts, groups, units, chunks, width,
                keep_tokens, F: tl.constexpr):  # fmt: skip
    sizes = LaunchSizes(heads, parts, groups, units, chunks, width, keep_tokens)
    part, chunk, pair = locate(sizes)
    b, h = pair // sizes.heads, pair % sizes.heads
    k_ptr = chunk_of(inputs.key, inputs.key_strides, b, h, chunk)
    v_ptr = chunk_of(inputs.value, inputs.value_strides, b, h, chunk)
    x_ptr = chunk_of(inputs.landmarks, inputs.landmark_strides, b, h, 0)
    # [BLOCK_D, PAD_M]
    x = load_landmarks(x_ptr, inputs.landmark_strides[2], 0, k_ptr.dtype.element_ty, F)
    keep_ptr = inputs.keep
    if F.KEEP:
        keep_ptr += tl.cast(b, tl.int64) * sizes.keep_tokens + chunk * sizes.width

    # [PAD_M]
    n = full(F.PAD_M, 0.0)
    # [BLOCK_D, PAD_M]
    K = zeros(F.BLOCK_D, F.PAD_M)
    # [BLOCK_V, PAD_M]
    V = zeros(F.BLOCK_V, F.PAD_M)
    for t0 in range(0, sizes.width, F.CHUNK):
        # [CHUNK] and [CHUNK, PAD_M]
        keep, a = tile_of(k_ptr, keep_ptr, x_ptr, x, t0, inputs.key_strides[3], inputs, sizes, F)
        a = operand(a, F)
        # [CHUNK, BLOCK_D]
        k = load_columns(k_ptr, t0, inputs.key_strides[3], keep, part, F.DIM, F.BLOCK_D, F)
        # [CHUNK, BLOCK_V]
        v = load_columns(v_ptr, t0, inputs.value_strides[3], keep, part, F.DIM_V, F.BLOCK_V, F)
        n += tl.sum(a.to(tl.float32), 0)  # as rounded as in the products: means stay means
        # [BLOCK_D, PAD_M]
        K = mm_acc(tl.trans(k), a, K, F)
        # [BLOCK_V, PAD_M]
        V = mm_acc(tl.trans(v), a, V, F)
    line = tl.cast(pair, tl.int64) * sizes.chunks + chunk
    offs_m = tl.arange(0, F.PAD_M)
    tl.store(n_ptr + line * F.MARKS + offs_m, n, mask=(offs_m < F.MARKS) & (part == 0))
    ptrs, inside = slot_rows(K_ptr, line, part, F.DIM, F.BLOCK_D, F)
    tl.store(ptrs, tl.trans(K), mask=inside)
    ptrs, inside = slot_rows(V_ptr, line, part, F.DIM_V, F.BLOCK_V, F)
    tl.store(ptrs, tl.trans(V), mask=inside)


def forward(key, value, landmarks, keep, scale) -> tuple[Tensor, Tensor, Tensor]:
    """(n, K, V), in the shapes and dtypes of `flashmark.hybrid.eager.forward`."""
    x = args.operands(key, value, landmarks, keep, scale)
    config = args.choose_config("forward", x)
    F = args.features(x, config)
    n = torch.empty(*key.shape[:3], F.MARKS, dtype=torch.float32, device=key.device)
    K, V = n.new_empty(*n.shape, F.DIM), n.new_empty(*n.shape, F.DIM_V)
    sizes = args.sizes_of(x, F)
    with on_device(key):
        sums_kernel[(key.shape[0] * sizes.heads * sizes.groups * sizes.parts,)](
            x, n, K, V, *sizes, F, **config.options
        )
    return n, K, V
