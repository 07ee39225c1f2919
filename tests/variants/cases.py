"""Option sets of the landmark family's members, and inputs for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flashmark import variants
from tests import helpers

MASKED = {"padded": True}  # stands for a key_mask of the sizes at hand


@dataclasses.dataclass(frozen=True)
class Member:
    """An operator of the family with options."""

    op: Callable
    options: dict

    def bound(self, batch: int, n: int, kv_heads: int, backend: str = "auto") -> Callable:
        return functools.partial(self.op, **self.keywords(batch, n, kv_heads), backend=backend)

    def keywords(self, batch: int, n: int, kv_heads: int) -> dict:
        options = dict(self.options)
        if options.pop("padded", False):
            options["key_mask"] = padding(batch, n)
        if taps := options.pop("taps", 0):
            weight = helpers.randn(kv_heads, taps, seed=8) / taps
            options["conv_weight"] = weight.requires_grad_()
        return options


def padding(batch: int, n: int) -> Tensor:
    """Holes everywhere, nothing before token 5 of the first sample, the last sample all hidden but
    for two tokens."""
    generator = torch.Generator().manual_seed(n)
    mask = torch.rand(batch, n, generator=generator) > 0.3
    mask[:1, :5] = False
    if batch > 1:
        mask[-1] = False
        mask[-1, n // 2 : n // 2 + 2] = True
    return mask


CAUSAL = {
    "segment": Member(variants.segment_attention, {"segment": 16}),
    "segment-odd": Member(variants.segment_attention, {"segment": 7, "scale": 0.1}),
    "segment-padded": Member(variants.segment_attention, {"segment": 12} | MASKED),
    "first-k": Member(variants.first_k_attention, {"first": 13}),
    "first-k-means": Member(variants.first_k_attention, {"first": 21, "num_landmarks": 5}),
    "first-k-untied": Member(
        variants.first_k_attention, {"first": 21, "num_landmarks": 4, "tied": False} | MASKED
    ),
    "first-k-mass": Member(
        variants.first_k_attention,
        {"first": 13, "num_landmarks": 4, "normalize": "mass"} | MASKED,
    ),
}
BIDIRECTIONAL = {
    "nystromformer": Member(variants.nystromformer_attention, {"num_landmarks": 6, "taps": 5}),
    "nystromformer-padded": Member(
        variants.nystromformer_attention, {"num_landmarks": 7, "taps": 3} | MASKED
    ),
    "nystromformer-original": Member(
        variants.nystromformer_attention,
        {"num_landmarks": 5, "inverse": "original", "pool_padding": False, "taps": 1} | MASKED,
    ),
    "nystromformer-tikhonov": Member(
        variants.nystromformer_attention, {"num_landmarks": 4, "inverse": "tikhonov", "scale": 0.2}
    ),
}
EVERY = CAUSAL | BIDIRECTIONAL
