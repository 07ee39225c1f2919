"""The layers of T5: attention without scale, its relative position bias, its keys in a cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashmark.block_sparse import block_sparse_attention
from flashmark.masks import Mask
from flashmark.models.layers import ACTIVATIONS, FeedForward, check_choice
from flashmark.nn.cache import KeyValueCache


@dataclass(frozen=True)
class T5Config:
    """Sizes and choices of a T5."""

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
    padding_token: int | None = 0  # None: labels may not be IGNORED
    start_token: int | None = 0
    mask: Mask | None = None  # what the decoder's tokens see of each other; causal when None

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
        self.attention_norm = T5Norm(config.width, eps=config.norm_eps)
        self.attention = T5Attention(config)
        self.cross_norm = T5Norm(config.width, eps=config.norm_eps) if decoder else None
        self.cross_attention = T5Attention(config) if decoder else None
        self.mlp_norm = T5Norm(config.width, eps=config.norm_eps)
        self.mlp = FeedForward(
            config.width, config.hidden, config.activation, gated=config.gated,
            dropout=config.dropout, wide_down=True,
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x, *, visible, bias, head_mask, memory, cross_head_mask, cache, number
    ) -> Tensor:
        """`visible` are the options of the self-attention: its mask and number of keys."""
        y = self.attention_norm(x)
        keys = self.attention.keys(y)
        if cache is not None:
            keys, visible = _held(cache.layers[number], *keys, **visible)
        y = self.attention(y, keys, bias=bias, head_mask=head_mask, **visible)
        x = clamped(x + self.dropout(y))
        if self.cross_attention is not None:
            key, value, lengths = memory if cache is None else cache.memory[number]
            y = self.cross_norm(x)
            y = self.cross_attention(y, (key, value), head_mask=cross_head_mask, kv_lengths=lengths)
            x = clamped(x + self.dropout(y))
        return clamped(x + self.dropout(self.mlp(self.mlp_norm(x))))


class T5Norm(nn.RMSNorm):
    """Root mean square in float32 at least; the result has the dtype of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        out = F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
        return out.to(self.weight.dtype)


def clamped(x: Tensor) -> Tensor:
    """Float16 without infinities, as published T5 models need it; other dtypes as they are."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), most - 1000, most)
    return x.clamp(-limit, limit)


def _held(
    cache: KeyValueCache, key: Tensor, value: Tensor, *, first: Tensor, counts: Tensor | int
) -> tuple[tuple[Tensor, Tensor], dict]:
    """All keys and values with the new ones, and what makes their number the visible prefix."""
    offset = cache.length - first
    cache.append(key, value, first, counts)
    options = {"mask": cache.mask, "query_offset": offset, "kv_lengths": cache.length}
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
