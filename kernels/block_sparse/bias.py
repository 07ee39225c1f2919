"""The gradient of a bias: a tile first sums its addends of each entry, then adds each sum once.

There are two kinds of addition. Float32 atomics are fast, but their order, so their last bit,
varies. Where a result must repeat bitwise, the total is kept in 64-bit integers: a power of two,
chosen from a bound on the total, turns addends into fixed point, and integers add up the same in
any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FIXED_POINT_BITS = 60


class BiasGradient(NamedTuple):
    """Buffers to which a kernel adds the gradient of a bias; all None when there is none."""

    total: (
        Tensor | None
    )  # float32; int64 in fixed point; of the bias's dtype where each entry is written once
    strides: tuple[int, int, int, int]  # (batch, head, query, key)
    unit: Tensor | None  # fixed point only: the number that stands for 1.0, float32, one element
    end: None = None  # Triton 3.6.0 loses a 1 in the tuples above unless None follows them


@triton.jit
def add_entries(entries, addend, mask, gradient, F: tl.constexpr):
    """Add to entries of the total, or write them where no other tile does."""
    if F.BIAS_OWNED:
        tl.store(entries, addend.to(entries.dtype.element_ty), mask=mask)
    else:
        if gradient.unit is not None:
            addend = (addend * tl.load(gradient.unit)).to(tl.int64)
        tl.atomic_add(entries, addend, mask=mask, sem="relaxed")


@triton.jit
def add_diagonals(ds_t, base, start_n, start_r, gradient, sizes, F: tl.constexpr):
    """Sum ds^T [BLOCK_N, BLOCK_M] along its diagonals j - i, the entries of a relative bias.

    Turning row n by n takes (n, m) to column (n - m) mod BLOCK_M: a column then holds few
    diagonals, BLOCK_M apart, and each is a range of rows.
    """
    c = tl.arange(0, F.BLOCK_M)
    # [BLOCK_N, BLOCK_M]
    n_minus_c = tl.arange(0, F.BLOCK_N)[:, None] - c[None, :]
    turned = tl.gather(ds_t, n_minus_c & (F.BLOCK_M - 1), 1)
    for k in tl.static_range(-1, (F.BLOCK_N + F.BLOCK_M - 1) // F.BLOCK_M):
        on_diagonal = (n_minus_c >= k * F.BLOCK_M) & (n_minus_c < (k + 1) * F.BLOCK_M)
        # [BLOCK_M]
        addend = tl.sum(tl.where(on_diagonal, turned, 0.0), 0)
        entry = start_n - start_r + c + k * F.BLOCK_M + sizes.rows - 1
        inside = (entry >= 0) & (entry < sizes.rows + sizes.kv_len - 1)
        add_entries(base + entry, addend, inside, gradient, F)


@triton.jit
def add_elements(ds_t, base, start_n, start_i, gradient, sizes, F: tl.constexpr):
    """Add ds^T [BLOCK_N, BLOCK_M] to a dense bias, summed first over a dimension that the bias does
    not have.
    """
    i = start_i + tl.arange(0, F.BLOCK_M)
    n = start_n + tl.arange(0, F.BLOCK_N)
    has_i = (i >= 0) & (i < sizes.q_len)
    has_n = n < sizes.kv_len
    to_i = i.to(tl.int64) * gradient.strides[2]
    to_n = n.to(tl.int64) * gradient.strides[3]
    if F.BIAS_Q and F.BIAS_K:
        # [BLOCK_N, BLOCK_M]
        entries = base + (to_n[:, None] + to_i[None, :])
        add_entries(entries, ds_t, has_n[:, None] & has_i[None, :], gradient, F)
    elif F.BIAS_Q:
        add_entries(base + to_i, tl.sum(ds_t, 0), has_i, gradient, F)
    elif F.BIAS_K:
        add_entries(base + to_n, tl.sum(ds_t, 1), has_n, gradient, F)
    else:
        add_entries(base, tl.sum(tl.sum(ds_t, 1), 0), None, gradient, F)


@triton.jit
def add_bias_gradient(ds_t, b, h, start_n, start_r, offset, gradient, sizes, F: tl.constexpr):
    """Add the gradient of a tile's logits, ds^T [BLOCK_N, BLOCK_M], to that of the bias."""
    base = gradient.total + tl.cast(b, tl.int64) * gradient.strides[0]
    base += tl.cast(h, tl.int64) * gradient.strides[1]
    if F.BIAS == "relative":
        add_diagonals(ds_t, base, start_n, start_r, gradient, sizes, F)
    else:
        add_elements(ds_t, base, start_n, start_r - offset, gradient, sizes, F)


def start(
    bias: Tensor | None, dout: Tensor, value: Tensor, delta: Tensor, call, deterministic: bool
) -> BiasGradient:
    """Zeroed storage for the gradient of the bias."""
    if bias is None:
        return BiasGradient(None, (0, 0, 0, 0), None)
    if call.features.BIAS_OWNED:
        total, unit = torch.zeros_like(bias, memory_format=torch.contiguous_format), None
    elif deterministic:
        total = torch.zeros(bias.shape, dtype=torch.int64, device=bias.device)
        unit = _unit(bias, dout, value, delta, call)
    else:
        total, unit = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device), None
    return BiasGradient(total, strides(total.shape, total.stride()), unit)


def finish(gradient: BiasGradient, bias: Tensor | None) -> Tensor | None:
    """The gradient in the bias's dtype."""
    if bias is None:
        return None
    if gradient.unit is not None:
        return (gradient.total.double() / gradient.unit).to(bias.dtype)
    return gradient.total.to(bias.dtype)


def strides(shape: tuple[int, ...], steps: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Batch, head, query and key stride of a bias; 0 along a dimension of size 1. A relative bias
    has its entries in a row.
    """
    if len(shape) == 2:
        return 0, steps[0], 0, 1
    batch, head, row, column = (
        0 if size == 1 else step for size, step in zip(shape, steps, strict=True)
    )
    return batch, head, row, column


def _unit(bias: Tensor, dout: Tensor, value: Tensor, delta: Tensor, call) -> Tensor:
    """A power of two that keeps every sum of |p (dp - Delta)|, p <= 1, below 2^FIXED_POINT_BITS. No
    host sync.
    """
    batch, heads, q_len, _ = dout.shape
    addends = batch * q_len
    if bias.dim() == 4:
        addends = batch * heads * q_len * value.shape[2] // max(1, bias.numel())
    norms = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
    lengths = call.modifiers.lengths
    if lengths is not None:  # memory behind a sample's keys may hold anything
        beyond = torch.arange(value.shape[2], device=value.device) >= lengths.view(-1, 1, 1)
        norms = norms.masked_fill(beyond, 0.0)
    dp = torch.linalg.vector_norm(dout, dim=-1, dtype=torch.float32).amax() * norms.amax()
    bound = (dp * call.modifiers.keep_scale + delta.abs().amax()).double() * max(1, addends)
    return torch.exp2(FIXED_POINT_BITS - bound.log2().ceil()).clamp(max=2.0**100).float()
