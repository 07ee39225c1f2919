"""Far field of a decoding step: what landmarks keep is read, takes the token in and moves on.

Landmarks are taken in tiles of BLOCK_M, so that any number and any width fit a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..nystrom.primitives import LN2, LOG2E, full, mm, mm_acc, operand, zeros
from .step_primitives import add_tile, rounded_product

LEAST_HELD = tl.constexpr(1e-30)  # a slot that holds less counts as empty


@triton.jit
def marks_ptr(x_ptr, strides, b, h):
    return x_ptr + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]


@triton.jit
def load_marks(ptr, stride, m0, F: tl.constexpr):
    """Landmarks m0 .., [BLOCK_M, PAD_D] float32."""
    offs_m, offs_d = m0 + tl.arange(0, F.BLOCK_M), tl.arange(0, F.PAD_D)
    inside = (offs_m < F.MARKS)[:, None] & (offs_d < F.DIM)[None, :]
    ptrs = ptr + offs_m[:, None] * stride + offs_d[None, :]
    return tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def routing(inputs, k, m0, b, h, F: tl.constexpr):
    """Scores of the key under landmarks m0 .. in log2 units, [BLOCK_M], -inf for the padding."""
    x = load_marks(marks_ptr(inputs.lq, inputs.lq_strides, b, h), inputs.lq_strides[2], m0, F)
    s = tl.sum(rounded_product(x, k.to(tl.float32)[None, :]), 1) * inputs.scale2
    return tl.where(m0 + tl.arange(0, F.BLOCK_M) < F.MARKS, s, float("-inf"))


@triton.jit
def halves(inputs, m0, b, h, F: tl.constexpr):
    """scale |x_l|^2 / 2 in log2 units of landmarks m0 .., [BLOCK_M]."""
    x = load_marks(marks_ptr(inputs.lk, inputs.lk_strides, b, h), inputs.lk_strides[2], m0, F)
    return tl.sum(x * x, 1) * (0.5 * inputs.scale2)


@triton.jit
def read_features(inputs, b, h, F: tl.constexpr):
    """(features of the queries, [PAD_G, PAD_M], and their reference in log2 units, [PAD_G])."""
    e = zeros(F.PAD_G, F.PAD_M)
    highest = full(F.PAD_G, 0.0)
    if F.MERGE != "slots":
        offs_g, offs_m = tl.arange(0, F.PAD_G), tl.arange(0, F.PAD_M)
        q_ptr = inputs.query + tl.cast(b, tl.int64) * inputs.query_strides[0]
        q_ptrs = q_ptr + ((h * F.GROUP + offs_g).to(tl.int64) * inputs.query_strides[1])[:, None]
        x_ptr = marks_ptr(inputs.lk, inputs.lk_strides, b, h)
        half = full(F.PAD_M, 0.0)
        for d0 in range(0, F.DIM, F.BLOCK_D):
            offs_d = d0 + tl.arange(0, F.BLOCK_D)
            # [PAD_G, BLOCK_D] and [BLOCK_D, PAD_M]
            q = tl.load(q_ptrs + offs_d[None, :],
                        mask=(offs_g < F.GROUP)[:, None] & (offs_d < F.DIM)[None, :],
                        other=0.0)  # fmt: skip
            x = tl.load(x_ptr + offs_m[None, :] * inputs.lk_strides[2] + offs_d[:, None],
                        mask=(offs_m < F.MARKS)[None, :] & (offs_d < F.DIM)[:, None],
                        other=0.0)  # fmt: skip
            e = tl.dot(q, x.to(q.dtype), e, input_precision=F.PRECISION)
            x = x.to(tl.float32)
            half += tl.sum(x * x, 0)
        e = e * inputs.scale2
        if F.MERGE == "mass":
            e -= (half * (0.5 * inputs.scale2))[None, :]
        e = tl.where((offs_m < F.MARKS)[None, :], e, float("-inf"))
        highest = tl.max(e, 1)
        e = tl.exp2(e - highest[:, None])
        if F.MERGE == "gate":
            e = e / tl.sum(e, 1)[:, None]
    return e, highest


@triton.jit
def scan_landmarks(inputs, state, k, b, h, pair, F: tl.constexpr):
    """Maximum and sum that the landmarks need before they are taken in tiles, in log2 units.

    Of "slots", the highest score of the key and the sum of its weights relative to it; of "mass",
    the highest mass of a landmark.
    """
    top, norm = float("-inf"), 0.0
    if F.MERGE != "gate":
        for m0 in range(0, F.MARKS, F.BLOCK_M):
            offs_m = m0 + tl.arange(0, F.BLOCK_M)
            if F.MERGE == "slots":
                s = routing(inputs, k, m0, b, h, F)
            else:
                ptrs = state.far_counts + pair * 3 * F.MARKS + offs_m
                L = tl.load(ptrs, mask=offs_m < F.MARKS, other=float("-inf"))
                s = L * LOG2E - halves(inputs, m0, b, h, F)
            higher = tl.maximum(top, tl.max(s, 0))
            pivot = tl.where(higher == float("-inf"), 0.0, higher)
            norm = norm * tl.exp2(top - pivot) + tl.sum(tl.exp2(s - pivot), 0)
            top = higher
    return tl.where(top == float("-inf"), 0.0, top), norm


@triton.jit
def joined(L, R, own_L, own_R):
    """The Nyström state of two stretches, from natural L, [BLOCK_M], and R, [BLOCK_M, PAD_V]."""
    top = tl.maximum(L, own_L)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    past, new = tl.exp2((L - pivot) * LOG2E), tl.exp2((own_L - pivot) * LOG2E)
    total = past + new
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    L = tl.where(total == 0.0, float("-inf"), pivot + tl.log2(total) * LN2)
    return L, (past * share)[:, None] * R + (new * share)[:, None] * own_R


@triton.jit
def far_ptrs(base, pair, n, m0, DIM: tl.constexpr, PAD: tl.constexpr, F: tl.constexpr):
    """(pointers, mask) of landmarks m0 .. of total n, [BLOCK_M, PAD]."""
    offs_m, cols = m0 + tl.arange(0, F.BLOCK_M), tl.arange(0, PAD)
    rows = (pair * 3 + n) * F.MARKS + offs_m
    inside = (offs_m < F.MARKS)[:, None] & (cols < DIM)[None, :]
    return base + rows[:, None] * DIM + cols[None, :], inside


@triton.jit
def move_sums(base, own, pair, m0, ends, DIM: tl.constexpr, PAD: tl.constexpr, F: tl.constexpr):
    """Add to the current chunk's sums; at its end the chunk before joins those of the past."""
    current, inside = far_ptrs(base, pair, 2, m0, DIM, PAD, F)
    own += tl.load(current, mask=inside, other=0.0)
    if ends:
        past, _ = far_ptrs(base, pair, 0, m0, DIM, PAD, F)
        before, _ = far_ptrs(base, pair, 1, m0, DIM, PAD, F)
        held = tl.load(past, mask=inside, other=0.0) + tl.load(before, mask=inside, other=0.0)
        tl.debug_barrier()  # several threads read an element that one of them overwrites
        tl.store(past, held, mask=inside)
        tl.store(before, own, mask=inside)
        own = tl.zeros_like(own)
    tl.debug_barrier()
    tl.store(current, own, mask=inside)


