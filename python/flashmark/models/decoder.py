"""A decoder-only language model whose layers attend as they are told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashmark.masks import Mask, causal, sliding_window
from flashmark.models.layers import (
    ACTIVATIONS,
    NORMS,
    FeedForward,
    ShortConvolution,
    check_choice,
    check_ids,
    check_key_mask,
    check_room,
    run_layer,
    token_counts,
)
from flashmark.nn import BlockSparseAttention, HybridAttention, NystromAttention

Attention = str | Callable[["DecoderConfig"], nn.Module]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of a Decoder; the defaults are Llama's.

    attention: "exact", "window", "nystrom", "hybrid", "bidirectional" or a function from this
        config to a module like those of `flashmark.nn`; or a sequence of these, one a layer.
    mask: what "exact" layers show; plain causal when None. All of them hold the one object.
    positions: "rotary" (in layers of exact, window and hybrid attention), "learned" or "none".
    convolution: taps of a short causal convolution before each attention, 0 for none.
    """

    vocab_size: int
    width: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int | None = None  # as many as heads
    head_dim: int | None = None  # width / heads
    hidden: int | None = None  # width of the feed-forward part: 4 width
    attention: Attention | Sequence[Attention] = "exact"
    mask: Mask | None = None
    window: int = 256  # of "window", in tokens; of "hybrid", in tokens of a chunk
    landmarks: int = 32  # of "nystrom" and "hybrid", per key head
    merge: str = "slots"  # of "hybrid"
    decay: bool = True  # of "nystrom"
    positions: str = "rotary"
    rotary_theta: float = 10_000.0
    max_length: int | None = None  # of learned positions
    convolution: int = 0
    norm: str = "rms"
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    dropout: float = 0.0
    tied: bool = True  # the output weights are the embedding

    def __post_init__(self):
        check_choice("positions", self.positions, ("rotary", "learned", "none"))
        check_choice("norm", self.norm, NORMS)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.positions == "learned" and self.max_length is None:
            raise ValueError("max_length: expected an int with positions='learned', got None")
        if not isinstance(self.attention, str) and isinstance(self.attention, Sequence):
            if len(self.attention) != self.layers:
                raise ValueError(
                    f"attention: expected {self.layers} of them, one a layer, "
                    f"got {len(self.attention)}"
                )
        for kind in self.attentions():
            if not callable(kind):
                check_choice("attention", kind, ATTENTIONS)

    def attentions(self) -> list[Attention]:
        """The attention of each layer."""
        one = isinstance(self.attention, str) or callable(self.attention)
        return [self.attention] * self.layers if one else list(self.attention)


def _exact(config: DecoderConfig, mask: Mask | None, is_causal: bool = True) -> nn.Module:
    return BlockSparseAttention(
        config.width, config.heads, num_kv_heads=config.kv_heads, head_dim=config.head_dim,
        mask=mask, is_causal=is_causal, rotary=_rotary(config), bias=config.bias,
        dropout_p=config.dropout,
    )  # fmt: skip


@functools.cache
def _window(left: int) -> Mask:
    """One object for all layers: a mask is compiled once for each object and shape."""
    return causal() & sliding_window(left)


def _nystrom(config: DecoderConfig) -> nn.Module:
    return NystromAttention(
        config.width, config.heads, config.landmarks, num_kv_heads=config.kv_heads,
        head_dim=config.head_dim, decay=config.decay, bias=config.bias,
    )  # fmt: skip


def _hybrid(config: DecoderConfig) -> nn.Module:
    return HybridAttention(
        config.width, config.heads, config.landmarks, num_kv_heads=config.kv_heads,
        head_dim=config.head_dim, window=config.window, merge=config.merge,
        rotary=_rotary(config), bias=config.bias,
    )  # fmt: skip


def _rotary(config: DecoderConfig) -> float | bool:
    return config.rotary_theta if config.positions == "rotary" else False


ATTENTIONS: dict[str, Callable[[DecoderConfig], nn.Module]] = {
    "exact": lambda config: _exact(config, config.mask),
    "window": lambda config: _exact(config, _window(config.window)),
    "nystrom": _nystrom,
    "hybrid": _hybrid,
    "bidirectional": lambda config: _exact(config, None, is_causal=False),
}


