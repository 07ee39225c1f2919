"""Caches of a Decoder between calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashmark.masks import Mask
from flashmark.nn.cache import KeyValueCache, kept_lengths
from flashmark.nn.cross import Memory

if TYPE_CHECKING:
    from flashmark.models.decoder import Decoder


@dataclass
class LayerCache:
    attention: Any  # what the attention's init_cache returns
    convolution: Tensor | None = None  # (B, n, width): the newest tokens
    memory: Memory | None = None


class DecoderCache:
    """Cache of a Decoder between calls: a cache for each layer, updated in place.

    Attributes:
        length: int32 (B,), tokens read so far; those that key_mask left out are not counted.
        max_length: tokens that fit.
        rollback: how many of the newest tokens `crop` can take back at least.
    """

    def __init__(
        self, layers: list[LayerCache], length: Tensor, max_length: int, rollback: int = 0
    ):
        self.layers, self.length = layers, length
        self.max_length, self.rollback = max_length, rollback
        self._least = torch.zeros_like(length)  # what convolutions can be cropped to

    def advance(self, counts: Tensor | int) -> None:
        """Called by the model after it has read `counts` tokens a sample."""
        self.length += counts
        torch.maximum(self._least, self.length - self.rollback, out=self._least)

    def select(self, index: Tensor) -> None:
        """Keep samples `index` (B',) in this order; one may be repeated, as beams need it."""
        self.length, self._least = self.length[index], self._least[index]
        for layer in self.layers:
            layer.attention.select(index)
            if layer.convolution is not None:
                layer.convolution = layer.convolution[index]
            if layer.memory is not None:
                layer.memory = layer.memory.select(index)

    def crop(self, length: Tensor | int) -> None:
        """Keep the first `length` tokens, an int or (B,); samples that hold fewer keep them all.

        ValueError where more than `rollback` tokens are taken back from states.
        """
        kept = kept_lengths(self.length, length)
        removed = self.length - kept
        bounded = any(x.convolution is not None for x in self.layers)
        if bounded and bool((kept < torch.minimum(self._least, self.length)).any()):
            raise ValueError(
                f"length: expected at least {self._least.tolist()}, since {self.rollback} tokens "
                f"can be taken back (init_cache's rollback), got {kept.tolist()}"
            )
        # states first: one that cannot be cropped raises before anything has changed
        for layer in sorted(self.layers, key=lambda x: isinstance(x.attention, KeyValueCache)):
            layer.attention.crop(kept)
            if layer.convolution is not None:
                layer.convolution = _without_newest(layer.convolution, removed)
        self.length = kept


# torch.load reads them with its default, weights_only=True
torch.serialization.add_safe_globals([DecoderCache, LayerCache])


def _without_newest(tokens: Tensor, removed: Tensor) -> Tensor:
    """(B, n, width), the newest last: moved to the right by `removed` (B,), 0 where none is known.

    What is 0 then is never read: at most `rollback` tokens are ever missing.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device) - removed[:, None]
    found = tokens.gather(1, places.clamp_min(0)[..., None].expand_as(tokens))
    return found.masked_fill((places < 0)[..., None], 0)


class GivenMemory:
    """A decoder with its memory: `init_cache` and a call from tokens to logits."""

    def __init__(self, model: Decoder, memory: Tensor, key_mask: Tensor | None):
        self.model, self.memory, self.key_mask, self.config = model, memory, key_mask, model.config

    def init_cache(self, batch: int, max_length: int, **options) -> DecoderCache:
        return self.model.init_cache(
            batch, max_length, memory=self.memory, memory_mask=self.key_mask, **options
        )

    def __call__(
        self,
        ids: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        mask: Mask | None = None,
        inputs_embeds: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        given = {} if cache is not None else {"memory": self.memory, "memory_mask": self.key_mask}
        return self.model(
            ids, inputs_embeds=inputs_embeds, key_mask=key_mask, mask=mask, cache=cache, **given
        )
