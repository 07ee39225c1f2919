"""Words of 32 bits that say which elements of a tile take part, and how they hide the rest, in the
Gluon kernels of the backward pass.

A tile is hidden when it has become the operand of a product, two elements of 16 bits to a register:
one instruction makes the mask of a register and one applies it, and what was hidden may have been
anything, infinite or NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.target_info import is_cuda

from .primitives import INTERPRETED

WIDTH = tl.constexpr(32)  # bits of a word
HALF = tl.constexpr(16)
# the sign of a byte of $1 fills the lower half of the mask, that of $2 the upper one
KEEP_PAIR = tl.constexpr("{ .reg .b32 mask; prmt.b32 mask, $1, $2, $3; and.b32 $0, $5, mask; }")
FIRST_BYTE = tl.constexpr(0xCC88)  # selects it; the next is 0x1111 on
# the same with the words of a pair, of 16 bits, in one register
KEEP_PAIR_OF_HALVES = tl.constexpr(
    "{ .reg .b32 bits, mask; shl.b32 bits, $1, $2; prmt.b32 mask, bits, bits, $4;"
    "  and.b32 $0, $6, mask; }"
)
FIRST_BYTES = tl.constexpr(0xAA88)
KEEP_WHERE = (
    "{ .reg .b32 mask, zero; mov.b32 zero, 0; set.neu.u32.TYPE mask, $2, zero;"
    "  and.b32 $0, $1, mask; }"
)
KEEP_WHERE_BF16 = tl.constexpr(KEEP_WHERE.replace("TYPE", "bf16x2"))
KEEP_WHERE_FP16 = tl.constexpr(KEEP_WHERE.replace("TYPE", "f16x2"))


@triton.jit
def keep_pairs(x, word, c):
    """Elements of 16 bits where bit c of a word is set, else 0. A thread holds pairs of the last
    dimension.
    """
    if not INTERPRETED and is_cuda():
        kept = tl.inline_asm_elementwise(
            KEEP_PAIR, "=r,r,r,r,r,r", [word << (7 - c % 8), FIRST_BYTE + c // 8 * 0x1111, x],
            dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        kept = tl.where((word >> c) & 1 != 0, x, 0.0)
    return kept


@triton.jit
def keep_halves(x, half, c):
    """`keep_pairs` with words of 16 bits, those of a pair in one register."""
    if not INTERPRETED and is_cuda():
        kept = tl.inline_asm_elementwise(
            KEEP_PAIR_OF_HALVES, "=r,r,r,r,r,r,r",
            [half, 7 - c % 8, FIRST_BYTES + c // 8 * 0x1111, x],
            dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        kept = tl.where((half >> c) & 1 != 0, x, 0.0)
    return kept


@triton.jit
def keep_where(x, other):
    """Elements of 16 bits where those of another tile are not 0, else 0: words need not live."""
    if not INTERPRETED and is_cuda():
        BF16: tl.constexpr = x.dtype == tl.bfloat16
        kept = tl.inline_asm_elementwise(
            KEEP_WHERE_BF16 if BF16 else KEEP_WHERE_FP16, "=r,r,r", [x, other],
            dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        kept = tl.where(other != 0.0, x, 0.0)
    return kept


@triton.jit
def ones_below(n):
    """A word whose lowest n bits are set: none for n < 0, all for n > 31."""
    some = (1 << tl.minimum(tl.maximum(n, 0), 31)) - 1
    return tl.where(n > 31, -1, some)


@gluon.jit
def keep_across(x, word):
    """The elements of a tile [M, N] of 16 bits whose bits in words [M, N / 32] are set, else 0."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    # [M, N / 32, 32]
    parts = gl.reshape(x, [M, N // WIDTH, WIDTH])
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, parts.type.layout)))
    kept = keep_pairs(parts, word[:, :, None], c[None, None, :])
    return gl.convert_layout(gl.reshape(kept, [M, N]), x.type.layout)


