"""The layers of T5: attention without scale, its relative position bias, its keys in a cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashmark.block_sparse import block_sparse_attention
from flashmark.models.layers import ACTIVATIONS, FeedForward, check_choice
from flashmark.nn.cache import KeyValueCache


@dataclass(frozen=True)
class T5Config:
    vocab_size: int
    width: int = 128
    heads: int = 4
    head_dim: int = 32
    hidden: int = 512  # width of the feed-forward part
    encoder_layers: int = 2
    decoder_layers: int = 2
    activation: str = "relu"
    gated: bool = False  # True and "gelu_tanh" are T5 v1.1
    buckets: int = 32  # of relative positions
    max_distance: int = 128  # farther ones share the last bucket
    norm_eps: float = 1e-6
    dropout: float = 0.0
    tied: bool = True  # the output weights are the embedding
    scale_outputs: bool = True  # outputs times width^-1/2 before the output weights (not in v1.1)
    padding_token: int = 0
    start_token: int | None = 0

    def __post_init__(self):
        check_choice("activation", self.activation, ACTIVATIONS)


class RelativeBias(nn.Module):
    """A learned bias for each head and bucket of j - i, added to the scores of every layer."""

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__()
        self.bidirectional, self.max_distance = bidirectional, config.max_distance
        self.embedding = nn.Embedding(config.buckets, config.heads)

    def forward(self, q_len: int, kv_len: int) -> Tensor:
        """(heads, q_len + kv_len - 1): one entry for each j - i, as the operator wants it."""
        relative = torch.arange(1 - q_len, kv_len, device=self.embedding.weight.device)
        return self.embedding(self.bucket(relative)).T

    def bucket(self, relative: Tensor) -> Tensor:
        """Half of the buckets hold one distance each, the others logarithmic ranges of them."""
        buckets = self.embedding.num_embeddings
        first = torch.zeros_like(relative)
        if self.bidirectional:  # keys after the query have buckets of their own
            buckets //= 2
            first = (relative > 0) * buckets
            distance = relative.abs()
        else:
            distance = (-relative).clamp_min(0)
        exact = buckets // 2
        share = torch.log(distance.clamp_min(1).float() / exact)
        share = share / math.log(self.max_distance / exact) * (buckets - exact)
        far = (exact + share.long()).clamp_max(buckets - 1)
        return first + torch.where(distance < exact, distance, far)


class T5Layer(nn.Module):
    def __init__(self, config: T5Config, decoder: bool):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = T5Attention(config)
        self.cross_norm = nn.RMSNorm(config.width, eps=config.norm_eps) if decoder else None
        self.cross_attention = T5Attention(config) if decoder else None
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = FeedForward(
            config.width, config.hidden, config.activation, gated=config.gated,
            dropout=config.dropout,
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x, *, mask, bias, head_mask, memory, memory_mask, cross_head_mask, cache, number
    ) -> Tensor:
        y = self.attention_norm(x)
        if cache is None:
            keys, options = self.attention.keys(y), {"mask": mask}
        else:
            keys, options = _held(cache.layers[number], *self.attention.keys(y))
        x = x + self.dropout(self.attention(y, keys, bias=bias, head_mask=head_mask, **options))
        if self.cross_attention is not None:
            keys = None if cache is None else cache.memory[number]
            if keys is None:
                keys = self.cross_attention.keys(memory)
            if cache is not None:
                cache.memory[number] = keys
            y = self.cross_norm(x)
            y = self.cross_attention(y, keys, mask=memory_mask, head_mask=cross_head_mask)
            x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def _held(cache: KeyValueCache, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, Tensor], dict]:
    """All keys and values with the new ones, and what makes their number the visible prefix."""
    before = cache.length.clone()
    cache.append(key, value, torch.zeros_like(before), key.shape[2])
    options = {"mask": cache.mask, "query_offset": before, "kv_lengths": cache.length}
    return (cache.key, cache.value), options


class T5Attention(nn.Module):
    """Multi-head attention with scale 1 and no bias terms."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.value = nn.Linear(config.width, inner, bias=False)
        self.output = nn.Linear(inner, config.width, bias=False)

    def keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, S, head_dim) of (B, S, width)."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def forward(
        self, x: Tensor, keys: tuple[Tensor, Tensor], *, head_mask: Tensor | None, **options
    ) -> Tensor:
        """(B, N, width); `options` are those of block_sparse_attention."""
        dropout = self.dropout if self.training else 0.0
        out = block_sparse_attention(
            self._split(self.query(x)), *keys, scale=1.0, dropout_p=dropout, **options
        )
        if head_mask is not None:
            out = out * head_mask.to(out.dtype)[:, None, None]
        return self.output(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
