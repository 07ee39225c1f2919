"""A line of the mask as one sequence of tiles, FULL ones first: the walk of the Hopper form of the
forward kernel, where loads run ahead of the arithmetic in a loop of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import visible


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


@triton.jit
def bit_words(bits_ptr, bits, start_n, r2, F: tl.constexpr):
    """The bits of a tile, a word [BLOCK_M, 1] to 32 keys; all set where `bits` is -1."""
    words = ()
    if F.KIND == "sparse":
        per_row: tl.constexpr = (F.BLOCK_KV + 31) // 32
        row_ptr = bits_ptr + (bits.to(tl.int64) * F.BLOCK_Q + r2 % F.BLOCK_Q) * per_row
        row_ptr += (start_n % F.BLOCK_KV) // 32
        for w in tl.static_range((F.BLOCK_N + 31) // 32):
            words = words + (tl.load(row_ptr + w, mask=bits >= 0, other=-1),)
    return words


@triton.jit
def shown(words, start_n, r2, n2, end_n, sizes, F: tl.constexpr):
    """Mask of the elements of a tile that take part, by its words or by comparison."""
    if F.KIND == "sparse":
        # [1, BLOCK_N]
        column = n2 - start_n
        # [BLOCK_M, 1], then [BLOCK_M, BLOCK_N]
        word = words[0]
        for w in tl.static_range(1, (F.BLOCK_N + 31) // 32):
            word = tl.where(column // 32 == w, words[w], word)
        if F.BLOCK_N < 32:
            column = n2 % F.BLOCK_KV
        seen = ((word >> (column % 32)) & 1) != 0
        if F.CLIP:
            seen = seen & (n2 < end_n)
    else:
        key, end = visible(None, 0, start_n, r2, n2, end_n, sizes, True, F)
        seen = key < end
    return seen
