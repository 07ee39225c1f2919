"""Elements of a tile that take part, in the forward pass for Hopper: by the bits of a mask, and by
dropout. Both are found in layouts of their own, near that of a product.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

from .dropout import draw_words, keep_drawn
from .gluon_loads import ROWS
from .primitives import keep_seen


@constexpr_function
def bits_layout(WORDS):
    """Layout of a tile [ROWS, WORDS, 32 columns] as a product leaves it in threads, its registers
    in another order: those of a row follow each other, and of them those of a byte of `packed`.
    """
    words = [[0, n, 0] for n in (1, 2) if n < WORDS]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], *words, [0, 0, 8], [0, 0, 16], [8, 0, 0]],
        lane_bases=[[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, WORDS, 32],
    )


@gluon.jit
def keep_bits(s, bits_ptr, bits, start_n, first_row, end_n, OTHER: gl.constexpr, F: gl.constexpr):
    """The elements of a tile whose bits are set, else OTHER; all of them where `bits` is -1.

    A thread holds two columns of each eight, a pair of bits in each byte of a word. The pairs of a
    row's words are put into one register, of which one instruction makes several predicates.
    """
    WIDTH: gl.constexpr = 32
    WORDS: gl.constexpr = F.BLOCK_N // WIDTH
    layout: gl.constexpr = bits_layout(WORDS)
    # [ROWS, WORDS, WIDTH]
    parts = gl.convert_layout(gl.reshape(s, [ROWS, WORDS, WIDTH]), layout)
    by_word: gl.constexpr = gl.SliceLayout(2, layout)
    by_column: gl.constexpr = gl.SliceLayout(0, layout)
    # [ROWS], [WORDS]
    r = gl.arange(0, ROWS, gl.SliceLayout(1, by_word))
    w = gl.arange(0, WORDS, gl.SliceLayout(0, by_word))
    per_row: gl.constexpr = (F.BLOCK_KV + 31) // 32
    place = bits_ptr + (bits.to(gl.int64) * F.BLOCK_Q + first_row % F.BLOCK_Q) * per_row
    if F.BLOCK_KV > F.BLOCK_N:
        place += start_n % F.BLOCK_KV // F.BLOCK_N * WORDS
    # [ROWS, WORDS]
    word = gl.load(place + (r * per_row)[:, None] + w[None, :], mask=bits >= 0, other=-1)
    if F.CLIP:  # bits beyond a sample's keys need not be 0
        left = gl.minimum(gl.maximum(end_n - start_n - w * 32, 0), 32)
        word &= ((1 << left.to(gl.int64)) - 1).to(gl.int32)[None, :]
    # [WORDS, 1], [1, WIDTH]
    n = gl.arange(0, WORDS, gl.SliceLayout(1, by_column))[:, None]
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, by_column))[None, :]
    # [ROWS, WORDS, WIDTH]
    pairs = (word[:, :, None] >> (c % 8 // 2 * 2)[None, :, :]) & 0x03030303
    # [ROWS, WIDTH]: the thread's pair in byte b of word n is at bits 2n and 2n + 1 of byte b
    packed = gl.sum(pairs << (n * 2)[None, :, :], 1)
    # [ROWS, WORDS, WIDTH]
    seen = (packed[:, None, :], (1 << (c // 8 * 8 + n * 2 + c % 2))[None, :, :])
    kept = keep_seen(seen, parts, OTHER, True, F)
    return gl.convert_layout(gl.reshape(kept, [ROWS, F.BLOCK_N]), s.type.layout)


@constexpr_function
def quads_layout(QUADS):
    """Layout of a tile [ROWS, QUADS], an entry to four columns of a product: a thread has a quarter
    of the entries of each four threads that hold a row.
    """
    return gl.DistributedLinearLayout(
        reg_bases=[*([0, n] for n in (4, 8, 16) if n < QUADS), [8, 0]],
        lane_bases=[[0, 2], [0, 1], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, QUADS],
    )


@gluon.jit
def words_across(tile, first_i, start_n, pair, modifiers, F: gl.constexpr):
    """Dropout's words of a tile, queries down: as in `dropout_keep`."""
    QUADS: gl.constexpr = F.BLOCK_N // 4
    layout: gl.constexpr = quads_layout(QUADS)
    # [ROWS, 1], [1, QUADS]
    i2 = (first_i + gl.arange(0, ROWS, gl.SliceLayout(1, layout)))[:, None]
    quad = (start_n // 4 + gl.arange(0, QUADS, gl.SliceLayout(0, layout)))[None, :]
    # [ROWS, QUADS]
    w0, w1, w2, w3 = draw_words(modifiers.seed, quad, i2, pair)
    # [ROWS, QUADS, 2, 2], in the order of the columns
    words = gl.join(gl.join(w0, w2), gl.join(w1, w3))
    # [ROWS, BLOCK_N]
    return gl.convert_layout(gl.reshape(words, [ROWS, F.BLOCK_N]), tile.type.layout)


@gluon.jit
def keep_weights(words, p, modifiers):
    """The elements of a tile that dropout keeps, else 0."""
    return keep_drawn(words, gl.cast(modifiers.threshold, gl.uint32), p)
