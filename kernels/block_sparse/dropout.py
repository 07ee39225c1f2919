"""Dropout: the words that decide what is kept, and the choice by them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from .primitives import INTERPRETED, SELECT

MULTIPLY = tl.constexpr("{ .reg .b64 both; mul.wide.u32 both, $2, $3; mov.b64 {$1, $0}, both; }")
NOT_BELOW = SELECT.replace("TEST", "setp.hs.u32 seen, $1, $2")
NOT_BELOW_OR_ZERO = tl.constexpr(NOT_BELOW.replace("OTHER", "0f00000000"))


@triton.jit
def multiply_words(x, FACTOR: tl.constexpr):
    """(high word, low word) of a product of words; in PTX, where one instruction gives both."""
    if not INTERPRETED and is_cuda():
        high, low = tl.inline_asm_elementwise(
            MULTIPLY, "=r,=r,r,r", [x, FACTOR], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    else:
        product = x.to(tl.uint64) * FACTOR
        high, low = (product >> 32).to(tl.uint32), product.to(tl.uint32)
    return high, low


@triton.jit
def draw_words(seed_ptr, quad, i2, pair):
    """The four words of philox4x32-10 for the counters (quad, i, pair, 0), as `tl.philox`."""
    seed = tl.load(seed_ptr).to(tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2 = quad.to(tl.uint32), i2.to(tl.uint32), pair.to(tl.uint32)
    c3 = c2 * 0
    for _ in tl.static_range(10):
        high0, low0 = multiply_words(c0, 0xD2511F53)
        high2, low2 = multiply_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropout_keep(i2, start_n, pair, modifiers, BLOCK_N: tl.constexpr):
    """Dropout's keep mask, queries down: key j takes word j % 4 of the counter j // 4."""
    # [BLOCK_N / 4]
    quad = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    # [BLOCK_M, BLOCK_N / 4]
    w0, w1, w2, w3 = draw_words(modifiers.seed, quad[None, :], i2, pair)
    # [BLOCK_M, BLOCK_N]
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= tl.cast(modifiers.threshold, tl.uint32)


@triton.jit
def keep_drawn(words, threshold, x):
    """The elements of a float32 tile whose words are at least the threshold, 0 in place of the
    rest; in PTX as `keep_seen`.
    """
    if not INTERPRETED and is_cuda():
        kept = tl.inline_asm_elementwise(
            NOT_BELOW_OR_ZERO, "=f,r,r,f", [words, threshold, x], dtype=tl.float32, is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        kept = tl.where(words >= threshold, x, 0.0)
    return kept
