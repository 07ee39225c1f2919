"""Attention from tokens to an encoder's output, as a module."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashmark.arguments import check_count
from flashmark.block_sparse import block_sparse_attention
from flashmark.nn.projected import check_dropout, check_sizes
from flashmark.nn.tokens import Packing, check_tokens


class Memory(NamedTuple):
    """Keys and values of an encoder's output, read once and used by every decoding step."""

    key: Tensor  # (B, Hkv, S, D), those that take part first
    value: Tensor  # (B, Hkv, S, D)
    lengths: Tensor | None  # int32 (B,), how many take part; None: all

    def select(self, index: Tensor) -> Memory:
        lengths = None if self.lengths is None else self.lengths[index]
        return Memory(self.key[index], self.value[index], lengths)


torch.serialization.add_safe_globals([Memory])  # for torch.load, weights_only=True


class CrossAttention(nn.Module):
    """Every token sees all of a memory: exact attention from x to another sequence.

    Args:
        embed_dim: width of the input and of the output.
        num_heads: query heads.
        memory_dim: width of the memory; `embed_dim` when None.
        num_kv_heads: key and value heads, a divisor of `num_heads`; as many when None.
        head_dim: width of a head; embed_dim / num_heads when None.
        bias: of the projections.
        dropout_p: probability of dropping an attention weight while training.

    `forward(x, memory, *, key_mask=None)`:
        x: (B, N, embed_dim), any floating-point dtype.
        memory: (B, S, memory_dim), or what `read` made of it.
        key_mask: bool (B, S), True where a token of the memory takes part.
    Returns (B, N, embed_dim); 0 before the output's bias where no token of the memory takes part.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        memory_dim: int | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        dropout_p: float = 0.0,
    ):
        super().__init__()
        sizes = check_sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        embed_dim, num_heads, kv_heads, self.head_dim = sizes
        self.embed_dim = self.memory_dim = embed_dim
        if memory_dim is not None:
            self.memory_dim = check_count("memory_dim", memory_dim)
        self.dropout_p = check_dropout(dropout_p)
        self.query = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias)
        self.key_value = nn.Linear(self.memory_dim, 2 * kv_heads * self.head_dim, bias=bias)
        self.out = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias)

    def read(self, memory: Tensor, key_mask: Tensor | None = None) -> Memory:
        """Keys and values of a memory (B, S, memory_dim)."""
        check_tokens(memory, self.memory_dim, key_mask, name="memory")
        lengths = None
        if key_mask is not None:
            packing = Packing.of(key_mask)
            memory = packing.pack(memory.masked_fill(~key_mask[..., None], 0.0))
            lengths = packing.counts
        key, value = self._heads(self.key_value(memory)).chunk(2, dim=1)
        return Memory(key, value, lengths)

    def forward(
        self, x: Tensor, memory: Tensor | Memory, *, key_mask: Tensor | None = None
    ) -> Tensor:
        check_tokens(x, self.embed_dim, None)
        if isinstance(memory, Tensor):
            memory = self.read(memory, key_mask)
        elif key_mask is not None:
            raise ValueError("key_mask: expected None with what `read` returned, got a tensor")
        if memory.key.shape[0] != x.shape[0]:
            raise ValueError(
                f"memory: expected a batch of {x.shape[0]} like x, got {memory.key.shape[0]}"
            )
        out = block_sparse_attention(
            self._heads(self.query(x)), memory.key, memory.value, kv_lengths=memory.lengths,
            dropout_p=self.dropout_p if self.training else 0.0,
        )  # fmt: skip
        return self.out(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
