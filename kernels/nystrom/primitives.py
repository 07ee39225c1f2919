"""The pieces that the Nyström kernels share.

Tiles have a token a row and a landmark a column, [CHUNK, PAD_M]. Scores are in log2 units. The
state of a landmark is (ref, tot, acc): L = ref + log2(tot) and R = acc / tot, where `ref` is a
whole number, so that moving it scales by powers of two: nothing but sums ever rounds. `acc` is held
transposed, [BLOCK_V, PAD_M], which leaves no product with a transposed accumulator on its left.
`tot` lies near 1, which makes `ref` the L0 of the formulas to within a bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RISE = tl.constexpr(90.0)  # largest exponent above the reference; the products add up to 2^97


@triton.jit
def locate(problem):
    """(part, group of slots, pair of sample and key head) of this program: one grid axis."""
    pid = tl.program_id(0)
    part = pid % problem.parts
    rest = pid // problem.parts
    return part, rest % problem.groups, rest // problem.groups


@triton.jit
def span_of(slot, b, problem, table, F: tl.constexpr):
    """First token, end, and row of the states, of a slot: a stretch of one sequence."""
    if F.PACKED:
        start = tl.load(table + 3 * slot)
        stop = tl.load(table + 3 * slot + 1)
        row = tl.load(table + 3 * slot + 2)
    else:
        start = slot * problem.span
        stop = tl.minimum(start + problem.span, problem.tokens)
        row = b
    return start, stop, row


@triton.jit
def head_of(ptr, g, strides):
    """Where query head g of a group begins."""
    return ptr + tl.cast(g, tl.int64) * strides[1]


@triton.jit
def full(SIZE: tl.constexpr, value):
    return tl.full([SIZE], value, tl.float32)


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.zeros([ROWS, COLS], tl.float32)


@triton.jit
def reciprocal(x):
    """1 / x, and 0 for a sum of nothing."""
    return tl.where(x == 0.0, 0.0, 1.0 / x)


@triton.jit
def operand(x, F: tl.constexpr):
    """As an operand of a product with something computed: bfloat16, or float32."""
    return x.to(tl.bfloat16) if F.BFLOAT16 else x.to(tl.float32)


@triton.jit
def mm(a, b, F: tl.constexpr):
    return tl.dot(operand(a, F), operand(b, F), input_precision=F.PRECISION)


@triton.jit
def mm_core(a, core, F: tl.constexpr):
    """A product with the core, whose large entries cancel: tf32 even in bfloat16, while it fits."""
    if F.PAD_M <= 64:
        product = tl.dot(a, core, input_precision=F.PRECISION)
    else:
        product = mm(a, core, F)
    return product


@triton.jit
def mm_acc(a, b, acc, F: tl.constexpr):
    return tl.dot(operand(a, F), operand(b, F), acc, input_precision=F.PRECISION)


@triton.jit
def load_rows(base, start, stride, keep, width, SIZE: tl.constexpr, PAD: tl.constexpr,
              NARROW: tl.constexpr):  # fmt: skip
    """Rows of a matrix, [SIZE, PAD]; 0 where `keep` is false and, if NARROW, beyond `width`."""
    offs = tl.arange(0, SIZE)
    cols = tl.arange(0, PAD)
    ptrs = base + tl.cast(start, tl.int64) * stride + (offs[:, None] * stride + cols[None, :])
    mask = keep[:, None]
    if NARROW:
        mask = mask & (cols < width)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_rows(base, start, stride, keep, width, x, SIZE: tl.constexpr, PAD: tl.constexpr,
               NARROW: tl.constexpr):  # fmt: skip
    offs = tl.arange(0, SIZE)
    cols = tl.arange(0, PAD)
    ptrs = base + tl.cast(start, tl.int64) * stride + (offs[:, None] * stride + cols[None, :])
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
def parameters(marks, b, h, dtype: tl.constexpr, F: tl.constexpr):
    """(lq_ptr, lk_ptr, lq, lk, core, decay2, half2) of sample b and key head h."""
    b64, h64 = tl.cast(b, tl.int64), tl.cast(h, tl.int64)
    lq_ptr = marks.lq + b64 * marks.lq_strides[0] + h64 * marks.lq_strides[1]
    lk_ptr = marks.lk + b64 * marks.lk_strides[0] + h64 * marks.lk_strides[1]
    core_ptr = marks.core + b64 * marks.core_strides[0] + h64 * marks.core_strides[1]
    lq = load_landmarks(lq_ptr, marks.lq_strides[2], 0, dtype, F)
    lk = load_landmarks(lk_ptr, marks.lk_strides[2], 0, dtype, F)
    core = load_core(core_ptr, marks.core_strides[2], F)
    decay2, half2 = 0.0, 0.0
    if F.DECAY:
        decay2 = load_vector(marks.decay + h * F.MARKS, F) * LOG2E
    if F.MASS:
        half2 = load_vector(marks.half2 + b * marks.half_batch + h * F.MARKS, F)
    return lq_ptr, lk_ptr, lq, lk, core, decay2, half2


@triton.jit
def load_vector(ptr, F: tl.constexpr):
    """One number a landmark, 0 for the padding, [PAD_M] float32."""
    offs_m = tl.arange(0, F.PAD_M)
    return tl.load(ptr + offs_m, mask=offs_m < F.MARKS, other=0.0).to(tl.float32)


@triton.jit
def load_core(base, stride, F: tl.constexpr):
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
def turned_products(x_ptr, start, stride, keep, tile, y_ptr, y_stride, F: tl.constexpr):
    """The same with a landmark a row, [PAD_M, CHUNK]."""
    if F.BLOCKS_D == 1:
        x = load_rows(x_ptr, start, stride, keep, F.DIM, F.CHUNK, F.BLOCK_D, F.DIM != F.BLOCK_D)
        dots = tl.dot(tl.trans(tile), tl.trans(x), input_precision=F.PRECISION)
    else:
        dots = zeros(F.PAD_M, F.CHUNK)
        BLOCKS: tl.constexpr = F.BLOCKS_D
        for n in tl.static_range(BLOCKS):
            x = load_rows(x_ptr + n * F.BLOCK_D, start, stride, keep, F.DIM - n * F.BLOCK_D,
                          F.CHUNK, F.BLOCK_D, True)  # fmt: skip
            y = load_landmarks(y_ptr, y_stride, n, x.dtype, F)
            dots = tl.dot(tl.trans(y), tl.trans(x), dots, input_precision=F.PRECISION)
    return dots


@triton.jit
def kept_tokens(keep_ptr, start, stop, F: tl.constexpr):
    """Which tokens of the chunk at `start` are there and not hidden, [CHUNK] bool."""
    offs = start + tl.arange(0, F.CHUNK)
    keep = offs < stop
    if F.KEEP:
        keep = keep & (tl.load(keep_ptr + offs, mask=keep, other=0) != 0)
    return keep


@triton.jit
def times_steps(x, F: tl.constexpr):
    """x_j times j = 1, 2, .., the chunk's own time; x is [CHUNK, PAD_M] or [1, PAD_M]."""
    return (tl.arange(0, F.CHUNK) + 1).to(tl.float32)[:, None] * x


