"""Pictures of a BlockMask: text for `print`, matplotlib for `plot`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmark.masks.block_mask import BlockMask

SHADES = " ░▒▓█"
MAX_CELLS = (24, 48)


def tile_density(mask: BlockMask, batch: int = 0, head: int = 0) -> Tensor:
    """Fraction of the existing elements of every tile that are visible, (q_blocks, kv_blocks)."""
    grid = mask.tile_grid()[batch % mask.batch, head % mask.heads].long().cpu()
    words = mask.tile_bits.cpu().long() & 0xFFFFFFFF
    bits = ((words.unsqueeze(-1) >> _arange(32)) & 1).sum((1, 2, 3))
    area = bits.new_tensor([0, mask.block_q * mask.block_kv])
    rows = (mask.q_len - _arange(mask.q_blocks) * mask.block_q).clamp(max=mask.block_q)
    columns = (mask.kv_len - _arange(mask.kv_blocks) * mask.block_kv).clamp(max=mask.block_kv)
    return torch.cat([area, bits])[grid + 2] / (rows[:, None] * columns)


def _arange(n: int) -> Tensor:
    return torch.arange(n, device="cpu")


def draw_text(mask: BlockMask) -> str:
    """A header and one picture for each distinct (batch, head), at most two of them."""
    lines = [repr(mask)[:-1] + f", density={mask.density:.4f})"]
    shown = [(b, h) for b in range(mask.batch) for h in range(mask.heads)]
    for b, h in shown[:2]:
        if len(shown) > 1:
            lines.append(f"batch {b}, head {h}:")
        density = tile_density(mask, b, h)
        if density.numel() == 0:
            continue
        cells = [min(limit, size) for limit, size in zip(MAX_CELLS, density.shape, strict=True)]
        small = F.adaptive_avg_pool2d(density[None, None], (cells[0], cells[1]))[0, 0]
        # anything visible gets ink, and only a full cell gets full ink
        ink = torch.where(small >= 1, 4, (small * 3).ceil().clamp(max=3)).long()
        lines += ["  " + "".join(SHADES[x] * 2 for x in row) for row in ink.tolist()]
    if len(shown) > 2:
        lines.append(f"... and {len(shown) - 2} more (batch, head) pairs")
    return "\n".join(lines)


def plot(mask: BlockMask, ax=None, *, batch: int = 0, head: int = 0):
    """Draw the density of every tile; returns the matplotlib axes. Needs matplotlib."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot: expected matplotlib to be installed, got no such module"
        ) from error
    ax = ax or plt.gca()
    extent = (0, mask.kv_blocks * mask.block_kv, mask.q_blocks * mask.block_q, 0)
    ax.imshow(tile_density(mask, batch, head).numpy(), cmap="Blues", vmin=0, vmax=1, extent=extent)
    ax.set_xlim(0, mask.kv_len)
    ax.set_ylim(mask.q_len, 0)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    return ax
