"""Base of the attention modules: projections into grouped heads and back."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor, nn

from flashmark.arguments import MAX_DIM, check_count, finite

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
        sizes = check_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = sizes
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(self.embed_dim, rows, bias=bias)
        self.out = nn.Linear(self.num_heads * self.head_dim, self.embed_dim, bias=bias)

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


def check_sizes(
    embed_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None
) -> tuple[int, int, int, int]:
    """Checked sizes, with the defaults of `num_kv_heads` and `head_dim`."""
    embed_dim = check_count("embed_dim", embed_dim)
    kv_heads = num_heads = check_count("num_heads", num_heads)
    if num_kv_heads is not None:
        kv_heads = check_count("num_kv_heads", num_kv_heads)
    if num_heads % kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of {num_heads}, got {kv_heads}")
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of embed_dim {embed_dim} without head_dim, "
            f"got {num_heads}"
        )
    head_dim = embed_dim // num_heads if head_dim is None else head_dim
    return embed_dim, num_heads, kv_heads, check_count("head_dim", head_dim, most=MAX_DIM)


def check_softcap(softcap: float | None) -> float | None:
    return None if softcap is None else finite("softcap", softcap, negative=False)


def check_dropout(dropout_p: float) -> float:
    dropout_p = finite("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p}")
    return dropout_p


def check_rotary(rotary: float | bool, rotary_dim: int, largest: int) -> None:
    if rotary is False:
        return
    if isinstance(rotary, bool) or not isinstance(rotary, numbers.Real) or not rotary > 0:
        raise ValueError(f"rotary: expected False or the base of wavelengths > 0, got {rotary!r}")
    if check_count("rotary_dim", rotary_dim, 0) % 2 or not 0 < rotary_dim <= largest:
        raise ValueError(f"rotary_dim: expected an even int from 2 to {largest}, got {rotary_dim}")
