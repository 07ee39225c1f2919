"""Tokens that `key_mask` leaves out, and sequences packed one after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def check_tokens(x: Tensor, embed_dim: int, key_mask: Tensor | None, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] != embed_dim:
        raise ValueError(f"{name}: expected shape (B, N, {embed_dim}), got {tuple(x.shape)}")
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask: expected a bool tensor, got {got}")
    if key_mask.shape != x.shape[:2] or key_mask.device != x.device:
        raise ValueError(
            f"key_mask: expected shape {tuple(x.shape[:2])} on {x.device} like {name}, "
            f"got {tuple(key_mask.shape)} on {key_mask.device}"
        )


class Packing(NamedTuple):
    """New places of the tokens that take part: next to each other, in their order.

    Left padding, right padding and holes all become the same thing: `counts` tokens in a row.
    """

    order: Tensor  # int64 (B, N): the token that stands in each column
    counts: Tensor  # int32 (B,): tokens that take part

    @classmethod
    def of(cls, key_mask: Tensor, first: Tensor | None = None) -> Packing:
        """`first` (B,): the column of the first token that takes part; 0 when None."""
        if key_mask.shape[1] == 1:  # a decoding step: nothing to sort
            return cls(torch.zeros_like(key_mask, dtype=torch.int64), key_mask[:, 0].int())
        order = (~key_mask).to(torch.uint8).argsort(dim=1, stable=True)
        if first is not None:
            n = key_mask.shape[1]
            columns = torch.arange(n, device=key_mask.device)
            order = order.gather(1, (columns - first[:, None]) % max(n, 1))
        return cls(order, key_mask.sum(1, dtype=torch.int32))

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, E) in the new order."""
        return x.gather(1, self.order[..., None].expand_as(x))

    def unpack(self, x: Tensor) -> Tensor:
        """(B, N, E) back in the order of the tokens."""
        return torch.zeros_like(x).scatter(1, self.order[..., None].expand_as(x), x)


def check_packed(cu_seqlens: Tensor | None, x: Tensor, key_mask, cache) -> None:
    """`cu_seqlens` with x (1, N, ...): bounds of sequences, without padding and without a cache."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected an int32 tensor, got {got}")
    if x.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens: expected shape (S + 1,) with S >= 1 and a batch of 1, "
            f"got {tuple(cu_seqlens.shape)} and a batch of {x.shape[0]}"
        )
    if key_mask is not None or cache is not None:
        other = "cache" if key_mask is None else "key_mask"
        raise ValueError(f"{other}: expected None with cu_seqlens, got one")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return  # elsewhere it would wait for the device
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != x.shape[1] or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens: expected numbers rising from 0 to {x.shape[1]}, got {bounds}"
        )


def packed_places(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Int64 (1, N): how many tokens of its own sequence stand before each."""
    every = torch.arange(tokens, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), every, right=True)
    return (every - cu_seqlens[row])[None]
