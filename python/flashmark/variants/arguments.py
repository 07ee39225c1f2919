"""Checks that the variants share."""

from __future__ import annotations

from torch import Tensor

from flashmark.arguments import check_key_mask, check_qkv


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, *, same_length: bool = True
) -> None:
    """query, key and value fit together and, where self-attention needs it, are of one length."""
    check_qkv(query, key, value)
    if same_length and query.shape[2] != key.shape[2]:
        raise ValueError(f"key: expected length {query.shape[2]} like query, got {key.shape[2]}")
    check_key_mask(key_mask, (key.shape[0], key.shape[2]), query.device)


def empty(query: Tensor, value: Tensor) -> Tensor:
    """Empty output for no sample or no token, with a gradient."""
    return query[..., :1].expand(*query.shape[:3], value.shape[3])
