"""The dropout that all backends share, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def keep_mask(seed: int, p: float, heads: Tensor, rows: Tensor, first: int, last: int) -> Tensor:
    """Dropout's keep mask for keys first..last - 1, bool (*heads.shape, len(rows), last -
    first).

    `heads` holds b * Hq + h, `rows` the query indices. Entry j is kept iff word j % 4 of
    philox4x32-10(seed, (j // 4, i, b * Hq + h, 0)) >= floor(p * 2^32).
    """
    j = torch.arange(first // 4, -(-last // 4), device=rows.device)
    bh = heads[..., None, None]
    c0, c1, c2, c3 = torch.broadcast_tensors(j, rows[:, None], bh, torch.zeros_like(j))
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        # 64-bit products of 32-bit words: int64 wraps around, its bits are the right ones
        x, y = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((y >> 32) & LOW) ^ c1 ^ k0, y & LOW, ((x >> 32) & LOW) ^ c3 ^ k1, x & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    words = torch.stack([c0, c1, c2, c3], dim=-1).flatten(-2)
    return words[..., first % 4 : first % 4 + last - first] >= int(p * 2**32)
