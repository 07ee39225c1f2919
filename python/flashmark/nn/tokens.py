"""What the attention modules do with tokens that `key_mask` leaves out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def check_tokens(x: Tensor, embed_dim: int, key_mask: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] != embed_dim:
        raise ValueError(f"x: expected shape (B, N, {embed_dim}), got {tuple(x.shape)}")
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask: expected a bool tensor, got {got}")
    if key_mask.shape != x.shape[:2] or key_mask.device != x.device:
        raise ValueError(
            f"key_mask: expected shape {tuple(x.shape[:2])} on {x.device} like x, "
            f"got {tuple(key_mask.shape)} on {key_mask.device}"
        )


class Packing(NamedTuple):
    """Where the tokens that take part were moved: together, in their order.

    Left padding, right padding and holes all become the same thing: `counts` tokens in a row.
    """

    order: Tensor  # int64 (B, N): the token that stands in each column
    counts: Tensor  # int32 (B,): tokens that take part

    @classmethod
    def of(cls, key_mask: Tensor, first: Tensor | None = None) -> Packing:
        """`first` (B,): the column of the first token that takes part; 0 when None."""
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
