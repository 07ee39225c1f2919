"""Block-sparse attention: the public function and what it checks."""

from __future__ import annotations

import math
import numbers
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from flashmark import reference
from flashmark.arguments import (
    check_bias,
    check_block_mask,
    check_kv_lengths,
    check_qkv,
    check_query_offset,
    check_sinks,
    deterministic_or_default,
    finite,
)
from flashmark.autograd import refuse_tracing, transformed, transforms, under_autocast, unit_stride
from flashmark.block_sparse.call import Call, Options
from flashmark.block_sparse.operator import OPERATOR
from flashmark.dispatch import choose_backend
from flashmark.masks import BlockMask, Mask
from flashmark.masks.cache import block_mask_for
from flashmark.sharded import call_on_shards, is_sharded


@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | BlockMask | None = None, *,
    return_lse: Literal[False] = False, **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | BlockMask | None = None, *,
    return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | BlockMask | None = None, *,
    return_lse: bool, **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | BlockMask | None = None,
    *,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention that computes only the tiles a mask allows, forward and backward.

    Args:
        query: (B, Hq, Nq, D), float16, bfloat16, float32 or float64; D from 1 to 256.
        key: (B, Hkv, Nk, D), same dtype; Hq a multiple of Hkv (grouped-query attention).
        value: (B, Hkv, Nk, Dv), same dtype; Dv from 1 to 256.
        mask: what each query sees: None (every key), an expression such as `causal() &
            sliding_window(512)`, or a BlockMask from `compile_mask`. An expression of positions is
            compiled once for these sizes; one that reads tensors or calls a function is evaluated
            at each call.
        query_offset: int, or int32 or int64 (1,) or (B,): query i is row `query_offset + i` of a
            mask of the full size (an expression is compiled for Nk x Nk), for decoding into a
            preallocated cache.
        kv_lengths: int32 or int64 (B,): keys from `kv_lengths[b]` on are not visible, and what
            memory holds there is never read.
        bias: added to the scaled scores, differentiable. 2-d (Hq, rows + Nk - 1): entry k is added
            where j - i == k - (rows - 1), with rows the query length of the mask (Nq without
            `query_offset`) and i the row of the mask. 4-d: broadcastable to (B, Hq, Nq, Nk).
        scale: factor of q k^T; 1 / sqrt(D) when None.
        softcap: logits become softcap * tanh(logits / softcap), before the bias; None or 0: none.
        sinks: (Hq,) logits that join the softmax's denominator only, differentiable.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        dropout_seed: int or int64 tensor of one element; drawn from torch's generator when None.
        return_lse: also return the log of the denominator, sinks included, differentiable.
        deterministic: bitwise repeatable gradients; None follows
            `torch.are_deterministic_algorithms_enabled()`.
        backend: "auto", "triton", "cpu", "eager" or "reference". A named backend runs or raises.

    Returns:
        out (B, Hq, Nq, Dv) in the dtype of `query`; with `return_lse` also lse (B, Hq, Nq), natural
        logarithm, float32 (float64 for float64 inputs). A row that sees no key gives out 0, lse
        -inf and zero gradients.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, dtype or device.
        flashmark.BackendUnavailable: the named backend cannot run here.

    Under `torch.compile` a BlockMask is an input like any other, and an expression of positions a
    constant, wherever it is built. One that reads tensors or calls a function breaks the graph.

    Example:
        >>> import torch
        >>> from flashmark import block_sparse_attention, masks
        >>> query = torch.randn(1, 8, 50, 64)
        >>> key, value = torch.randn(1, 2, 50, 64), torch.randn(1, 2, 50, 32)
        >>> mask = masks.causal() & masks.sliding_window(16)
        >>> block_sparse_attention(query, key, value, mask).shape
        torch.Size([1, 8, 50, 32])

    Forward mode (`torch.func.jvp`) is one pass in linear memory, `vmap` one call. Derivatives of
    gradients and of tangents keep what autograd needs of the visible tiles.

    The order is scale, softcap, bias, mask, sinks. Causal masks are aligned to the bottom right:
    query i sits at position i + Nk - Nq. Algorithm: Dao et al., "FlashAttention" (2022), over the
    visible tiles only.
    """
    if is_sharded(query, key, value, bias, sinks, query_offset, kv_lengths):
        return call_on_shards(block_sparse_attention, **locals())
    refuse_tracing("block_sparse_attention")
    query, key, value = under_autocast(query, key, value)
    batch, heads, q_len, dim, kv_len = check_qkv(query, key, value)
    backend, device = choose_backend("block_sparse", backend, query), query.device
    scale = 1.0 / math.sqrt(dim) if scale is None else finite("scale", scale)
    softcap = 0.0 if softcap is None else finite("softcap", softcap, negative=False)
    dropout_p = finite("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p}")
    rows = q_len
    if query_offset is not None:
        rows = mask.q_len if isinstance(mask, BlockMask) else kv_len
        query_offset = check_query_offset(query_offset, batch, q_len, rows, device)
    if kv_lengths is not None:
        kv_lengths = check_kv_lengths(kv_lengths, batch, kv_len, device)
    if mask is not None:
        check_block_mask(mask, batch, heads, rows, kv_len, device)
    if bias is not None:
        check_bias(bias, (batch, heads, q_len, kv_len), rows, device)
    if sinks is not None:
        check_sinks(sinks, heads, device)
    dropout_seed = _seed(dropout_seed, device) if dropout_p > 0.0 else None

    if backend == "reference":
        return reference.block_sparse_attention(
            query, key, value, mask, query_offset=query_offset, kv_lengths=kv_lengths, bias=bias,
            scale=scale, softcap=softcap or None, sinks=sinks, dropout_p=dropout_p,
            dropout_seed=dropout_seed, return_lse=return_lse,
        )  # fmt: skip
    deterministic = deterministic_or_default(deterministic)
    compiled = block_mask_for
    if not torch.compiler.is_compiling() and transformed():
        compiled = transforms().mask_of
    call = Call(
        unit_stride(query), unit_stride(key), unit_stride(value),
        compiled(mask, batch, heads, rows, kv_len, device), scale, bias, sinks,
        query_offset, kv_lengths, dropout_seed, softcap, dropout_p, deterministic,
    )  # fmt: skip
    out, lse, _ = OPERATOR.run(call, backend)
    return (out, lse) if return_lse else out


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"dropout_seed: expected an int or an int64 tensor of one element on {device}, "
                f"got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
            )
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int | numbers.Integral):
        raise TypeError(f"dropout_seed: expected an int or a tensor, got {type(seed).__name__}")
    wrapped = (int(seed) + 2**63) % 2**64 - 2**63  # the same 64 bits, as a signed integer
    return torch.full((1,), wrapped, dtype=torch.int64, device=device)
