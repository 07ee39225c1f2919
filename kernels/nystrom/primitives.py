"""The pieces that the Nyström kernels share.

Tiles of the query side have a token a row and a landmark a column, [CHUNK, PAD_M]; those of the key
side a landmark a row, [PAD_M, CHUNK], so that a number a landmark is a number a row, and costs a
thread few registers. No product then has a transposed accumulator on its left. Scores are in log2
units. The state of a landmark is (ref, tot, acc): L = ref + log2(tot) and R = acc / tot,
[PAD_M, BLOCK_V], where `ref` is a whole number, so that moving it scales by powers of two: nothing
but sums ever rounds. `tot` lies near 1, which makes `ref` the L0 of the formulas to within a bit.

A chunk is CHUNK tokens, or a piece: fewer, up to a token whose score rises too far above the
reference. The next piece begins with that token, whose score is its reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(2.0**-100)  # no total that holds a key is so small


@triton.jit
def locate(problem):
    """(part, group of stretches, pair of sample and key head) of this program: one grid axis."""
    pid = tl.program_id(0)
    part = pid % problem.parts
    rest = pid // problem.parts
    return part, rest % problem.groups, rest // problem.groups


@triton.jit
def span_of(stretch, b, problem, table, F: tl.constexpr):
    """First token, end, and row of the states, of a stretch: tokens of one sequence."""
    if F.PACKED:
        start = tl.load(table + 3 * stretch)
        stop = tl.load(table + 3 * stretch + 1)
        row = tl.load(table + 3 * stretch + 2)
    else:
        start = stretch * problem.span
        stop = tl.minimum(start + problem.span, problem.tokens)
        row = b
    return start, stop, row


@triton.jit
def tokens_of(ptr, strides, b, head):
    """(pointer, stride of a token, stride of a head): rows of one sample from one head on."""
    b64, h64 = tl.cast(b, tl.int64), tl.cast(head, tl.int64)
    return ptr + b64 * strides[0] + h64 * strides[1], strides[2], strides[1]


@triton.jit
def head_of(tokens, g):
    """The tokens of query head g of a group."""
    return tokens[0] + tl.cast(g, tl.int64) * tokens[2], tokens[1]


@triton.jit
def full(SIZE: tl.constexpr, value):
    return tl.full([SIZE], value, tl.float32)


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.zeros([ROWS, COLS], tl.float32)


@triton.jit
def uniform(x):
    """x, an int32 the same in all threads, so that the compiler knows: under a branch by a number
    that may differ, addresses of tiles would take registers of every thread.
    """
    return tl.max(tl.full([32], x, tl.int32), 0)


@triton.jit
def inverse(x):
    """1 / x of a number > 0, as near as a division, which is four times as many instructions."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def reciprocal(x):
    """1 / x, and 0 for a sum of nothing."""
    return tl.where(x == 0.0, 0.0, inverse(x))


@triton.jit
def rounded_product(x, y, F: tl.constexpr):
    """x y, rounded before a sum over threads: they then hold the same bits of that sum.

    A thread with one product of a row adds to it what the others send; fused with that sum, each
    would leave another product unrounded. Tensor cores leave a thread two or more: no need there.
    """
    product = x * y
    if F.SCAN:
        product += 0.0
    return product


@triton.jit
def operand(x, F: tl.constexpr):
    """As an operand of a product with something computed: bfloat16, or float32."""
    return x.to(tl.bfloat16) if F.BFLOAT16 else x.to(tl.float32)


@triton.jit
def split(x):
    """(high, low): two bfloat16 that add up to x, to 15 bits."""
    high = cut(x)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def cut(x):
    """x without the bits that bfloat16 has no room for: one instruction, where rounding takes
    several unless it is done in pairs.
    """
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def cut_operand(x, F: tl.constexpr):
    """x in float32 as products will take it, for sums that agree with them."""
    return cut(x) if F.BFLOAT16 else x


@triton.jit
def mm(a, b, F: tl.constexpr):
    return tl.dot(operand(a, F), operand(b, F), input_precision=F.PRECISION)


@triton.jit
def mm_acc(a, b, acc, F: tl.constexpr):
    return tl.dot(operand(a, F), operand(b, F), acc, input_precision=F.PRECISION)


@triton.jit
def rows_ptrs(base, start, stride, SIZE: tl.constexpr, PAD: tl.constexpr, LATE: tl.constexpr):
    """Pointers to SIZE rows of a matrix, [SIZE, PAD].

    Offsets within a chunk, the same for all, sit in registers; not so LATE, by times of the stream.
    """
    offs, cols = tl.arange(0, SIZE), tl.arange(0, PAD)
    if LATE:
        ptrs = (base + (start + offs).to(tl.int64) * stride)[:, None] + cols[None, :]
    else:
        within = offs[:, None] * stride + cols[None, :]
        ptrs = base + tl.cast(start, tl.int64) * stride + within
    return ptrs


