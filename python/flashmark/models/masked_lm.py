"""A bidirectional model that predicts masked tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flashmark.models.decoder import Decoder, DecoderConfig


class MaskedLM(Decoder):
    """A Decoder's layers, but every token sees every token that `key_mask` lets take part.

    `model(inputs, key_mask=...)` gives logits (B, N, V) of the token in each place. Train it with
    `objectives.corrupt` and `objectives.token_loss`.
    """

    def __init__(self, config: DecoderConfig):
        if config.attention not in ("exact", "bidirectional") or config.mask is not None:
            raise ValueError(
                "config: expected the default attention and mask, which are replaced by "
                f"bidirectional ones, got attention={config.attention!r}, mask={config.mask!r}"
            )
        if config.convolution:
            raise ValueError(
                f"config: expected convolution=0, which is causal, got {config.convolution}"
            )
        super().__init__(dataclasses.replace(config, attention="bidirectional"))

    @torch.no_grad()
    def fill(self, tokens: Tensor, mask_token: int, *, key_mask: Tensor | None = None) -> Tensor:
        """`tokens` (B, N) with the likeliest token wherever `mask_token` stands."""
        logits = self(tokens, key_mask=key_mask)
        if mask_token < logits.shape[-1]:
            logits[..., mask_token] = -torch.inf
        return torch.where(tokens == mask_token, logits.argmax(-1).to(tokens.dtype), tokens)