@triton.jit
def step_slots(inputs, state, q, k, v, kept, scan, near, b, h, pair, ends, F: tl.constexpr):
    """`near` with the slots of all chunks before the last two."""
    offs = tl.arange(0, F.BLOCK_M)
    for m0 in range(0, F.MARKS, F.BLOCK_M):
        known = m0 + offs < F.MARKS
        n_ptrs = state.far_counts + pair * 3 * F.MARKS + m0 + offs
        # [BLOCK_M]
        n = tl.load(n_ptrs, mask=known, other=0.0)
        there = n >= LEAST_HELD
        share = 1.0 / tl.where(there, n, 1.0)
        K_ptrs, K_inside = far_ptrs(state.far_keys, pair, 0, m0, F.DIM, F.PAD_D, F)
        V_ptrs, V_inside = far_ptrs(state.far_values, pair, 0, m0, F.DIM_V, F.PAD_V, F)
        # [BLOCK_M, PAD_D] and [BLOCK_M, PAD_V]
        K = tl.load(K_ptrs, mask=K_inside & there[:, None], other=0.0) * share[:, None]
        V = tl.load(V_ptrs, mask=V_inside & there[:, None], other=0.0) * share[:, None]
        # [PAD_G, BLOCK_M]
        s = mm(q, tl.trans(operand(K, F)), F) * inputs.scale2 + tl.log2(1.0 / share)[None, :]
        near = add_tile(tl.where(there[None, :], s, float("-inf")), V, near, F)
        # [BLOCK_M]
        a = tl.exp2(routing(inputs, k, m0, b, h, F) - scan[0]) / scan[1]
        a = tl.where(kept, a, 0.0)
        current = tl.load(n_ptrs + 2 * F.MARKS, mask=known, other=0.0) + a
        if ends:
            before = tl.load(n_ptrs + F.MARKS, mask=known, other=0.0)
            tl.debug_barrier()  # several threads read an element that one of them overwrites
            tl.store(n_ptrs, n + before, mask=known)
            tl.store(n_ptrs + F.MARKS, current, mask=known)
            current = tl.zeros_like(current)
        tl.debug_barrier()
        tl.store(n_ptrs + 2 * F.MARKS, current, mask=known)
        move_sums(state.far_keys, a[:, None] * k.to(tl.float32)[None, :], pair, m0, ends, F.DIM,
                  F.PAD_D, F)  # fmt: skip
        move_sums(state.far_values, a[:, None] * v.to(tl.float32)[None, :], pair, m0, ends, F.DIM_V,
                  F.PAD_V, F)  # fmt: skip
    return near


