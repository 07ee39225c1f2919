"""A line of the mask as one sequence of tiles, FULL ones first: the walk of the Hopper form of the
forward kernel, where loads run ahead of the arithmetic in a loop of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def any_tile(lists, t, n_full, n_masked, first, full_start, F: tl.constexpr):
    """Start of the t-th tile of a line and its row of tile_bits, -1 when it is FULL.

    `full_start` is where the FULL tile starts that `next_tile` has come to.
    """
    if F.KIND == "sparse":
        split: tl.constexpr = F.BLOCK_KV // F.BLOCK_N
        rest = t - n_full
        partial = (rest >= 0) & (rest < n_masked)
        entry = lists.partials + 2 * (first + rest // split)
        block = tl.load(entry, mask=partial, other=0)
        start = tl.where(rest >= 0, block * F.BLOCK_KV + rest % split * F.BLOCK_N, full_start)
        bits = tl.load(entry + 1, mask=partial, other=-1)
    else:
        start = t * F.BLOCK_N
        bits = 0
    return start, bits
