"""Base of the attention modules: projections into grouped heads and back."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor, nn

from flashmark.arguments import check_count

NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # to compute in


class ProjectedAttention(nn.Module):
    """x -> query, key, value -> heads of attention -> output, all of width `embed_dim`.

    `qkv` is one linear layer whose rows are those of the queries, of the keys and of the values;
    `out` maps the heads back.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        bias: bool,
    ):
        super().__init__()
        embed_dim = check_count("embed_dim", embed_dim)
        num_heads = check_count("num_heads", num_heads)
        kv_heads = num_heads
        if num_kv_heads is not None:
            kv_heads = check_count("num_kv_heads", num_kv_heads)
        if head_dim is not None:
            head_dim = check_count("head_dim", head_dim)
        if num_heads % kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of {num_heads}, got {kv_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim {embed_dim} without head_dim, "
                f"got {num_heads}"
            )
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.qkv = nn.Linear(embed_dim, (num_heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query (B, Hq, N, D), key and value (B, Hkv, N, D) of x (B, N, embed_dim)."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)

    def merge_heads(self, out: Tensor) -> Tensor:
        """(B, N, embed_dim) of (B, Hq, N, D)."""
        return self.out(out.transpose(1, 2).flatten(2))

    def _place(self, dtype, device) -> dict:
        """Dtype and device of a cache: those of the weights, unless given.

        `qkv` may have been replaced by a quantized or wrapped layer: its dtype is then that of the
        first parameter that numbers are computed in.
        """
        own = [*self.qkv.parameters(), *self.parameters()]
        if dtype is None:
            dtype = next((x.dtype for x in own if x.dtype in NUMBERS), torch.get_default_dtype())
        if device is None:
            device = next((x.device for x in own), torch.get_default_device())
        return {"dtype": dtype, "device": torch.device(device)}

    def _repr(self, *names: str) -> str:
        heads = f"{self.embed_dim}, heads={self.num_heads}, kv_heads={self.num_kv_heads}"
        options = "".join(f", {name}={getattr(self, name)}" for name in names)
        return f"{heads}, head_dim={self.head_dim}{options}"


def check_rotary(rotary: float | bool, rotary_dim: int, largest: int) -> None:
    if rotary is False:
        return
    if isinstance(rotary, bool) or not isinstance(rotary, numbers.Real) or not rotary > 0:
        raise ValueError(f"rotary: expected False or the base of wavelengths > 0, got {rotary!r}")
    if rotary_dim % 2 or not 0 < rotary_dim <= largest:
        raise ValueError(f"rotary_dim: expected an even int from 2 to {largest}, got {rotary_dim}")