class DecoderCache:
    """What a Decoder remembers between calls, a cache per layer, updated in place.

    Attributes:
        length: int32 (B,), tokens read so far; those that key_mask left out are not counted.
        max_length: tokens that fit.
    """

    def __init__(self, layers: list[tuple], length: Tensor, max_length: int):
        self.layers, self.length, self.max_length = layers, length, max_length


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, attention: nn.Module):
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.width, eps=config.norm_eps)
        self.convolution = None
        if config.convolution:
            self.convolution = ShortConvolution(config.width, config.convolution)
        self.attention = attention
        self.mlp_norm = norm(config.width, eps=config.norm_eps)
        self.mlp = FeedForward(
            config.width, config.hidden or 4 * config.width, config.activation,
            gated=config.gated, bias=config.bias,
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *, key_mask: Tensor | None, cache: tuple | None) -> Tensor:
        remembered, tail = (None, None) if cache is None else cache
        y = self.attention_norm(x)
        if self.convolution is not None:
            y = y + self.convolution(y, key_mask, tail)
        x = x + self.dropout(self.attention(y, key_mask=key_mask, cache=remembered))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """Token ids to the logits of the next token. `init_cache` and `cache=` decode step by step.

    `recompute = True` on an instance recomputes each layer's activations in backward.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_length, config.width)
        self.layers = nn.ModuleList(
            Layer(config, kind(config) if callable(kind) else ATTENTIONS[kind](config))
            for kind in config.attentions()
        )
        self.norm = NORMS[config.norm](config.width, eps=config.norm_eps)
        self.head = None
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    def forward(
        self,
        input_ids: Tensor,
        *,
        key_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Logits (B, N, V) for the token after each of `input_ids`.

        Args:
            input_ids: (B, N) integers.
            key_mask: bool (B, N), False where a token is padding, on either side: as if it were
                not there. Its own logits mean nothing.
            cache: from `init_cache`. The tokens follow those that it holds, and are added to it.
                Without gradients only.

        Raises:
            ValueError, TypeError: a wrong shape or dtype, or no room for the tokens.
        """
        check_ids("input_ids", input_ids, self.config.vocab_size)
        check_key_mask("key_mask", key_mask, input_ids)
        if cache is not None:
            if not isinstance(cache, DecoderCache):
                raise TypeError(
                    f"cache: expected what init_cache returns, got {type(cache).__name__}"
                )
            check_room(cache, "input_ids", input_ids, key_mask)
        x = self.embed(input_ids)
        if self.positions is not None:
            x = x + self.positions(self._places(input_ids, key_mask, cache))
        x = self.dropout(x)
        for number, layer in enumerate(self.layers):
            held = None if cache is None else cache.layers[number]
            x = run_layer(layer, self.recompute, x, key_mask=key_mask, cache=held)
        if cache is not None:
            cache.length += token_counts(input_ids, key_mask)
        x = self.norm(x)
        return x @ self.embed.weight.T if self.head is None else self.head(x)

    def init_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DecoderCache:
        """An empty cache: keys and values of `max_length` tokens a sample where attention is exact,
        a state of constant size where it is not. Like the weights unless told otherwise."""
        if self.positions is not None and max_length > self.config.max_length:
            raise ValueError(
                f"max_length: expected at most {self.config.max_length}, "
                f"the learned positions, got {max_length}"
            )
        weight = self.embed.weight
        dtype, device = dtype or weight.dtype, torch.device(device or weight.device)
        layers = []
        for layer in self.layers:
            tail = layer.convolution and layer.convolution.init_cache(batch, dtype, device)
            layers.append((layer.attention.init_cache(batch, max_length, dtype, device), tail))
        length = torch.zeros(batch, dtype=torch.int32, device=device)
        return DecoderCache(layers, length, max_length)

    def _places(self, ids: Tensor, key_mask: Tensor | None, cache: DecoderCache | None) -> Tensor:
        """(B | 1, N): how many tokens stand before each."""
        if key_mask is None:
            places = torch.arange(ids.shape[1], device=ids.device)[None]
        else:
            places = (key_mask.cumsum(1) - 1).clamp_min(0)
        if cache is not None:
            return places + cache.length[:, None]
        if ids.shape[1] > self.config.max_length:
            raise ValueError(
                f"input_ids: expected at most {self.config.max_length} tokens, "
                f"the learned positions, got {ids.shape[1]}"
            )
        return places

    @torch.no_grad()
    def _initialise(self) -> None:
        """Variance 1 from layer to layer; what is added to the residual stream stays small."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.width**-0.5)
        for layer in self.layers:
            added = [layer.mlp.down, getattr(layer.attention, "out", None)]
            for linear in added:
                if isinstance(linear, nn.Linear):
                    linear.weight /= (2 * len(self.layers)) ** 0.5
