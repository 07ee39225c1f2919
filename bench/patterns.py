"""The masks that are measured: a flashmark expression, and the formula that the peers are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from flashmark import masks

Formula = Callable[
    [Tensor, Tensor, Tensor, Tensor], Tensor
]  # visible(b, h, query, key), FlexAttention's signature


@dataclasses.dataclass(frozen=True)
class Pattern:
    name: str
    mask: masks.Mask
    formula: Formula
    near: tuple[int, int] | None = None  # (first keys, last keys) that a causal row sees, if so


def causal(n: int, device: torch.device) -> Pattern:
    return Pattern("causal", masks.causal(), lambda b, h, i, j: j <= i, (0, n))


def window(n: int, device: torch.device, size: int = 512) -> Pattern:
    return Pattern(
        f"window {size}",
        masks.causal() & masks.sliding_window(size),
        lambda b, h, i, j: (j <= i) & (j > i - size),
        (0, size),
    )


def sink_window(n: int, device: torch.device, size: int = 512, sink: int = 4) -> Pattern:
    return Pattern(
        f"sink {sink} + window {size}",
        masks.causal() & (masks.sliding_window(size) | masks.prefix(sink)),
        lambda b, h, i, j: (j <= i) & ((j > i - size) | (j < sink)),
        (sink, size),
    )


def prefix(n: int, device: torch.device) -> Pattern:
    size = n // 4
    return Pattern(
        f"prefix {size}",
        masks.causal() | masks.prefix(size),
        lambda b, h, i, j: (j <= i) | (j < size),
    )


def documents(n: int, device: torch.device, count: int = 12) -> Pattern:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, n, (count - 1,), generator=generator)
    ids = (
        torch.zeros(n, dtype=torch.int64)
        .index_add_(0, starts, torch.ones_like(starts))
        .cumsum(0)
        .to(device)
    )
    return Pattern(
        f"{count} documents",
        masks.causal() & masks.documents(ids),
        lambda b, h, i, j: (j <= i) & (ids[i] == ids[j]),
    )


def random_tiles(n: int, device: torch.device, keep: float = 0.1, size: int = 128) -> Pattern:
    blocks = -(-n // size)
    generator = torch.Generator().manual_seed(0)
    tiles = (torch.rand(blocks, blocks, generator=generator) < keep) | torch.eye(
        blocks, dtype=torch.bool
    )
    tiles = tiles.to(device)
    return Pattern(
        f"random {keep:.0%} of tiles",
        masks.causal() & masks.blocks(tiles, size),
        lambda b, h, i, j: (j <= i) & tiles[i // size, j // size],
    )


PATTERNS = {
    "causal": causal,
    "window": window,
    "sink_window": sink_window,
    "prefix": prefix,
    "documents": documents,
    "random_tiles": random_tiles,
}
