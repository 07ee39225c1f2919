"""Functions that the block-sparse kernels share: tiles of memory, masks and the softmax.

Logits live in the log2 domain inside the kernels (exp2 is the hardware's exponential), or with a
bias in the natural one (F.NATURAL), where they are added in float32 as PyTorch adds them. What is
stored is natural. An index ending in 2 has two dimensions, one of size 1, so a helper serves tiles
in either orientation: queries down and keys across (forward, dQ), or keys down and queries across
(dK, dV).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# $0 = $3 where an element takes part, else OTHER
SELECT = "{ .reg .pred seen; .reg .b32 set; TEST; selp.f32 $0, $3, OTHER, seen; }"
HAS_BIT = SELECT.replace("TEST", "and.b32 set, $1, $2; setp.ne.b32 seen, set, 0")
COMES_BEFORE = SELECT.replace("TEST", "setp.lt.s32 seen, $1, $2")
HAS_BIT_OR_ZERO = tl.constexpr(HAS_BIT.replace("OTHER", "0f00000000"))
HAS_BIT_OR_INF = tl.constexpr(HAS_BIT.replace("OTHER", "0fFF800000"))
BEFORE_OR_ZERO = tl.constexpr(COMES_BEFORE.replace("OTHER", "0f00000000"))
BEFORE_OR_INF = tl.constexpr(COMES_BEFORE.replace("OTHER", "0fFF800000"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ROWS_OF_A_TILE = tl.constexpr(128)  # at most


@triton.jit
def head_of(base, strides, b, h):
    """Pointer to the first row of a sample's head."""
    return base + (tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1])


@triton.jit
def row_stride(strides, F: tl.constexpr):
    """Step from one row to the next; in 64 bits where a tile of rows outgrows 32."""
    stride = strides[2]
    if F.WIDE:
        stride = tl.cast(stride, tl.int64)
    return stride


@triton.jit
def keys_of(inputs, b, h, F: tl.constexpr):
    """(keys, values, their row strides) of a key head."""
    k_ptr = head_of(inputs.key, inputs.key_strides, b, h)
    v_ptr = head_of(inputs.value, inputs.value_strides, b, h)
    return k_ptr, v_ptr, (row_stride(inputs.key_strides, F), row_stride(inputs.value_strides, F))