@gluon.jit
def keep_down(x, half):
    """The elements of a tile [M, N] of 16 bits whose bits in words [M / 16, N] of 16 bits are set,
    else 0.
    """
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    # [M / 16, 16, N]
    parts = gl.reshape(x, [M // HALF, HALF, N])
    c = gl.arange(0, HALF, gl.SliceLayout(0, gl.SliceLayout(2, parts.type.layout)))
    kept = keep_halves(parts, half[:, None, :], c[None, :, None])
    return gl.convert_layout(gl.reshape(kept, [M, N]), x.type.layout)


@gluon.jit
def places_across(s):
    """Rows [M, 1] and words [1, N / 32] of a tile [M, N] of scores, for `keep_across`."""
    M: gl.constexpr = s.shape[0]
    WORDS: gl.constexpr = s.shape[1] // WIDTH
    parts = gl.reshape(s, [M, WORDS, WIDTH])
    by_word: gl.constexpr = gl.SliceLayout(2, parts.type.layout)
    m = gl.arange(0, M, gl.SliceLayout(1, by_word))
    w = gl.arange(0, WORDS, gl.SliceLayout(0, by_word))
    return m[:, None], w[None, :]


@gluon.jit
def places_down(s):
    """Words [M / 16, 1] and columns [1, N] of a tile [M, N] of scores, for `keep_down`."""
    WORDS: gl.constexpr = s.shape[0] // HALF
    N: gl.constexpr = s.shape[1]
    parts = gl.reshape(s, [WORDS, HALF, N])
    by_word: gl.constexpr = gl.SliceLayout(1, parts.type.layout)
    w = gl.arange(0, WORDS, gl.SliceLayout(1, by_word))
    n = gl.arange(0, N, gl.SliceLayout(0, by_word))
    return w[:, None], n[None, :]


@gluon.jit
def load_words(ptrs, bits, ANY: gl.constexpr):
    """Words of tile_bits; with ANY the tile may be FULL, and `bits` is -1 then."""
    if ANY:
        word = gl.load(ptrs, mask=bits >= 0, other=-1)
    else:
        word = gl.load(ptrs)
    return word


@gluon.jit
def words_of_queries(
    s, lists, start, bits, first_row, end_n, sizes, ANY: gl.constexpr, F: gl.constexpr
):
    """Words [ROWS, BLOCK_N / 32] of a tile of scores, queries down: the bits of the mask, or what a
    comparison says. `start` is the first key, `bits` the row of tile_bits, -1 where all are seen.
    """
    # [ROWS, 1], [1, BLOCK_N / 32]
    m, w = places_across(s)
    row = first_row + m
    if F.KIND == "sparse":
        per_row: gl.constexpr = (F.BLOCK_KV + 31) // 32
        # [ROWS, 1]
        rows = lists.bits + (bits.to(gl.int64) * F.BLOCK_Q + row % F.BLOCK_Q) * per_row
        rows += start % F.BLOCK_KV // 32
        # [ROWS, BLOCK_N / 32]
        word = load_words(rows + w, bits, ANY or F.CLIP)
        if F.CLIP:  # bits beyond a sample's keys need not be 0
            word &= ones_below(end_n - start - w * 32)
    else:
        end = end_n + row * 0
        if F.KIND == "causal":
            end = gl.minimum(row + (sizes.kv_len - sizes.rows + 1), end_n)
        word = ones_below(end - start - w * 32)
    return word


@gluon.jit
def words_of_keys(s, lists, start, bits, first_key, sizes, ANY: gl.constexpr, F: gl.constexpr):
    """Words of a tile of scores, keys down: the bits of the mask for `keep_down`, or what a
    comparison says for `keep_across`. `start` and `bits` are the first query's row of the mask and
    of tile_bits, negative where all are seen.
    """
    if F.KIND == "sparse":
        # [ROWS / 16, 1], [1, BLOCK_M]
        w, m = places_down(s)
        per_row: gl.constexpr = (F.BLOCK_KV + 31) // 32 * 2
        halves = lists.bits.to(gl.pointer_type(gl.int16), bitcast=True)
        halves += first_key % F.BLOCK_KV // HALF + bits.to(gl.int64) * per_row
        word = load_words(halves + (m * per_row + w), bits, ANY)
    else:
        # [ROWS, 1], [1, BLOCK_M / 32]
        n, w = places_across(s)
        before = first_key + n - (sizes.kv_len - sizes.rows) - start
        word = ~ones_below(before - w * 32)
    return word