@triton.jit
def load_rows(base, start, stride, keep, width, SIZE: tl.constexpr, PAD: tl.constexpr,
              NARROW: tl.constexpr, LATE: tl.constexpr = False):  # fmt: skip
    """Rows of a matrix, [SIZE, PAD]; 0 where `keep` is false and, if NARROW, beyond `width`."""
    cols = tl.arange(0, PAD)
    ptrs = rows_ptrs(base, start, stride, SIZE, PAD, LATE)
    mask = keep[:, None]
    if NARROW:
        mask = mask & (cols < width)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_rows(base, start, stride, keep, width, x, SIZE: tl.constexpr, PAD: tl.constexpr,
               NARROW: tl.constexpr, LATE: tl.constexpr = False):  # fmt: skip
    cols = tl.arange(0, PAD)
    ptrs = rows_ptrs(base, start, stride, SIZE, PAD, LATE)
    mask = keep[:, None]
    if NARROW:
        mask = mask & (cols < width)[None, :]
    tl.store(ptrs, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_landmarks(base, stride, block, dtype: tl.constexpr, F: tl.constexpr):
    """Columns block * BLOCK_D .. of the landmarks, transposed, [BLOCK_D, PAD_M]."""
    offs_d = block * F.BLOCK_D + tl.arange(0, F.BLOCK_D)
    offs_m = tl.arange(0, F.PAD_M)
    inside = (offs_d < F.DIM)[:, None] & (offs_m < F.MARKS)[None, :]
    ptrs = base + offs_m[None, :] * stride + offs_d[:, None]
    return tl.load(ptrs, mask=inside, other=0.0).to(dtype)


@triton.jit
def load_vector(ptr, F: tl.constexpr):
    """One number a landmark, 0 for the padding, [PAD_M] float32."""
    offs_m = tl.arange(0, F.PAD_M)
    return tl.load(ptr + offs_m, mask=offs_m < F.MARKS, other=0.0).to(tl.float32)


@triton.jit
def load_core(base, stride, F: tl.constexpr):
    """The core, [PAD_M, PAD_M] float32, 0 for the padding."""
    offs_m = tl.arange(0, F.PAD_M)
    inside = (offs_m < F.MARKS)[:, None] & (offs_m < F.MARKS)[None, :]
    ptrs = base + offs_m[:, None] * stride + offs_m[None, :]
    return tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def landmark_products(x_ptr, start, stride, keep, tile, y_ptr, y_stride, F: tl.constexpr):
    """x . landmark for the tokens of a chunk; `tile` holds the landmarks if they fit a block."""
    if F.BLOCKS_D == 1:
        x = load_rows(x_ptr, start, stride, keep, F.DIM, F.CHUNK, F.BLOCK_D, F.DIM != F.BLOCK_D)
        dots = tl.dot(x, tile, input_precision=F.PRECISION)
    else:
        dots = zeros(F.CHUNK, F.PAD_M)
        BLOCKS: tl.constexpr = F.BLOCKS_D
        for n in tl.static_range(BLOCKS):
            x = load_rows(x_ptr + n * F.BLOCK_D, start, stride, keep, F.DIM - n * F.BLOCK_D,
                          F.CHUNK, F.BLOCK_D, True)  # fmt: skip
            y = load_landmarks(y_ptr, y_stride, n, x.dtype, F)
            dots = tl.dot(x, y, dots, input_precision=F.PRECISION)
    return dots


@triton.jit
def kept_tokens(keep_ptr, start, stop, F: tl.constexpr):
    """Mask of the tokens of the chunk at `start` that are there and not hidden, [CHUNK] bool."""
    offs = start + tl.arange(0, F.CHUNK)
    keep = offs < stop
    if F.KEEP:
        keep = keep & (tl.load(keep_ptr + offs, mask=keep, other=0) != 0)
    return keep


@triton.jit
def read_scores(dots, half2, marks, F: tl.constexpr):
    """Scores of queries in log2 units, -inf for the padding, [CHUNK, PAD_M]."""
    f = dots * marks.scale2
    if F.MASS:
        f -= half2[None, :]
    if F.MARKS != F.PAD_M:
        f = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[None, :], f, float("-inf"))
    return f


@triton.jit
def turned_scores(dots, half2, marks, F: tl.constexpr):
    """`read_scores` with a landmark a row, [PAD_M, CHUNK]."""
    f = dots * marks.scale2
    if F.MASS:
        f -= half2[:, None]
    if F.MARKS != F.PAD_M:
        f = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[:, None], f, float("-inf"))
    return f


@triton.jit
def landmark_features(dots, half2, marks, F: tl.constexpr):
    """Features of queries, [CHUNK, PAD_M]: softmax, or exp(q . k - s_ll / 2) up to a factor."""
    f = read_scores(dots, half2, marks, F)
    e = tl.exp2(f - tl.max(f, 1)[:, None])
    if not F.MASS:
        e = e * inverse(tl.sum(e, 1))[:, None]
    return e


