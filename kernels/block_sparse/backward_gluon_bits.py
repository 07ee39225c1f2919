"""Bits of tiles in the Gluon kernels of the backward pass."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_loads import ROWS
from .primitives import keep_seen


@gluon.jit
def keep_bits_across(p, bits_ptr, tag, first_row, F: gl.constexpr):
    """The probabilities whose bits are set, else 0; all of them where the tag is -1. As in the
    forward.
    """
    WIDTH: gl.constexpr = 32
    WORDS: gl.constexpr = F.BLOCK_N // WIDTH
    layout: gl.constexpr = p.type.layout
    # [ROWS, WORDS, WIDTH]
    parts = gl.reshape(p, [ROWS, WORDS, WIDTH])
    by_word: gl.constexpr = gl.SliceLayout(2, parts.type.layout)
    down: gl.constexpr = gl.SliceLayout(1, by_word)
    # [ROWS], [WORDS], [WIDTH]
    r = (first_row + gl.arange(0, ROWS, down)) % F.BLOCK_Q
    w = gl.arange(0, WORDS, gl.SliceLayout(0, by_word))
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, parts.type.layout)))
    per_row: gl.constexpr = (F.BLOCK_KV + 31) // 32
    split: gl.constexpr = F.BLOCK_KV // F.BLOCK_N
    # [1]
    place = tag.load(down)
    # [ROWS]
    words = bits_ptr + ((place // split).to(gl.int64) * F.BLOCK_Q + r) * per_row
    words += place % split * WORDS
    # [ROWS, WORDS]
    word = gl.load(words[:, None] + w[None, :], mask=(place >= 0)[:, None], other=-1)
    # [ROWS, WORDS, WIDTH], as `tile_bits`
    seen = (word[:, :, None] >> (c % 8)[None, None, :], (1 << (c // 8 * 8))[None, None, :])
    kept = keep_seen(seen, parts, 0.0, True, F)
    return gl.convert_layout(gl.reshape(kept, [ROWS, F.BLOCK_N]), layout)


@gluon.jit
def keep_bits_down(p, bits_ptr, tag, first, F: gl.constexpr):
    """The probabilities whose bits are set, else 0; all of them where the tag is -1. `first` is the
    first key within its block.

    A word of 32 keys becomes a dimension, as in the forward, with keys down.
    """
    WIDTH: gl.constexpr = 32
    WORDS: gl.constexpr = ROWS // WIDTH
    layout: gl.constexpr = p.type.layout
    # [WORDS, WIDTH, BLOCK_M]
    parts = gl.reshape(p, [WORDS, WIDTH, F.BLOCK_M])
    by_word: gl.constexpr = gl.SliceLayout(1, parts.type.layout)
    across: gl.constexpr = gl.SliceLayout(0, by_word)
    # [WORDS], [BLOCK_M], [WIDTH]
    w = gl.arange(0, WORDS, gl.SliceLayout(1, by_word))
    m = gl.arange(0, F.BLOCK_M, across)
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(2, parts.type.layout)))
    per_row: gl.constexpr = (F.BLOCK_KV + 31) // 32
    # [1]
    row = tag.load(across)
    # [BLOCK_M]
    words = (bits_ptr + first // 32 + row.to(gl.int64) * per_row) + m * per_row
    # [WORDS, BLOCK_M]
    word = gl.load(words[None, :] + w[:, None], mask=(row >= 0)[None, :], other=-1)
    # [WORDS, WIDTH, BLOCK_M], as `tile_bits`
    seen = (word[:, None, :] >> (c % 8)[None, :, None], (1 << (c // 8 * 8))[None, :, None])
    kept = keep_seen(seen, parts, 0.0, True, F)
    return gl.convert_layout(gl.reshape(kept, [ROWS, F.BLOCK_M]), layout)
