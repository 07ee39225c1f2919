"""Any attention of query, key and value in the layers of `flashmark.models.Decoder`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from examples.text import BYTES
from flashmark.models import Decoder, DecoderConfig
from flashmark.nn import ProjectedAttention


class Projected(ProjectedAttention):
    """A layer's attention from the inside of it, a module from query, key, value to the output."""

    def __init__(self, config: DecoderConfig, attention: nn.Module):
        super().__init__(config.width, config.heads, None, None, bias=False)
        self.attention = attention

    def forward(self, x: Tensor, *, key_mask: None = None, cache: None = None) -> Tensor:
        return self.merge_heads(self.attention(*self.project(x)))


def byte_decoder(
    attention: Callable[[int, int], nn.Module], *, width: int = 128, heads: int = 4, layers: int = 2
) -> Decoder:
    """A byte-level decoder that trains while you wait.

    `attention(heads, head_width)` makes the attention of a layer. A convolution over the last 4
    bytes tells their order, the same for all attentions.
    """

    def layer(config: DecoderConfig) -> nn.Module:
        return Projected(config, attention(heads, width // heads))

    return Decoder(
        DecoderConfig(
            BYTES, width=width, layers=layers, heads=heads, attention=layer, positions="none",
            convolution=4, activation="gelu_tanh", gated=False, tied=False,
        )
    )  # fmt: skip
