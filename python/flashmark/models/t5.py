"""An encoder-decoder in the style of T5 (Raffel et al., 2020) on block-sparse attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashmark.masks import Mask, causal, compile_mask, key_padding
from flashmark.models.layers import (
    FeedForward,
    check_ids,
    check_key_mask,
    check_room,
    run_layer,
)
from flashmark.models.t5_layers import RelativeBias, T5Attention, T5Config, T5Layer
from flashmark.nn.cache import KeyValueCache
from flashmark.objectives import shift_right, token_loss


class T5Output(NamedTuple):
    logits: Tensor  # (B, N, V)
    loss: Tensor | None  # mean over the labels that are not IGNORED
    encoded: Tensor  # (B, S, width): the encoder's output


class T5Cache:
    """What decoding remembers: self-attention keys in a preallocated cache, cross-attention keys.

    Attributes:
        length: int32 (B,), tokens decoded so far.
        max_length: tokens that fit.
    """

    def __init__(self, layers: list[KeyValueCache], bias: Tensor):
        self.layers, self.bias = layers, bias
        self.memory: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)

    @property
    def length(self) -> Tensor:
        return self.layers[0].length

    @property
    def max_length(self) -> int:
        return self.layers[0].max_length


class T5(nn.Module):
    """Encoder, decoder and output weights.

    `recompute = True` on an instance recomputes each layer's activations in backward.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.recompute = False
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
        mask = None if key_mask is None else key_padding(key_mask)
        x = self.embed(input_ids)
        return self.encoder(x, mask=mask, head_mask=head_mask, recompute=self.recompute)

    def decode(
        self,
        decoder_input_ids: Tensor,
        encoded: Tensor,
        *,
        key_mask: Tensor | None = None,
        source_key_mask: Tensor | Mask | None = None,
        head_mask: Tensor | None = None,
        cross_head_mask: Tensor | None = None,
        cache: T5Cache | None = None,
    ) -> Tensor:
        """Logits (B, N, V) of the next token after each of `decoder_input_ids` (B, N).

        With a `cache` (without gradients) these tokens follow those it holds, and are added to it.
        """
        check_ids("decoder_input_ids", decoder_input_ids, self.config.vocab_size)
        check_key_mask("key_mask", key_mask, decoder_input_ids)
        if cache is not None:
            if torch.is_grad_enabled():
                raise ValueError("cache: expected a call without gradients (torch.no_grad)")
            if key_mask is not None:
                raise NotImplementedError("key_mask: expected None with a cache, got a tensor")
            check_room(cache, "decoder_input_ids", decoder_input_ids, None)
        if isinstance(source_key_mask, Tensor):
            check_key_mask("source_key_mask", source_key_mask, encoded[..., 0])
            source_key_mask = key_padding(source_key_mask)
        x = self.decoder(
            self.embed(decoder_input_ids),
            mask=causal() if key_mask is None else causal() & key_padding(key_mask),
            head_mask=head_mask,
            memory=encoded,
            memory_mask=source_key_mask,
            cross_head_mask=cross_head_mask,
            cache=cache,
            recompute=self.recompute,
        )
        if self.config.scale_outputs:
            x = x * self.config.width**-0.5
        return x @ self.embed.weight.T if self.head is None else self.head(x)

    def init_cache(self, batch: int, max_length: int) -> T5Cache:
        """Room for `max_length` decoded tokens a sample."""
        config, weight = self.config, self.embed.weight
        mask = compile_mask(causal(), 1, 1, max_length, max_length, device=weight.device)
        sizes = batch, config.heads, max_length, config.head_dim
        layers = [
            KeyValueCache(*sizes, mask, dtype=weight.dtype, device=weight.device)
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
        # one object for all steps, so that it is compiled once for each number of queries
        self.mask = None if key_mask is None else key_padding(key_mask)

    def init_cache(self, batch: int, max_length: int) -> T5Cache:
        return self.model.init_cache(batch, max_length)

    def __call__(
        self, ids: Tensor, *, key_mask: Tensor | None = None, cache: T5Cache | None = None
    ) -> Tensor:
        return self.model.decode(
            ids, self.encoded, key_mask=key_mask, source_key_mask=self.mask, cache=cache
        )


class _Stack(nn.Module):
    def __init__(self, config: T5Config, layers: int, *, decoder: bool):
        super().__init__()
        self.bias = RelativeBias(config, bidirectional=not decoder)
        self.layers = nn.ModuleList(T5Layer(config, decoder) for _ in range(layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.heads = config.heads

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | None,
        head_mask: Tensor | None,
        memory: Tensor | None = None,
        memory_mask: Mask | None = None,
        cross_head_mask: Tensor | None = None,
        cache: T5Cache | None = None,
        recompute: bool = False,
    ) -> Tensor:
        head_masks = self._per_layer("head_mask", head_mask)
        cross_head_masks = self._per_layer("cross_head_mask", cross_head_mask)
        # the first layer's bias serves them all
        bias = self.bias(x.shape[1], x.shape[1]) if cache is None else cache.bias
        x = self.dropout(x)
        for number, layer in enumerate(self.layers):
            x = run_layer(
                layer, recompute, x, mask=mask, bias=bias, head_mask=head_masks[number],
                memory=memory, memory_mask=memory_mask, cross_head_mask=cross_head_masks[number],
                cache=cache, number=number,
            )  # fmt: skip
        return self.dropout(self.norm(x))

    def _per_layer(self, name: str, head_mask: Tensor | None) -> list[Tensor | None]:
        if head_mask is None:
            return [None] * len(self.layers)
        shape = len(self.layers), self.heads
        if tuple(head_mask.shape) not in (shape, shape[1:]):
            raise ValueError(
                f"{name}: expected shape {shape} or {shape[1:]}, got {tuple(head_mask.shape)}"
            )
        return list(head_mask.expand(shape))
