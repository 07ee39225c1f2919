"""Functions that the hybrid kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from ..nystrom.primitives import kept_tokens, landmark_products, load_rows


@triton.jit
def chunk_of(ptr, strides, b, h, chunk):
    """Pointer to the first token of a chunk."""
    ptr += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
    return ptr + tl.cast(chunk, tl.int64) * strides[2]


@triton.jit
def tile_of(k_ptr, keep_ptr, x_ptr, x, t0, key_stride, inputs, sizes, F: tl.constexpr):
    """(which tokens of a tile take part, their weights a = softmax_l(scale k . x_l)), 0 for others.

    [CHUNK] and [CHUNK, PAD_M]; `x` holds the landmarks where they fit a block.
    """
    # [CHUNK]
    keep = kept_tokens(keep_ptr, t0, sizes.width, F)
    if F.RELOAD:  # the pointer seems to depend on t0 >= 0: else they would stay in shared memory
        x_ptr += tl.minimum(t0, 0)
    # [CHUNK, PAD_M]
    s = landmark_products(k_ptr, t0, key_stride, keep, x, x_ptr, inputs.landmark_strides[2], F)
    s = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[None, :], s * inputs.scale2, float("-inf"))
    e = tl.exp2(s - tl.max(s, 1)[:, None])
    return keep, tl.where(keep[:, None], e / tl.sum(e, 1)[:, None], 0.0)


@triton.jit
def load_columns(base, start, stride, keep, block, DIM: tl.constexpr, BLOCK: tl.constexpr,
                 F: tl.constexpr):  # fmt: skip
    """Block `block` of the columns of a tile's tokens, [CHUNK, BLOCK]; 0 beyond the last."""
    return load_rows(base + block * BLOCK, start, stride, keep, DIM - block * BLOCK, F.CHUNK, BLOCK,
                     True)  # fmt: skip


@triton.jit
def slot_rows(base, line, block, DIM: tl.constexpr, BLOCK: tl.constexpr, F: tl.constexpr):
    """(pointers, mask) of a block of columns of a line's slots, [PAD_M, BLOCK]."""
    offs_m = tl.arange(0, F.PAD_M)
    offs_d = block * BLOCK + tl.arange(0, BLOCK)
    rows = (line * F.MARKS + offs_m)[:, None]
    inside = (offs_m < F.MARKS)[:, None] & (offs_d < DIM)[None, :]
    return base + rows * DIM + offs_d[None, :], inside
