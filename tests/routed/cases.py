"""Calls of attention over chosen blocks that every backend is tested with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flashmark import reference
from tests import helpers


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call, how its blocks are cut, and what else it takes."""

    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 90
    kv_len: int = 90
    dim: int = 16
    v_dim: int = 16
    block_size: int = 16
    choices: int = 2
    near: int = 1
    sinks: bool = False
    masked: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the public function, without tensors that have a gradient."""
        return {"block_size": self.block_size, "near": self.near, **self.options} | (
            {"key_mask": key_mask(self.batch, self.kv_len)} if self.masked else {}
        )

    def tensors(
        self, dtype: torch.dtype = torch.float32, *, layout: str = "contiguous", seed: int = 0
    ) -> dict[str, Tensor]:
        """Tensors that have a gradient."""
        given = helpers.qkv(
            self.batch, self.heads, self.q_len, self.dim, kv_heads=self.kv_heads,
            kv_len=self.kv_len, v_dim=self.v_dim, dtype=dtype, layout=layout, seed=seed, grad=False,
        )  # fmt: skip
        tensors = dict(zip(("query", "key", "value"), given, strict=True))
        if self.sinks:
            tensors["sinks"] = helpers.randn(self.heads, seed=9).to(dtype)
        return tensors

    def indices(self, seed: int = 0) -> Tensor:
        """int32 (B, Hkv, Nq, K): blocks before the near ones at random, each once."""
        offset, lengths = (self.options.get(x) for x in ("query_offset", "cu_seqlens"))
        at, first = reference.routed._places(self.q_len, self.kv_len, offset, lengths, "cpu")
        far = ((at - first).div(self.block_size, rounding_mode="floor") - self.near).clamp(min=0)
        shape = self.batch, self.kv_heads, self.q_len, max(self.choices, int(far.max()), 1)
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(shape, generator=generator)
        number = torch.arange(shape[3])
        order = order.masked_fill(number >= far[:, None, :, None], 2.0)
        values, blocks = order.sort(-1)
        blocks = blocks.masked_fill(values == 2.0, -1)
        return helpers.poisoned(blocks[..., : self.choices].to(torch.int32))


def key_mask(batch: int, kv_len: int) -> Tensor:
    return torch.rand(batch, kv_len, generator=torch.Generator().manual_seed(3)) > 0.3


CASES = {
    "plain": Case(),
    "no-choice": Case(choices=0),
    "own-block-only": Case(choices=0, near=0),
    "one-token": Case(q_len=1, kv_len=1),
    "shorter-than-a-block": Case(q_len=9, kv_len=9, block_size=64),
    "blocks-of-one": Case(block_size=1, choices=5, q_len=40, kv_len=40),
    "odd-blocks": Case(block_size=7, choices=4, near=0),
    "blocks-of-100": Case(block_size=100, q_len=330, kv_len=330, choices=1, near=0),
    "odd-dims": Case(dim=33, v_dim=17, batch=2),
    "wide": Case(dim=256, v_dim=255, heads=2, kv_heads=1),
    "dim-1": Case(dim=1, v_dim=3),
    "one-key-head": Case(heads=6, kv_heads=1, choices=3),
    "no-groups": Case(heads=2, kv_heads=2, batch=2, near=2),
    "all-blocks": Case(choices=5, near=0),
    "longer-keys": Case(batch=2, kv_len=150, choices=4),
    "sinks": Case(batch=2, sinks=True),
    "softcap": Case(options={"softcap": 1.5}),
    "scale": Case(options={"scale": -0.4}),
    "key-mask": Case(batch=2, masked=True),
    "lengths": Case(batch=2, kv_len=150, options={"kv_lengths": integers(150, 83)}),
    "no-keys": Case(batch=2, sinks=True, options={"kv_lengths": integers(0, 7)}),
    "offsets": Case(batch=2, kv_len=150, options={"query_offset": integers(60, 13)}),
    "decode": Case(
        batch=2, q_len=1, kv_len=150,
        options={"query_offset": integers(149, 82), "kv_lengths": integers(150, 83)},
    ),
    "few-queries": Case(batch=1, q_len=5, kv_len=150, choices=4),
    "packed": Case(options={"cu_seqlens": integers(0, 7, 7, 55, 90)}),
    "all-features": Case(
        batch=2, kv_len=150, sinks=True, masked=True, dim=20,
        options={
            "softcap": 2.0, "scale": 0.5, "query_offset": integers(60, 40),
            "kv_lengths": integers(150, 111),
        },
    ),
}  # fmt: skip