@triton.jit
def load_far(state, pair, n, m0, F: tl.constexpr):
    """(pointers of L, L, pointers of R, R) of landmarks m0 .. of total n."""
    offs_m = m0 + tl.arange(0, F.BLOCK_M)
    L_ptrs = state.far_counts + (pair * 3 + n) * F.MARKS + offs_m
    # [BLOCK_M]
    L = tl.load(L_ptrs, mask=offs_m < F.MARKS, other=float("-inf"))
    R_ptrs, inside = far_ptrs(state.far_values, pair, n, m0, F.DIM_V, F.PAD_V, F)
    # [BLOCK_M, PAD_V]
    return L_ptrs, L, R_ptrs, tl.load(R_ptrs, mask=inside, other=0.0)


@triton.jit
def move_states(state, s, v, pair, m0, ends, F: tl.constexpr):
    """As `move_sums` for states: a token of scores s, [BLOCK_M], joins the current chunk's."""
    known = m0 + tl.arange(0, F.BLOCK_M) < F.MARKS
    inside = known[:, None] & (tl.arange(0, F.PAD_V) < F.DIM_V)[None, :]
    L_ptrs, own_L, R_ptrs, own_R = load_far(state, pair, 2, m0, F)
    own_L, own_R = joined(own_L, own_R, s, v.to(tl.float32)[None, :])
    if ends:
        before_L_ptrs, before_L, before_R_ptrs, before_R = load_far(state, pair, 1, m0, F)
        past_L_ptrs, L, past_R_ptrs, R = load_far(state, pair, 0, m0, F)
        L, R = joined(L, R, before_L, before_R)
        tl.debug_barrier()  # several threads read an element that one of them overwrites
        tl.store(past_L_ptrs, L, mask=known)
        tl.store(past_R_ptrs, R, mask=inside)
        tl.store(before_L_ptrs, own_L, mask=known)
        tl.store(before_R_ptrs, own_R, mask=inside)
        own_L, own_R = full(F.BLOCK_M, float("-inf")), tl.zeros_like(own_R)
    tl.debug_barrier()
    tl.store(L_ptrs, own_L, mask=known)
    tl.store(R_ptrs, own_R, mask=inside)


@triton.jit
def step_states(inputs, state, k, v, kept, features, scan, b, h, pair, ends, F: tl.constexpr):
    """(reference, mass, numerator) of the far field; with "gate" mass tells if there is one."""
    e, highest = features
    offs, offs_m = tl.arange(0, F.BLOCK_M), tl.arange(0, F.PAD_M)
    mass = full(F.PAD_G, 0.0)
    numerator = zeros(F.PAD_G, F.PAD_V)
    core_ptr = marks_ptr(inputs.core, inputs.core_strides, b, h)
    for m0 in range(0, F.MARKS, F.BLOCK_M):
        known = m0 + offs < F.MARKS
        ptrs = core_ptr + offs_m[:, None] * inputs.core_strides[2] + (m0 + offs)[None, :]
        # [PAD_M, BLOCK_M]
        core = tl.load(ptrs, mask=(offs_m < F.MARKS)[:, None] & known[None, :], other=0.0)
        # [PAD_G, BLOCK_M]
        W = tl.dot(e, core.to(tl.float32), input_precision=F.PRECISION)
        _, L, _, R = load_far(state, pair, 0, m0, F)
        if F.MERGE == "mass":
            held = L * LOG2E - halves(inputs, m0, b, h, F)
            W = W * tl.exp2(held - scan[0])[None, :]
            mass += tl.sum(W, 1)
        else:
            mass += tl.sum(tl.where(L > float("-inf"), 1.0, 0.0), 0)
        numerator = mm_acc(W, R, numerator, F)
        s = tl.where(kept, routing(inputs, k, m0, b, h, F) * LN2, float("-inf"))
        move_states(state, s, v, pair, m0, ends, F)
    return highest + scan[0], mass, numerator


@triton.jit
def step_far(inputs, state, q, k, v, kept, features, scan, near, b, h, pair, ends,
             F: tl.constexpr):  # fmt: skip
    """(near, far), both (reference, mass, numerator); the totals move on by the token."""
    far = (0.0, 0.0, 0.0)
    if F.MERGE == "slots":
        near = step_slots(inputs, state, q, k, v, kept, scan, near, b, h, pair, ends, F)
    else:
        far = step_states(inputs, state, k, v, kept, features, scan, b, h, pair, ends, F)
    return near, far