@triton.jit
def turned_features(dots, half2, marks, F: tl.constexpr):
    """`landmark_features` with a landmark a row, [PAD_M, CHUNK]."""
    f = turned_scores(dots, half2, marks, F)
    e = tl.exp2(f - tl.max(f, 0)[None, :])
    if not F.MASS:
        e = e * inverse(tl.sum(e, 0))[None, :]
    return e


@triton.jit
def lower(t0, F: tl.constexpr):
    """[query, key] of the chunk at t0: key not after query.

    Times of the stream, since a mask that is the same in every chunk would sit in registers.
    """
    offs = t0 + tl.arange(0, F.CHUNK)
    return offs[:, None] >= offs[None, :]


@triton.jit
def upper(t0, q0, KEYS: tl.constexpr, QUERIES: tl.constexpr):
    """[key, query] of KEYS tokens from t0 on and QUERIES from q0 on: key not after query."""
    return (t0 + tl.arange(0, KEYS))[:, None] <= (q0 + tl.arange(0, QUERIES))[None, :]


@triton.jit
def incoming_state(L_ptr, R_ptr, line, v0, r0, ROWS: tl.constexpr, F: tl.constexpr):
    """(ref, tot, acc) of ROWS landmarks from r0 on, from a user's L and R; nothing held without
    them or where L = -inf.
    """
    offs_m = r0 + tl.arange(0, ROWS)
    offs_v = v0 + tl.arange(0, F.BLOCK_V)
    if F.STATE:
        L = tl.load(L_ptr + line * F.MARKS + offs_m, mask=offs_m < F.MARKS, other=float("-inf"))
        L = L * LOG2E
        empty = L == float("-inf")
        ref = tl.where(empty, 0.0, tl.floor(L + 0.5))
        tot = tl.where(empty, 0.0, tl.exp2(L - ref))
        ptrs = R_ptr + (line * F.MARKS + offs_m[:, None]) * F.DIM_V + offs_v[None, :]
        inside = ((offs_m < F.MARKS) & ~empty)[:, None] & (offs_v < F.DIM_V)[None, :]
        # [ROWS, BLOCK_V]
        acc = tl.load(ptrs, mask=inside, other=0.0) * tot[:, None]
    else:
        ref = full(ROWS, 0.0)
        tot = full(ROWS, 0.0)
        acc = zeros(ROWS, F.BLOCK_V)
    return ref, tot, acc


@triton.jit
def store_end_state(L_ptr, R_ptr, line, v0, r0, ref, tot, acc, ROWS: tl.constexpr,
                    F: tl.constexpr):  # fmt: skip
    """Store (ref, tot, acc) of ROWS landmarks from r0 on as a user sees it: L natural, -inf where
    nothing is held, and R.
    """
    offs_m = r0 + tl.arange(0, ROWS)
    offs_v = v0 + tl.arange(0, F.BLOCK_V)
    known = offs_m < F.MARKS
    L = tl.where(tot == 0.0, float("-inf"), (ref + tl.log2(tot)) * LN2)
    tl.store(L_ptr + line * F.MARKS + offs_m, L, mask=known)
    # [ROWS, BLOCK_V]
    R = acc / tl.where(tot == 0.0, 1.0, tot)[:, None]
    ptrs = R_ptr + (line * F.MARKS + offs_m[:, None]) * F.DIM_V + offs_v[None, :]
    tl.store(ptrs, R, mask=known[:, None] & (offs_v < F.DIM_V)[None, :])


@triton.jit
def vector_ptrs(base, line, F: tl.constexpr):
    """Pointers to line `line` of (lines, PAD_M)."""
    return base + line * F.PAD_M + tl.arange(0, F.PAD_M)


@triton.jit
def state_ptrs(base, line, v0, F: tl.constexpr):
    """Pointers to line `line` of (lines, PAD_M, PAD_V), BLOCK_V columns from v0 on."""
    offs_m, offs_v = tl.arange(0, F.PAD_M), tl.arange(0, F.BLOCK_V)
    return base + (line * (F.PAD_M * F.PAD_V) + v0) + (offs_m[:, None] * F.PAD_V + offs_v[None, :])


@triton.jit
def load_state(saved, line, v0, F: tl.constexpr):
    ref, tot = tl.load(vector_ptrs(saved.ref, line, F)), tl.load(vector_ptrs(saved.tot, line, F))
    return ref, tot, tl.load(state_ptrs(saved.acc, line, v0, F))


@triton.jit
def store_state(saved, line, v0, ref, tot, acc, F: tl.constexpr):
    tl.store(vector_ptrs(saved.ref, line, F), ref)
    tl.store(vector_ptrs(saved.tot, line, F), tot)
    tl.store(state_ptrs(saved.acc, line, v0, F), acc)