@triton.jit
def key_scores(k_ptr, start, stride, keep, lq, marks, lq_ptr, decay2, F: tl.constexpr):
    """Scores in the chunk's own time; -inf where hidden."""
    s = landmark_products(k_ptr, start, stride, keep, lq, lq_ptr, marks.lq_strides[2], F)
    s = s * marks.scale2
    if F.DECAY:
        s += times_steps(decay2[None, :], F)
    return tl.where(keep[:, None], s, float("-inf"))


@triton.jit
def exponentials(s, keep, ref, tot, F: tl.constexpr):
    """(ref, P = 2^(s - ref), first token that rises more than RISE above it, CHUNK if none).

    Where nothing is held, the reference is the first kept key's score: never one that a later
    token can change. P is 0 where it would rise further; rows from there on are not computed by it.
    """
    offs = tl.arange(0, F.CHUNK)
    head = tl.min(tl.where(keep, offs, F.CHUNK), 0)
    opening = tl.sum(tl.where((offs == head)[:, None], s, 0.0), 0)
    ref = tl.where(tot == 0.0, tl.floor(opening + 0.5), ref)
    x = s - ref[None, :]
    calm = x <= RISE  # false for NaN
    settled = tl.min((calm | ~keep[:, None]).to(tl.int32), 1)
    first = tl.min(tl.where(settled == 0, offs, F.CHUNK), 0)
    return ref, tl.where(calm, tl.exp2(x), 0.0), first


@triton.jit
def running_sums(P, tot, F: tl.constexpr):
    """tot + sum over j <= i of P_j, [CHUNK, PAD_M].

    A product rounds P as the products of the numerator do: weights then still sum to 1.
    """
    if F.SCAN:
        sums = tl.cumsum(P, 0)
    else:
        sums = mm(lower(F).to(tl.float32), P, F)
    return sums + tot[None, :]


@triton.jit
def end_of_chunk(P, ref, tot, ratio, decay2, length, F: tl.constexpr):
    """(E, ref, tot, ratio) at the chunk's end: E = 2^(s - ref) there, ratio what the past is worth.

    acc at the end is acc * ratio + values^T E. The incoming `ratio` is 1, but after `rebased`.
    """
    total = tot * ratio + tl.sum(operand(P, F).to(tl.float32), 0)
    bits = tl.where(total > 0.0, tl.floor(tl.log2(total)), 0.0)
    ref += bits
    shrink = tl.exp2(-bits)
    if F.DECAY:
        fall = decay2 * length
        whole = tl.floor(fall + 0.5)
        ref -= whole
        shrink *= tl.exp2(whole - fall)
    return P * shrink[None, :], ref, total * shrink, ratio * shrink


@triton.jit
def landmark_features(dots, half2, marks, F: tl.constexpr):
    """How queries read the landmarks: softmax, or exp(q . k - s_ll / 2) up to a row's factor."""
    f = dots * marks.scale2
    if F.MASS:
        f -= half2[None, :]
    f = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[None, :], f, float("-inf"))
    e = tl.exp2(f - tl.max(f, 1)[:, None])
    if not F.MASS:
        e = e / tl.sum(e, 1)[:, None]
    return e


