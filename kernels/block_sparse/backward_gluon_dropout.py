"""Dropout in the Gluon kernel of dK and dV, whose tiles have 64 keys down and 64 queries across.

Registers are short there: what is kept of a tile is a bit an element, 32 to a thread, and is drawn
in a layout in which each word is drawn once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

from .backward_gluon_bits import keep_pairs
from .dropout import draw_words
from .primitives import keep_set


@constexpr_function
def draws_layout():
    """Layout of a tile [16, 64], an entry to four keys: a thread has a quarter of the entries of
    the four threads that hold a query's keys.
    """
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [2, 0], [0, 8]],
        lane_bases=[[0, 2], [0, 4], [0, 16], [0, 32], [1, 0]],
        warp_bases=[[4, 0], [8, 0]],
        block_bases=[],
        shape=[16, 64],
    )


@constexpr_function
def along(AXIS, RANK, layout):
    """Layout of a vector along an axis."""
    for other in reversed(range(RANK)):
        if other != AXIS:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def draw_bits(first_i, start_n, pair, modifiers):
    """Bits of what dropout keeps of a tile, a word to a thread, [4, 2, 4, 4]: that of key
    16 w + 8 a + 4 g + x and query 8 k + 2 t + b is bit 4 k + 2 a + b of word (w, g, x, t).

    Of four threads (w, g, :, t), thread x draws the words of all their keys for the queries with
    k // 2 = x; then each takes the bits of its own keys from the others.
    """
    layout: gl.constexpr = draws_layout()
    q = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    m = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    # [16, 64] each
    words = draw_words(modifiers.seed, start_n // 4 + q, first_i + m, pair)
    place = m // 8 % 2 * 4 + q // 2 % 2 * 2 + m % 2
    drawn = gl.full([16, 64], 0, gl.int32, layout)
    for y in gl.static_range(4):
        kept = words[y] >= gl.cast(modifiers.threshold, gl.uint32)
        drawn += gl.where(kept, 1 << (place + 8 * y), 0)
    # [w, a, g, k // 2, k % 2, t, b] -> [w, g, k // 2, t]
    drawn = gl.reshape(drawn, [4, 2, 2, 4, 2, 4, 2])
    drawn = gl.sum(gl.sum(gl.sum(drawn, 6), 4), 1)
    x = gl.arange(0, 4, along(2, 4, drawn.type.layout))[None, None, :, None]
    bits = drawn * 0
    for y in gl.static_range(4):
        theirs = gl.gather(drawn, drawn * 0 + y, 2)
        bits |= (theirs >> (8 * x) & 255) << (8 * y)
    return bits


@gluon.jit
def keep_bits(p, bits):
    """The elements of a tile [64, 64] in float32, or in 16 bits as an operand, that dropout keeps,
    else 0.
    """
    # [w, a, g, x, k, t, b]
    parts = gl.reshape(p, [4, 2, 2, 4, 8, 4, 2])
    layout: gl.constexpr = parts.type.layout
    by_word: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(4, gl.SliceLayout(6, layout)))
    word = gl.convert_layout(bits, by_word)[:, None, :, :, None, :, None]
    a = gl.arange(0, 2, along(1, 7, layout))[None, :, None, None, None, None, None]
    k = gl.arange(0, 8, along(4, 7, layout))[None, None, None, None, :, None, None]
    b = gl.arange(0, 2, along(6, 7, layout))[None, None, None, None, None, None, :]
    if p.dtype == gl.float32:
        kept = keep_set(word, 1 << (4 * k + 2 * a + b), parts, 0.0)
    else:
        kept = keep_pairs(parts, word, 4 * k + 2 * a + b)
    return gl.convert_layout(gl.reshape(kept, [64, 64]), p.type.layout)
