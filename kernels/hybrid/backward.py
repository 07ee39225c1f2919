"""Gradients of keys, values and landmarks from those of n, K and V."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse.arguments import on_device
from ..nystrom.primitives import (
    load_landmarks,
    load_vector,
    locate,
    mm,
    mm_acc,
    operand,
    store_rows,
    zeros,
)
from . import arguments as args
from . import configs
from .arguments import LaunchSizes
from .primitives import chunk_of, load_columns, slot_rows, tile_of


@triton.jit
def add_pull(da, x_ptr, t0, stride, keep, dX_ptr, DIM: tl.constexpr, BLOCK: tl.constexpr,
             BLOCKS: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """da_jl + x_j . dX_l over all columns."""
    for block in tl.static_range(BLOCKS):
        # [CHUNK, BLOCK]
        x = load_columns(x_ptr, t0, stride, keep, block, DIM, BLOCK, F)
        ptrs, inside = slot_rows(dX_ptr, 0, block, DIM, BLOCK, F)
        # [PAD_M, BLOCK]
        dX = tl.load(ptrs, mask=inside, other=0.0)
        # [CHUNK, PAD_M]
        da = mm_acc(x, tl.trans(operand(dX, F)), da, F)
    return da


@triton.jit(do_not_specialize=LaunchSizes._fields)
def sums_backward_kernel(inputs, dn_ptr, dK_ptr, dV_ptr, dk_ptr, dv_ptr, partial_ptr, heads, parts,
                         groups, units, chunks, width, keep_tokens, F: tl.constexpr):  # fmt: skip
    sizes = LaunchSizes(heads, parts, groups, units, chunks, width, keep_tokens)
    part, group, pair = locate(sizes)
    b, h = pair // sizes.heads, pair % sizes.heads
    x_ptr = chunk_of(inputs.landmarks, inputs.landmark_strides, b, h, 0)
    key_stride, value_stride = inputs.key_strides[3], inputs.value_strides[3]
    # [BLOCK_D, PAD_M]
    x = load_landmarks(x_ptr, inputs.landmark_strides[2], 0, inputs.key.dtype.element_ty, F)
    own_x = load_landmarks(x_ptr, inputs.landmark_strides[2], part, tl.float32, F)
    # [BLOCK_D, PAD_M]
    dx = zeros(F.BLOCK_D, F.PAD_M)
    d0, v0 = part * F.BLOCK_D, part * F.BLOCK_V
    for chunk in range(group * sizes.units,
                       tl.minimum((group + 1) * sizes.units, sizes.chunks)):  # fmt: skip
        line = tl.cast(pair, tl.int64) * sizes.chunks + chunk
        k_ptr = chunk_of(inputs.key, inputs.key_strides, b, h, chunk)
        v_ptr = chunk_of(inputs.value, inputs.value_strides, b, h, chunk)
        keep_ptr = inputs.keep
        if F.KEEP:
            keep_ptr += tl.cast(b, tl.int64) * sizes.keep_tokens + chunk * sizes.width
        # [PAD_M]
        dn = load_vector(dn_ptr + line * F.MARKS, F)
        # offsets within the slots of a chunk take 32 bits
        chunk_dK, chunk_dV = dK_ptr + line * (F.MARKS * F.DIM), dV_ptr + line * (F.MARKS * F.DIM_V)
        K_ptrs, K_inside = slot_rows(chunk_dK, 0, part, F.DIM, F.BLOCK_D, F)
        V_ptrs, V_inside = slot_rows(chunk_dV, 0, part, F.DIM_V, F.BLOCK_V, F)
        # [PAD_M, BLOCK_D]
        dK = tl.load(K_ptrs, mask=K_inside, other=0.0)
        # [PAD_M, BLOCK_V]
        dV = tl.load(V_ptrs, mask=V_inside, other=0.0)
        for t0 in range(0, sizes.width, F.CHUNK):
            # [CHUNK] and [CHUNK, PAD_M]
            keep, a = tile_of(k_ptr, keep_ptr, x_ptr, x, t0, key_stride, inputs, sizes, F)
            # [CHUNK, PAD_M]
            da = zeros(F.CHUNK, F.PAD_M) + dn[None, :]
            da = add_pull(da, k_ptr, t0, key_stride, keep, chunk_dK, F.DIM, F.BLOCK_D,
                          F.BLOCKS_D, F)  # fmt: skip
            da = add_pull(da, v_ptr, t0, value_stride, keep, chunk_dV, F.DIM_V, F.BLOCK_V,
                          F.BLOCKS_V, F)  # fmt: skip
            # [CHUNK, PAD_M]
            ds = a * (da - tl.sum(a * da, 1)[:, None]) * inputs.scale
            there = t0 + tl.arange(0, F.CHUNK) < sizes.width
            # [CHUNK, BLOCK_D]
            dk = mm_acc(a, dK, mm(ds, tl.trans(own_x), F), F)
            rows = line * sizes.width
            store_rows(dk_ptr + rows * F.DIM + d0, t0, F.DIM, there, F.DIM - d0, dk, F.CHUNK,
                       F.BLOCK_D, True)  # fmt: skip
            store_rows(dv_ptr + rows * F.DIM_V + v0, t0, F.DIM_V, there, F.DIM_V - v0,
                       mm(a, dV, F), F.CHUNK, F.BLOCK_V, True)  # fmt: skip
            # [CHUNK, BLOCK_D]
            k = load_columns(k_ptr, t0, key_stride, keep, part, F.DIM, F.BLOCK_D, F)
            # [BLOCK_D, PAD_M]
            dx = mm_acc(tl.trans(k), ds, dx, F)
    out = tl.cast(pair, tl.int64) * sizes.groups + group
    ptrs, inside = slot_rows(partial_ptr, out, part, F.DIM, F.BLOCK_D, F)
    tl.store(ptrs, tl.trans(dx), mask=inside)


def backward(dn, dK, dV, key, value, landmarks, keep, scale) -> tuple[Tensor, Tensor, Tensor]:
    """(dkey, dvalue, dlandmarks), as `flashmark.hybrid.eager.backward`: every run the same bits."""
    x = args.operands(key, value, landmarks, keep, scale)
    config = args.choose_config("backward", x)
    F = args.features(x, config)
    (batch, heads, chunks), marks = key.shape[:3], landmarks.shape[-2]
    sizes = args.sizes_of(x, F, max(1, batch * heads * chunks // configs.PROGRAMS))
    dkey, dvalue = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (key, value))
    shares = torch.empty(
        batch, heads, sizes.groups, marks, F.DIM, dtype=torch.float32, device=key.device
    )
    with on_device(key):
        sums_backward_kernel[(batch * heads * sizes.groups * sizes.parts,)](
            x, dn, dK, dV, dkey, dvalue, shares, *sizes, F, **config.options,
        )  # fmt: skip
    dlandmarks = shares.sum(2)
    if landmarks.dim() == 3:
        dlandmarks = dlandmarks.sum(0)
    return dkey, dvalue, dlandmarks.to(landmarks.dtype)
