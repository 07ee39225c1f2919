"""Attention over chosen blocks: the public function and what it checks."""

from __future__ import annotations

from torch import Tensor

from flashmark import reference
from flashmark.arguments import deterministic_or_default
from flashmark.autograd import refuse_tracing, under_autocast, unit_stride
from flashmark.routed.call import Call
from flashmark.routed.checks import Checked, check_call, check_indices
from flashmark.routed.operator import OPERATOR
from flashmark.sharded import over_shards


@over_shards
def block_topk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    block_size: int = 64,
    near: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    kv_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax attention in which each query reads its own key block, the blocks just before
    it, and those that `indices` names.

    Blocks are cut by position: block c holds keys c * block_size up to (c + 1) * block_size - 1,
    counted from the start of the sequence. Query i sits at position p = i + Nk - Nq, in block own =
    p // block_size. It sees the keys j <= p of the blocks own - near up to own, and of the chosen
    blocks before those.

    Args:
        query: (B, Hq, Nq, D), float16, bfloat16, float32 or float64; D from 1 to 256.
        key: (B, Hkv, Nk, D), same dtype; Hq a multiple of Hkv (grouped-query attention).
        value: (B, Hkv, Nk, Dv), same dtype; Dv from 1 to 256.
        indices: int32 or int64 (B, Hkv, Nq, K): the blocks that each query reads beside those near
            it, for all query heads of a group; 0 up to own - near - 1, each at most once, or -1 for
            none. They have no gradient.
        block_size: keys of a block, 1 to 1024.
        near: how many blocks before its own a query sees as well.
        scale: factor of q k^T; 1 / sqrt(D) when None.
        softcap: logits become softcap * tanh(logits / softcap); None or 0: none.
        sinks: (Hq,) logits that join the softmax's denominator only, differentiable.
        query_offset: int, or int32 or int64 (1,) or (B,): query i sits at position `query_offset +
            i`, for decoding into a preallocated cache.
        kv_lengths: int32 or int64 (B,): keys from `kv_lengths[b]` on are not visible, and what
            memory holds there is never read.
        key_mask: bool (B, Nk), True where the key takes part.
        cu_seqlens: int32 or int64 (S + 1,), with B = 1 and Nq = Nk: packed sequences; positions and
            blocks count from each sequence's start.
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
            On a GPU the values of `indices` are not looked at, which would wait for the device: one
            out of range names no block; one given twice may count once or twice.
        flashmark.BackendUnavailable: the named backend cannot run here.

    Memory is linear in Nq and Nk. Forward mode and derivatives of gradients keep the gathered keys
    and values, Nq (near + 1 + K) block_size of them. A choice of all blocks is exact causal
    attention. Source: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025),
    with a choice per query token as in Yuan et al., "Native Sparse Attention" (2025).

    Example:
        >>> import torch
        >>> from flashmark import block_topk_attention
        >>> query, key, value = (torch.randn(1, 2, 64, 16) for _ in range(3))
        >>> chosen = torch.where(torch.arange(64) >= 32, 0, -1).int().expand(1, 2, 64).unsqueeze(-1)
        >>> block_topk_attention(query, key, value, chosen, block_size=16, near=1).shape
        torch.Size([1, 2, 64, 16])
    """
    refuse_tracing("block_topk_attention")
    query, key, value = under_autocast(query, key, value)
    checked = check_call(
        query, key, value, block_size, near, scale, softcap, sinks,
        query_offset, kv_lengths, key_mask, cu_seqlens, backend,
    )  # fmt: skip
    indices = check_indices(indices, query, key, block_size, near, checked)
    if checked.backend == "reference":
        return reference.block_topk_attention(
            query, key, value, indices, block_size=block_size, near=near, scale=scale,
            softcap=softcap, sinks=sinks, query_offset=query_offset, kv_lengths=kv_lengths,
            key_mask=key_mask, cu_seqlens=cu_seqlens, return_lse=return_lse,
        )  # fmt: skip
    out, lse = run(query, key, value, indices, block_size, near, sinks, key_mask, checked,
                   deterministic)  # fmt: skip
    return (out, lse) if return_lse else out


def run(
    query, key, value, indices, block_size, near, sinks, key_mask, checked: Checked, deterministic
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments."""
    deterministic = deterministic_or_default(deterministic)
    call = Call(
        unit_stride(query), unit_stride(key), unit_stride(value), indices, int(block_size),
        int(near), checked.scale, sinks, checked.query_offset, checked.kv_lengths, key_mask,
        checked.starts, checked.softcap, deterministic,
    )  # fmt: skip
    out, lse = OPERATOR.run(call, checked.backend)
    return out, lse