@triton.jit
def turned_features(dots, half2, marks, F: tl.constexpr):
    """`landmark_features` with a landmark a row, [PAD_M, CHUNK]."""
    f = dots * marks.scale2
    if F.MASS:
        f -= half2[:, None]
    f = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[:, None], f, float("-inf"))
    e = tl.exp2(f - tl.max(f, 0)[None, :])
    if not F.MASS:
        e = e / tl.sum(e, 0)[None, :]
    return e


@triton.jit
def weights(features, core, norm, half2, F: tl.constexpr):
    """(W, factor): weights on R, W = (features core) * factor. `norm` is log2 of Z for the rows."""
    W = mm_core(features, core, F)
    factor = zeros(F.CHUNK, F.PAD_M) + 1.0
    if F.MASS:
        held = tl.where((tl.arange(0, F.PAD_M) < F.MARKS)[None, :], norm - half2[None, :],
                        float("-inf"))  # fmt: skip
        top = tl.max(held, 1)
        unseen = top == float("-inf")
        held = tl.exp2(held - tl.where(unseen, 0.0, top)[:, None])
        mass = tl.where(unseen, 1.0, tl.sum(W * held, 1))
        factor = held / mass[:, None]
        W = W * factor
    return W, factor


@triton.jit
def lower(F: tl.constexpr):
    """[query, key] of a chunk: key not after query."""
    offs = tl.arange(0, F.CHUNK)
    return offs[:, None] >= offs[None, :]


@triton.jit
def incoming_state(L_ptr, R_ptr, line, v0, F: tl.constexpr):
    """(ref, tot, acc) from a user's L and R; nothing held without them or where L = -inf."""
    offs_m = tl.arange(0, F.PAD_M)
    offs_v = v0 + tl.arange(0, F.BLOCK_V)
    if F.STATE:
        L = tl.load(L_ptr + line * F.MARKS + offs_m, mask=offs_m < F.MARKS, other=float("-inf"))
        L = L * LOG2E
        empty = L == float("-inf")
        ref = tl.where(empty, 0.0, tl.floor(L + 0.5))
        tot = tl.where(empty, 0.0, tl.exp2(L - ref))
        ptrs = R_ptr + (line * F.MARKS + offs_m[None, :]) * F.DIM_V + offs_v[:, None]
        inside = (offs_v < F.DIM_V)[:, None] & (offs_m < F.MARKS)[None, :] & (~empty)[None, :]
        acc = tl.load(ptrs, mask=inside, other=0.0) * tot[None, :]
    else:
        ref = full(F.PAD_M, 0.0)
        tot = full(F.PAD_M, 0.0)
        acc = zeros(F.BLOCK_V, F.PAD_M)
    return ref, tot, acc


@triton.jit
def store_end_state(L_ptr, R_ptr, line, v0, ref, tot, acc, F: tl.constexpr):
    """What a user sees of (ref, tot, acc): L natural, -inf where nothing is held, and R."""
    offs_m = tl.arange(0, F.PAD_M)
    offs_v = v0 + tl.arange(0, F.BLOCK_V)
    known = offs_m < F.MARKS
    L = tl.where(tot == 0.0, float("-inf"), (ref + tl.log2(tot)) * LN2)
    tl.store(L_ptr + line * F.MARKS + offs_m, L, mask=known)
    R = acc / tl.where(tot == 0.0, 1.0, tot)[None, :]
    ptrs = R_ptr + (line * F.MARKS + offs_m[None, :]) * F.DIM_V + offs_v[:, None]
    tl.store(ptrs, R, mask=(offs_v < F.DIM_V)[:, None] & known[None, :])


@triton.jit
def state_ptrs(vectors, matrices, line, v0, F: tl.constexpr):
    """Where line `line` of a pair of buffers, (lines, PAD_M) and (lines, PAD_V, PAD_M), lies."""
    offs_m = tl.arange(0, F.PAD_M)
    offs_v = v0 + tl.arange(0, F.BLOCK_V)
    rows = line * F.PAD_V + offs_v
    return vectors + line * F.PAD_M + offs_m, matrices + rows[:, None] * F.PAD_M + offs_m[None, :]


@triton.jit
def load_state(saved, line, v0, F: tl.constexpr):
    ref_ptrs, acc_ptrs = state_ptrs(saved.ref, saved.acc, line, v0, F)
    tot_ptrs, _ = state_ptrs(saved.tot, saved.acc, line, v0, F)
    return tl.load(ref_ptrs), tl.load(tot_ptrs), tl.load(acc_ptrs)


@triton.jit
def store_state(saved, line, v0, ref, tot, acc, F: tl.constexpr):
    ref_ptrs, acc_ptrs = state_ptrs(saved.ref, saved.acc, line, v0, F)
    tot_ptrs, _ = state_ptrs(saved.tot, saved.acc, line, v0, F)
    tl.store(ref_ptrs, ref)
    tl.store(tot_ptrs, tot)
    tl.store(acc_ptrs, acc)