@triton.jit
def load_tile(
    base,
    start,
    stride,
    end,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Rows start .. start + SIZE of a matrix, [SIZE, PAD]; 0 beyond column DIM and, if CHECK, rows
    0 .. end.
    """
    offs = tl.arange(0, SIZE)
    offs_d = tl.arange(0, PAD)
    ptrs = base + tl.cast(start, tl.int64) * stride + (offs[:, None] * stride + offs_d[None, :])
    # as unsigned numbers, so that one comparison is both
    inside = (start + offs).to(tl.uint32, bitcast=True) < tl.cast(end, tl.uint32, bitcast=True)
    if CHECK and DIM != PAD:
        tile = tl.load(ptrs, mask=inside[:, None] & (offs_d < DIM)[None, :], other=0.0)
    elif CHECK:
        tile = tl.load(ptrs, mask=inside[:, None], other=0.0)
    elif DIM != PAD:
        tile = tl.load(ptrs, mask=(offs_d < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(
    base, start, stride, end, tile, SIZE: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr
):
    """Store [SIZE, PAD] as rows start .. start + SIZE of a matrix, clipped to rows 0 .. end and
    columns < DIM.
    """
    offs = tl.arange(0, SIZE)
    offs_d = tl.arange(0, PAD)
    ptrs = base + tl.cast(start, tl.int64) * stride + (offs[:, None] * stride + offs_d[None, :])
    inside = (start + offs >= 0) & (start + offs < end)
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=inside[:, None] & (offs_d < DIM)[None, :])


@triton.jit
def tile_bits(bits_ptr, bits, start_n, r2, F: tl.constexpr):
    """(word, bit), both int32 of a tile's shape: an element has its bit set where word & bit.

    The word is shifted by the column % 8 and the bit is at the column // 8 * 8, because a thread
    holds columns 8 apart of a matrix product: they share one shift, and have constants as bits.
    """
    WIDTH: tl.constexpr = F.BLOCK_N if F.BLOCK_N < 32 else 32
    WORDS: tl.constexpr = F.BLOCK_N // WIDTH
    DOWN: tl.constexpr = r2.shape[0] == 1  # keys down, queries across
    per_row: tl.constexpr = (F.BLOCK_KV + 31) // 32
    rows = bits_ptr + (bits.to(tl.int64) * F.BLOCK_Q + r2 % F.BLOCK_Q) * per_row
    rows += (start_n % F.BLOCK_KV) // 32
    w = tl.arange(0, WORDS)
    c = tl.arange(0, WIDTH)
    if DOWN:
        word = tl.load(rows + w[:, None])[:, None, :]  # [WORDS, 1, BLOCK_M]
        c = c[None, :, None]
        shape: tl.constexpr = (F.BLOCK_N, r2.shape[1])
    else:
        word = tl.load(rows + w[None, :])[:, :, None]  # [BLOCK_M, WORDS, 1]
        c = c[None, None, :]
        shape: tl.constexpr = (r2.shape[0], F.BLOCK_N)
    if F.BLOCK_N < 32:
        word >>= start_n % F.BLOCK_KV % 32
    # [BLOCK_M, WORDS, WIDTH], or [WORDS, WIDTH, BLOCK_M] where keys go down
    word, bit = tl.broadcast(word >> (c % 8), 1 << (c // 8 * 8))
    return tl.reshape(word, shape), tl.reshape(bit, shape)


@triton.jit
def visible(bits_ptr, bits, start_n, r2, n2, end_n, sizes, MASKED: tl.constexpr, F: tl.constexpr):
    """Visible elements of a tile, for `keep_seen`: `tile_bits`, or the number of a key and that of
    the first key that is not seen.
    """
    if MASKED and F.KIND == "sparse":
        left, right = tile_bits(bits_ptr, bits, start_n, r2, F)
        if F.CLIP:  # bits beyond the keys of the mask are 0, those beyond a sample's need not be
            right = tl.where(n2 < end_n, right, 0)
    elif MASKED and F.KIND == "causal":
        left = n2
        right = tl.minimum(r2 + (sizes.kv_len - sizes.rows + 1), end_n)
    else:
        left = n2
        right = end_n
    return left, right


@triton.jit
def keep_set(word, bit, x, OTHER: tl.constexpr):
    """The elements of a float32 tile whose bit of a word is set, OTHER in place of the rest; in PTX
    as `keep_seen`.
    """
    if not INTERPRETED and is_cuda():
        ASM: tl.constexpr = HAS_BIT_OR_ZERO if OTHER == 0.0 else HAS_BIT_OR_INF
        kept = tl.inline_asm_elementwise(
            ASM, "=f,r,r,f", [word, bit, x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        kept = tl.where((word & bit) != 0, x, OTHER)
    return kept


@triton.jit
def keep_seen(seen, x, OTHER: tl.constexpr, MASKED: tl.constexpr, F: tl.constexpr):
    """The elements of a float32 tile that take part, OTHER in place of the rest.

    In PTX where it can be: the compiler collects the comparisons of a tile in words of their own,
    which costs more than the comparisons.
    """
    left, right = seen
    if MASKED and F.KIND == "sparse":
        kept = keep_set(left, right, x, OTHER)
    elif not INTERPRETED and is_cuda():
        ASM: tl.constexpr = BEFORE_OR_ZERO if OTHER == 0.0 else BEFORE_OR_INF
        kept = tl.inline_asm_elementwise(
            ASM, "=f,r,r,f", [left, right, x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        kept = tl.where(left < right, x, OTHER)
    return kept


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def bias_base(modifiers, b, h, F: tl.constexpr):
    """Pointer to the bias of a (batch, head)."""
    base = modifiers.bias
    if F.BIAS != "none":
        base += tl.cast(h, tl.int64) * modifiers.bias_strides[1]
        base += tl.cast(b, tl.int64) * modifiers.bias_strides[0]
    return base


@triton.jit
def bias_tile(base, strides, r2, n2, offset, sizes, F: tl.constexpr):
    """Bias of a tile, float32; 0 outside."""
    if F.BIAS == "relative":
        entry = n2 - r2 + (sizes.rows - 1)
        inside = (entry >= 0) & (entry < sizes.rows + sizes.kv_len - 1)
    else:
        i2 = r2 - offset
        inside = (i2 >= 0) & (i2 < sizes.q_len) & (n2 < sizes.kv_len)
        entry = i2.to(tl.int64) * strides[2] + n2.to(tl.int64) * strides[3]
    return tl.load(base + entry, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def capped(qk, modifiers, F: tl.constexpr):
    """Logits before a bias, up to the `factor` of a plain score, and d capped / d scaled score."""
    slope = 1.0
    if F.SOFTCAP:
        t = tanh(qk * modifiers.scale)
        s = t * modifiers.softcap
        slope = 1.0 - t * t
    elif F.LINEAR:
        s = qk
    else:
        s = qk * modifiers.scale
    return s, slope


@triton.jit
def logits(qk, base, r2, n2, offset, sizes, modifiers, F: tl.constexpr):
    """`capped` with the bias."""
    s, slope = capped(qk, modifiers, F)
    if F.BIAS != "none":
        s += bias_tile(base, modifiers.bias_strides, r2, n2, offset, sizes, F)
    return s, slope


@triton.jit
def log2_factor(modifiers, F: tl.constexpr):
    """Factor on a score on its way into exp2, as one fused multiply-add, when nothing else
    changes it.
    """
    factor = 1.0
    if F.LINEAR:
        factor = modifiers.scale
    return factor


@triton.jit
def fall(m, m_new, NATURAL: tl.constexpr):
    """Factor of a sum whose reference goes from m to m_new."""
    if NATURAL:
        factor = tl.exp2((m - m_new) * LOG2E)
    else:
        factor = tl.exp2(m - m_new)
    return factor


@triton.jit
def online_softmax(
    s, factor, m_i, l_i, SAFE: tl.constexpr, SLACK: tl.constexpr = 0, NATURAL: tl.constexpr = False
):
    """One step of the running softmax over columns: (p, rescale of what was summed so far, m_i,
    l_i).

    SAFE when a whole row of the tile can be -inf. m_i, which only has to be near the maximum, stays
    until that is more than SLACK above it, and p stays below 2^SLACK.
    """
    m_i_new = tl.maximum(m_i, tl.max(s, 1) * factor)
    if SLACK > 0:
        m_i_new = tl.where(m_i_new > m_i + SLACK, m_i_new, m_i)
    pivot = m_i_new
    if SAFE:
        pivot = tl.where(m_i_new == float("-inf"), 0.0, m_i_new)
    if NATURAL:
        p = tl.exp2((s - pivot[:, None]) * LOG2E)
    else:
        p = tl.exp2(s * factor - pivot[:, None])
    alpha = fall(m_i, pivot, NATURAL)
    return p, alpha, m_i_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def probabilities(s, lse2, residual2, modifiers, F: tl.constexpr):
    """P of a tile of logits."""
    if F.NATURAL:  # the difference is exact where both are large
        p = tl.exp2((s - lse2) * LOG2E - residual2)
    else:
        p = tl.exp2(s * log2_factor(modifiers, F) - lse2)
    return p


@triton.jit
def score_gradient(
    qk,
    dp,
    lse2,
    residual2,
    delta2,
    keep,
    bits_ptr,
    bits,
    start_n,
    r2,
    n2,
    offset,
    end_n,
    base,
    sizes,
    modifiers,
    MASKED: tl.constexpr,
    F: tl.constexpr,
):
    """(p after dropout, d logit, d capped / d scaled score) of a tile, from its dot products."""
    s, slope = logits(qk, base, r2, n2, offset, sizes, modifiers, F)
    p = probabilities(s, lse2, residual2, modifiers, F)
    if F.DROPOUT:
        dp = tl.where(keep, dp * modifiers.keep_scale, 0.0)
    ds = p * (dp - delta2)
    if MASKED or F.CLIP:
        seen = visible(bits_ptr, bits, start_n, r2, n2, end_n, sizes, MASKED, F)
        p = keep_seen(seen, p, 0.0, MASKED, F)
        ds = keep_seen(seen, ds, 0.0, MASKED, F)
    if F.DROPOUT:
        p = tl.where(keep, p, 0.0)
    return p, ds, slope


@triton.jit
def padded_rows(q_len):
    """Rows, a whole number of the largest tiles, that vectors over queries are padded to."""
    return tl.cdiv(q_len, ROWS_OF_A_TILE) * ROWS_OF_A_TILE


@triton.jit
def load_rows(ptr, start_i, end, other, SIZE: tl.constexpr, CHECK: tl.constexpr):
    """Entries start_i .. start_i + SIZE of a vector over queries; if CHECK, `other` outside 0 ..
    end.
    """
    ptrs = ptr + start_i + tl.arange(0, SIZE)
    if CHECK:
        i = start_i + tl.arange(0, SIZE)
        rows = tl.load(ptrs, mask=(i >= 0) & (i < end), other=other)
    else:
        rows = tl.load(ptrs)
    return rows


@triton.jit
def load_lse(ptr, pair, start_i, q_len, SIZE: tl.constexpr, AXIS: tl.constexpr, F: tl.constexpr):
    """(lse, residual) of queries start_i .. start_i + SIZE as `Operands.lse` has them, with a
    dimension of size 1 at AXIS.
    """
    PARTS: tl.constexpr = 2 if F.NATURAL else 1
    ptr += tl.cast(pair, tl.int64) * PARTS * padded_rows(q_len)
    lse = load_rows(ptr, start_i, q_len, float("inf"), SIZE, F.OFFSET)
    residual = tl.zeros_like(lse)
    if F.NATURAL:
        residual = load_rows(ptr + padded_rows(q_len), start_i, q_len, 0.0, SIZE, F.OFFSET)
    return tl.expand_dims(lse, AXIS), tl.expand_dims(residual, AXIS)
