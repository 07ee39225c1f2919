"""An encoder-decoder in the style of T5 (Raffel et al., 2020) on block-sparse attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashmark.arguments import check_count
from flashmark.masks import Mask, causal, key_padding
from flashmark.masks.cache import compiled
from flashmark.models.layers import (
    FeedForward,
    check_ids,
    check_key_mask,
    check_room,
    run_layer,
)
from flashmark.models.t5_layers import RelativeBias, T5Attention, T5Config, T5Layer, T5Norm
from flashmark.nn.cache import KeyValueCache
from flashmark.nn.cross import Memory
from flashmark.nn.tokens import Packing, check_tokens
from flashmark.objectives import shift_right, token_loss


class T5Output(NamedTuple):
    logits: Tensor  # (B, N, V)
    loss: Tensor | None  # mean over the labels that are not IGNORED
    encoded: Tensor  # (B, S, width): the encoder's output


class T5Cache:
    """Cache of decoding: keys and values of self-attention, preallocated, and of cross-attention.

    Attributes:
        length: int32 (B,), tokens decoded so far.
        max_length: tokens that fit.
        memory: keys and values of the source, a layer each; empty before the first call.
    """

    def __init__(self, layers: list[KeyValueCache], bias: Tensor):
        self.layers, self.bias = layers, bias
        self.memory: list[Memory] = []

    @property
    def length(self) -> Tensor:
        return self.layers[0].length

    @property
    def max_length(self) -> int:
        return self.layers[0].max_length

    def select(self, index: Tensor) -> None:
        """Keep samples `index` (B',) in this order; one may be repeated, as beams need it."""
        for layer in self.layers:
            layer.select(index)
        self.memory = [memory.select(index) for memory in self.memory]

    def crop(self, length: Tensor | int) -> None:
        """Keep the first `length` tokens, an int or (B,); samples that hold fewer keep them all."""
        for layer in self.layers:
            layer.crop(length)


torch.serialization.add_safe_globals([T5Cache])  # for torch.load, weights_only=True


class T5(nn.Module):
    """Encoder, decoder and output weights.

    `recompute = True` on an instance recomputes each layer's activations in backward.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.recompute = False
        # one object for all calls: a mask is compiled once for each object and shape
        self.mask = causal() if config.mask is None else config.mask
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.encoder = _Stack(config, config.encoder_layers, decoder=False)
        self.decoder = _Stack(config, config.decoder_layers, decoder=True)
        self.head = None
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._initialise()

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        key_mask: Tensor | None = None,
        decoder_key_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        decoder_head_mask: Tensor | None = None,
        cross_head_mask: Tensor | None = None,
    ) -> T5Output:
        """Teacher-forced: every position of the decoder at once.

        Args:
            input_ids: (B, S) integers, the source.
            decoder_input_ids: (B, N); `labels` shifted right when None.
            labels: (B, N), IGNORED (-100) where the loss has nothing to count.
            key_mask: bool (B, S), True where a source token takes part.
            decoder_key_mask: bool (B, N), likewise.
            head_mask, decoder_head_mask, cross_head_mask: (heads,) or (layers, heads), a factor of
                each head's output: 0 removes a head.

        Raises:
            ValueError, TypeError: no target, or a wrong shape or dtype.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids: expected a tensor or labels, got neither")
            decoder_input_ids = shift_right(
                labels,
                start_token=self.config.start_token,
                padding_token=self.config.padding_token,
            )
        encoded = self.encode(input_ids, key_mask=key_mask, head_mask=head_mask)
        logits = self.decode(
            decoder_input_ids,
            encoded,
            key_mask=decoder_key_mask,
            source_key_mask=key_mask,
            head_mask=decoder_head_mask,
            cross_head_mask=cross_head_mask,
        )
        return T5Output(logits, None if labels is None else token_loss(logits, labels), encoded)

    def encode(
        self, input_ids: Tensor, *, key_mask: Tensor | None = None, head_mask: Tensor | None = None
    ) -> Tensor:
        """(B, S, width) from the source (B, S); every token sees all that take part."""
        check_ids("input_ids", input_ids, self.config.vocab_size)
        check_key_mask("key_mask", key_mask, input_ids)
        visible = {"mask": None if key_mask is None else key_padding(key_mask)}
        x = self.embed(input_ids)
        return self.encoder(x, visible=visible, head_mask=head_mask, recompute=self.recompute)

    def decode(
        self,
        decoder_input_ids: Tensor | None,
        encoded: Tensor,
        *,
        inputs_embeds: Tensor | None = None,
        key_mask: Tensor | None = None,
        source_key_mask: Tensor | None = None,
        mask: Mask | None = None,
        head_mask: Tensor | None = None,
        cross_head_mask: Tensor | None = None,
        cache: T5Cache | None = None,
    ) -> Tensor:
        """Logits (B, N, V) of the next token after each of `decoder_input_ids` (B, N).

        Args:
            decoder_input_ids: (B, N) integers.
            encoded: (B, S, width) from `encode`. A cache has read it at its first call.
            inputs_embeds: (B, N, width) in place of `decoder_input_ids` (None then).
            key_mask: bool (B, N), False where a token is padding, on either side: as if it were
                not there, relative positions included. Its own logits mean nothing.
            source_key_mask: bool (B, S), True where a token of the source takes part.
            mask: what is visible in this call, instead of the config's; without a cache only.
                Its rows and columns count the tokens that take part.
            cache: from `init_cache`. These tokens follow those it holds, and are added to it.
                Without gradients only.
        """
        ids = self._decoder_ids(decoder_input_ids, inputs_embeds)
        check_key_mask("key_mask", key_mask, ids)
        if cache is not None:
            if torch.is_grad_enabled():
                raise ValueError("cache: expected a call without gradients (torch.no_grad)")
            if mask is not None:
                raise ValueError("mask: expected None with a cache, which has its own, got a mask")
            check_room(cache, "decoder_input_ids", ids, key_mask)
        if source_key_mask is not None:
            check_key_mask("source_key_mask", source_key_mask, encoded[..., 0])
        x = self.embed(ids) if inputs_embeds is None else inputs_embeds
        first = None if cache is None else cache.layers[0].first_column(x.shape[1])
        packing = None if key_mask is None else Packing.of(key_mask, first)
        counts = None if packing is None else packing.counts
        x = x if packing is None else packing.pack(x)
        if cache is None:
            visible = {"mask": self.mask if mask is None else mask, "kv_lengths": counts}
        else:
            visible = {"first": first, "counts": x.shape[1] if counts is None else counts}
        if cache is None or not cache.memory:
            memory = self.decoder.read(encoded, source_key_mask)
            if cache is not None:
                cache.memory = memory
        else:
            memory = cache.memory
        x = self.decoder(
            x,
            visible=visible,
            head_mask=head_mask,
            memory=memory,
            cross_head_mask=cross_head_mask,
            cache=cache,
            recompute=self.recompute,
        )
        x = x if packing is None else packing.unpack(x)
        if self.config.scale_outputs:
            x = x * self.config.width**-0.5
        return x @ self.embed.weight.T if self.head is None else self.head(x)

    def _decoder_ids(self, decoder_input_ids, inputs_embeds) -> Tensor:
        """The token ids, or a stand-in (B, N) of the same shape for embeddings."""
        if (decoder_input_ids is None) == (inputs_embeds is None):
            got = "neither" if inputs_embeds is None else "both"
            raise ValueError(f"decoder_input_ids: expected token ids or inputs_embeds, got {got}")
        if inputs_embeds is None:
            check_ids("decoder_input_ids", decoder_input_ids, self.config.vocab_size)
            return decoder_input_ids
        check_tokens(inputs_embeds, self.config.width, None, name="inputs_embeds")
        return inputs_embeds[..., 0]

    def init_cache(self, batch: int, max_length: int, *, rollback: int = 0) -> T5Cache:
        """Room for `max_length` decoded tokens a sample. `rollback` is for models with states:
        here `crop` takes back any number."""
        config, weight = self.config, self.embed.weight
        batch, max_length = check_count("batch", batch, 0), check_count("max_length", max_length)
        sizes = batch, config.heads, max_length
        mask = compiled(self.mask, *sizes, max_length, weight.device)
        layers = [
            KeyValueCache(*sizes, config.head_dim, mask, dtype=weight.dtype, device=weight.device)
            for _ in self.decoder.layers
        ]
        with torch.no_grad():
            return T5Cache(layers, self.decoder.bias(max_length, max_length))

    @torch.no_grad()
    def given(self, input_ids: Tensor, *, key_mask: Tensor | None = None) -> GivenSource:
        """The decoder for one source, as a model that `flashmark.generation.generate` takes."""
        return GivenSource(self, self.encode(input_ids, key_mask=key_mask), key_mask)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Scores have no 1/sqrt(D): the query weights carry it. As in the original T5."""
        width, heads, dim = self.config.width, self.config.heads, self.config.head_dim
        nn.init.normal_(self.embed.weight, std=1.0)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=1.0)
        for module in self.modules():
            if isinstance(module, T5Attention):
                nn.init.normal_(module.query.weight, std=(width * dim) ** -0.5)
                nn.init.normal_(module.key.weight, std=width**-0.5)
                nn.init.normal_(module.value.weight, std=width**-0.5)
                nn.init.normal_(module.output.weight, std=(heads * dim) ** -0.5)
            elif isinstance(module, FeedForward):
                for linear in (module.up, module.gate, module.down):
                    if linear is not None:
                        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            elif isinstance(module, RelativeBias):
                nn.init.normal_(module.embedding.weight, std=width**-0.5)


class GivenSource:
    """A decoder with its encoded source: `init_cache` and a call from tokens to logits."""

    def __init__(self, model: T5, encoded: Tensor, key_mask: Tensor | None):
        self.model, self.encoded, self.config = model, encoded, model.config
        self.key_mask = key_mask

    def init_cache(self, batch: int, max_length: int, *, rollback: int = 0) -> T5Cache:
        return self.model.init_cache(batch, max_length, rollback=rollback)

    def __call__(
        self,
        ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        key_mask: Tensor | None = None,
        mask: Mask | None = None,
        cache: T5Cache | None = None,
    ) -> Tensor:
        return self.model.decode(
            ids, self.encoded, inputs_embeds=inputs_embeds, key_mask=key_mask, mask=mask,
            source_key_mask=self.key_mask, cache=cache,
        )  # fmt: skip


class _Stack(nn.Module):
    def __init__(self, config: T5Config, layers: int, *, decoder: bool):
        super().__init__()
        self.bias = RelativeBias(config, bidirectional=not decoder)
        self.layers = nn.ModuleList(T5Layer(config, decoder) for _ in range(layers))
        self.norm = T5Norm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.heads = config.heads

    def forward(
        self,
        x: Tensor,
        *,
        visible: dict,
        head_mask: Tensor | None,
        memory: list[Memory] | None = None,
        cross_head_mask: Tensor | None = None,
        cache: T5Cache | None = None,
        recompute: bool = False,
    ) -> Tensor:
        head_masks = self._per_layer("head_mask", head_mask)
        cross_head_masks = self._per_layer("cross_head_mask", cross_head_mask)
        # the first layer's bias serves them all
        bias = None if cache is None else cache.bias
        if cache is None and x.shape[1]:
            bias = self.bias(x.shape[1], x.shape[1])
        x = self.dropout(x)
        for number, layer in enumerate(self.layers):
            x = run_layer(
                layer, recompute, x, visible=visible, bias=bias, head_mask=head_masks[number],
                memory=memory and memory[number], cross_head_mask=cross_head_masks[number],
                cache=cache, number=number,
            )  # fmt: skip
        return self.dropout(self.norm(x))

    def read(self, encoded: Tensor, key_mask: Tensor | None) -> list[Memory]:
        """Keys and values of the source (B, S, width) for each layer's cross-attention."""
        lengths = None
        if key_mask is not None:  # those that take part come first: cross-attention has no order
            packing = Packing.of(key_mask)
            encoded, lengths = packing.pack(encoded), packing.counts
        return [Memory(*layer.cross_attention.keys(encoded), lengths) for layer in self.layers]

    def _per_layer(self, name: str, head_mask: Tensor | None) -> list[Tensor | None]:
        if head_mask is None:
            return [None] * len(self.layers)
        shape = len(self.layers), self.heads
        if tuple(head_mask.shape) not in (shape, shape[1:]):
            raise ValueError(
                f"{name}: expected shape {shape} or {shape[1:]}, got {tuple(head_mask.shape)}"
            )
        return list(head_mask.expand(shape))
