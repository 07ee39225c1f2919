"""FlexAttention's `flex_attention` on flashmark's kernels: change the import, keep the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

from flashmark.block_sparse import block_sparse_attention
from flashmark.masks import BlockMask, Mask, from_flex

__all__ = ["flex_attention"]


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: FlexBlockMask | BlockMask | Mask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """`torch.nn.attention.flex_attention.flex_attention` without `score_mod`, compiled or not.

    Args:
        query: (B, Hq, Nq, D).
        key: (B, Hkv, Nk, D); Hq a multiple of Hkv with `enable_gqa`, else equal.
        value: (B, Hkv, Nk, Dv).
        block_mask: of FlexAttention, converted at each call, as the tensors that it reads may have
            changed; or of flashmark: `flashmark.masks.from_flex(block_mask)` converts once.
        scale: factor of q k^T; 1 / sqrt(D) when None.
        return_lse: also return the log-sum-exp (B, Hq, Nq), natural logarithm.
        kernel_options: of FlexAttention's templates; nothing here reads them.
        return_aux: `AuxRequest(lse=True)` returns (out, AuxOutput).

    Raises:
        NotImplementedError: `score_mod`, or the maxima of scores.
        ValueError, TypeError: as `flashmark.block_sparse_attention`.

    Inside `torch.compile` a FlexAttention BlockMask breaks the graph at its conversion;
    `flashmark.masks.from_flex(block_mask)`, made outside, does not.
    """
    if score_mod is not None:
        raise NotImplementedError(
            "score_mod: expected None, got a function; use `bias` (relative or dense, with a "
            "gradient) or `softcap` of flashmark.block_sparse_attention"
        )
    if return_aux is not None and return_aux.max_scores:
        raise NotImplementedError("return_aux: expected max_scores=False, got True")
    if not enable_gqa and query.dim() == key.dim() == 4 and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"key: expected {query.shape[1]} heads like query without enable_gqa, got "
            f"{key.shape[1]}"
        )
    if isinstance(block_mask, FlexBlockMask):
        block_mask = _converted(block_mask)
    want_lse = return_lse or (return_aux is not None and return_aux.lse)
    if not want_lse:
        out = block_sparse_attention(query, key, value, block_mask, scale=scale)
        return out if return_aux is None else (out, AuxOutput())
    out, lse = block_sparse_attention(query, key, value, block_mask, scale=scale, return_lse=True)
    if return_aux is None:
        return out, lse
    return out, AuxOutput(lse=lse)


@torch.compiler.disable
def _converted(block_mask: FlexBlockMask) -> BlockMask:
    return from_flex(block_mask)
