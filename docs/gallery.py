"""The mask gallery, drawn by the package itself: `python docs/gallery.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from flashmark import compile_mask, masks, routed_attention  # noqa: E402

N, BLOCK = 512, 32


def _blocks():
    generator = torch.Generator().manual_seed(0)
    return masks.blocks(torch.rand(N // BLOCK, N // BLOCK, generator=generator) < 0.2, BLOCK)


IDS = torch.bucketize(torch.arange(N), torch.tensor([90, 250, 300]))
GALLERY = {
    "causal": masks.causal(),
    "window": masks.causal() & masks.sliding_window(128),
    "sink_window": masks.causal() & (masks.sliding_window(128) | masks.prefix(16)),
    "prefix": masks.causal() | masks.prefix(160),
    "pinned": masks.causal() & masks.pinned(160),
    "documents": masks.causal() & masks.documents(IDS),
    "dilated": masks.causal() & (masks.dilated(64) | masks.sliding_window(64)),
    "padding": masks.causal() & masks.key_padding(torch.tensor([400])),
    "blocks": masks.causal() & (_blocks() | masks.sliding_window(32)),
    "not_window": masks.causal() & ~masks.sliding_window(200),
}


def _routed() -> masks.Mask:
    """Keys that the queries of a routed call read: every fourth block is alike."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.eye(16)[torch.arange(N) // BLOCK % 4]
    noise = torch.randn(2, 1, 1, N, 16, generator=generator)
    query, key = 4.0 * kinds + noise[0], 4.0 * kinds + noise[1]
    routing = routed_attention(
        query, key, key, block_size=BLOCK, top_k=2, near=1, return_routing=True
    )[1]
    block = torch.arange(N) // BLOCK
    chosen = (routing.indices[0, 0, :, :, None] == block).any(1)  # (N, N)
    return masks.dense(chosen | (block >= block[:, None] - 1)) & masks.causal()


GALLERY["routed"] = _routed()


def draw_all(folder: Path) -> list[Path]:
    """One PNG a mask; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, mask in GALLERY.items():
        figure, ax = plt.subplots(figsize=(2.6, 2.6), layout="constrained")
        compile_mask(mask, 1, 1, N, N, device="cpu", block_size=BLOCK).plot(ax)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=100)
        plt.close(figure)
        paths.append(path)
    return paths


if __name__ == "__main__":
    for drawn in draw_all(Path(sys.argv[1])):
        print(drawn)
