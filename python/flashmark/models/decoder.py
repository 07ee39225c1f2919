"""A decoder-only language model with a choice of attention for each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashmark.masks import Mask, causal, sliding_window
from flashmark.models.decoder_cache import DecoderCache, GivenMemory, LayerCache
from flashmark.models.layers import (
    ACTIVATIONS,
    NORMS,
    FeedForward,
    ShortConvolution,
    check_choice,
    check_ids,
    check_key_mask,
    check_room,
    initialise,
    run_layer,
    token_counts,
)
from flashmark.nn import (
    BlockSparseAttention,
    CrossAttention,
    HybridAttention,
    Memory,
    NystromAttention,
    RoutedAttention,
)
from flashmark.nn.tokens import check_packed, check_tokens, packed_places

Attention = str | Callable[["DecoderConfig"], nn.Module]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of a Decoder; the defaults are Llama's.

    attention: "exact", "window", "nystrom", "hybrid", "routed", "bidirectional" or a function from
        this config to a module like those of `flashmark.nn`; or a sequence of these, one a layer.
    mask: what "exact" layers show; plain causal when None. All of them hold the one object. The
        other kinds cannot follow one, and a function that makes an attention reads it itself.
    memory_dim: width of an encoder's output that each layer reads by cross-attention; None: none.
    positions: "rotary" (in layers of exact, window, hybrid and routed attention), "learned" or
        "none".
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
    block_size: int = 64  # of "routed", in tokens
    top_k: int = 16  # of "routed": blocks that a token chooses
    near: int = 1  # of "routed": blocks before its own that a token always reads
    block_landmarks: int | None = 4  # of "routed", per key head; None: mean keys of blocks
    memory_dim: int | None = None
    positions: str = "rotary"
    rotary_theta: float = 10_000.0
    rotary_dim: int | None = None  # of a head; all of it, in "hybrid" half
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
            if callable(kind):
                continue
            check_choice("attention", kind, ATTENTIONS)
            if kind != "exact" and self.mask is not None:
                raise ValueError(
                    f"mask: expected None with attention={kind!r}, which cannot follow one "
                    f"('exact' can), got {self.mask!r}"
                )

    def attentions(self) -> list[Attention]:
        """The attention of each layer."""
        one = isinstance(self.attention, str) or callable(self.attention)
        return [self.attention] * self.layers if one else list(self.attention)


def _exact(config: DecoderConfig, mask: Mask | None, is_causal: bool = True) -> nn.Module:
    return BlockSparseAttention(
        config.width, config.heads, num_kv_heads=config.kv_heads, head_dim=config.head_dim,
        mask=mask, is_causal=is_causal, rotary=_rotary(config),
        rotary_dim=config.rotary_dim, bias=config.bias, dropout_p=config.dropout,
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
        rotary=_rotary(config), rotary_dim=config.rotary_dim, bias=config.bias,
    )  # fmt: skip


def _routed(config: DecoderConfig) -> nn.Module:
    return RoutedAttention(
        config.width, config.heads, config.block_landmarks, num_kv_heads=config.kv_heads,
        head_dim=config.head_dim, block_size=config.block_size, top_k=config.top_k,
        near=config.near, rotary=_rotary(config), rotary_dim=config.rotary_dim, bias=config.bias,
    )  # fmt: skip


def _rotary(config: DecoderConfig) -> float | bool:
    return config.rotary_theta if config.positions == "rotary" else False


ATTENTIONS: dict[str, Callable[[DecoderConfig], nn.Module]] = {
    "exact": lambda config: _exact(config, config.mask),
    "window": lambda config: _exact(config, _window(config.window)),
    "nystrom": _nystrom,
    "hybrid": _hybrid,
    "routed": _routed,
    "bidirectional": lambda config: _exact(config, None, is_causal=False),
}


class Layer(nn.Module):
    """x + attention(norm(x)), with a memory x + cross_attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, attention: nn.Module):
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.width, eps=config.norm_eps)
        self.convolution = None
        if config.convolution:
            self.convolution = ShortConvolution(config.width, config.convolution)
        self.attention = attention
        self.cross_norm = self.cross_attention = None
        if config.memory_dim is not None:
            self.cross_norm = norm(config.width, eps=config.norm_eps)
            self.cross_attention = CrossAttention(
                config.width, config.heads, config.memory_dim, num_kv_heads=config.kv_heads,
                head_dim=config.head_dim, bias=config.bias, dropout_p=config.dropout,
            )  # fmt: skip
        self.mlp_norm = norm(config.width, eps=config.norm_eps)
        self.mlp = FeedForward(
            config.width, config.hidden or 4 * config.width, config.activation,
            gated=config.gated, bias=config.bias,
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None,
        cache: LayerCache | None,
        memory: Tensor | Memory | None,
        memory_mask: Tensor | None,
        **options,
    ) -> Tensor:
        """`options`, those of them that are given, are `cu_seqlens` and `mask` of the attention."""
        y = self.attention_norm(x)
        if self.convolution is not None:
            tail = None if cache is None else cache.convolution
            y = y + self.convolution(y, key_mask, options.get("cu_seqlens"), tail)
        held = None if cache is None else cache.attention
        x = x + self.dropout(self.attention(y, key_mask=key_mask, cache=held, **options))
        if self.cross_attention is not None:
            y = self.cross_attention(self.cross_norm(x), memory, key_mask=memory_mask)
            x = x + self.dropout(y)
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
        initialise(self.modules(), self.layers, config.width)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Mask | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Logits (B, N, V) for the token after each of `input_ids`.

        Args:
            input_ids: (B, N) integers.
            inputs_embeds: (B, N, width) in place of `input_ids`: what the embedding would give.
            key_mask: bool (B, N), False where a token is padding, on either side: as if it were
                not there. Its own logits mean nothing.
            cu_seqlens: int32 (S + 1,), bounds of S sequences packed in a batch of one: each as if
                alone.
            mask: for this call, what layers of exact attention show. Its rows and columns count
                the tokens that take part, so that `masks.pinned(lengths)` may differ by sample.
            memory: (B, S, memory_dim), an encoder's output; with a cache, the one it was made with.
            memory_mask: bool (B, S), True where a token of the memory takes part.
            cache: from `init_cache`. The tokens follow those that it holds, and are added to it.
                Without gradients only.

        Raises:
            ValueError, TypeError: a wrong shape or dtype, or no room for the tokens.
        """
        ids = self._checked(input_ids, inputs_embeds, key_mask)
        check_packed(cu_seqlens, ids, key_mask, cache)
        self._check_mask(mask)
        if cache is not None:
            if not isinstance(cache, DecoderCache):
                raise TypeError(
                    f"cache: expected what init_cache returns, got {type(cache).__name__}"
                )
            check_room(cache, "input_ids", ids, key_mask)
        self._check_memory(memory, cache)
        x = self.embed(ids) if inputs_embeds is None else inputs_embeds
        if self.positions is not None:
            x = x + self.positions(self._places(ids, key_mask, cu_seqlens, cache))
        x = self.dropout(x)
        options = {"cu_seqlens": cu_seqlens, "mask": mask}
        options = {name: value for name, value in options.items() if value is not None}
        for number, layer in enumerate(self.layers):
            held = None if cache is None else cache.layers[number]
            read = held.memory if held is not None and memory is None else memory
            x = run_layer(
                layer, self.recompute, x, key_mask=key_mask, cache=held, memory=read,
                memory_mask=memory_mask, **options,
            )  # fmt: skip
        if cache is not None:
            cache.advance(token_counts(ids, key_mask))
        x = self.norm(x)
        return x @ self.embed.weight.T if self.head is None else self.head(x)

    def init_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        rollback: int = 0,
    ) -> DecoderCache:
        """An empty cache: keys and values of `max_length` tokens a sample where attention is exact,
        a state of constant size where it is not. Like the weights unless told otherwise.

        Args:
            memory, memory_mask: an encoder's output, read once for all steps.
            rollback: how many of the newest tokens `cache.crop` can take back from states; from
                keys and values alone any number.
        """
        if self.positions is not None and max_length > self.config.max_length:
            raise ValueError(
                f"max_length: expected at most {self.config.max_length}, "
                f"the learned positions, got {max_length}"
            )
        self._check_memory(memory, None)
        weight = self.embed.weight
        dtype, device = dtype or weight.dtype, torch.device(device or weight.device)
        layers = []
        for layer in self.layers:
            tail = read = None
            if layer.convolution is not None:
                tail = layer.convolution.init_cache(batch, dtype, device, rollback)
            held = layer.attention.init_cache(batch, max_length, dtype, device)
            if rollback and hasattr(held, "allow_rollback"):
                held.allow_rollback(rollback)
            if memory is not None:
                with torch.no_grad():
                    read = layer.cross_attention.read(memory, memory_mask)
            layers.append(LayerCache(held, tail, read))
        length = torch.zeros(batch, dtype=torch.int32, device=device)
        return DecoderCache(layers, length, max_length, rollback)

    def given(self, memory: Tensor, *, key_mask: Tensor | None = None) -> GivenMemory:
        """The decoder for one memory (B, S, memory_dim), as a model that `generate` takes."""
        return GivenMemory(self, memory, key_mask)

    def _checked(self, input_ids, inputs_embeds, key_mask) -> Tensor:
        """The token ids, or a stand-in (B, N) of the same shape for embeddings."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids: expected token ids or inputs_embeds, got {got}")
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
            ids = input_ids
        else:
            check_tokens(inputs_embeds, self.config.width, None, name="inputs_embeds")
            ids = inputs_embeds[..., 0]
        check_key_mask("key_mask", key_mask, ids)
        return ids

    def _check_mask(self, mask) -> None:
        for kind in self.config.attentions() if mask is not None else ():
            if not callable(kind) and kind not in ("exact", "bidirectional"):
                raise ValueError(f"mask: expected None with attention={kind!r}, got {mask!r}")

    def _check_memory(self, memory, cache) -> None:
        """A memory is given where the config asks for one, to the call or to its cache."""
        if memory is not None and cache is not None:
            raise ValueError("memory: expected None with a cache, which holds it, got a tensor")
        if cache is None and (memory is None) != (self.config.memory_dim is None):
            dim, got = self.config.memory_dim, "None" if memory is None else "a tensor"
            wanted = "None without memory_dim in the config"
            wanted = wanted if dim is None else f"shape (B, S, {dim})"
            raise ValueError(f"memory: expected {wanted}, got {got}")

    def _places(self, ids, key_mask, cu_seqlens, cache) -> Tensor:
        """(B | 1, N): how many tokens stand before each."""
        if cu_seqlens is not None:
            places = packed_places(cu_seqlens, ids.shape[1])
            longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        else:
            places = torch.arange(ids.shape[1], device=ids.device)[None]
            longest = ids.shape[1]
        if key_mask is not None:
            places = (key_mask.cumsum(1) - 1).clamp_min(0)
        if cache is not None:
            return places + cache.length[:, None]
        if longest > self.config.max_length:
            raise ValueError(
                f"input_ids: expected at most {self.config.max_length} tokens, "
                f"the learned positions, got {longest}"
            )
        return places
