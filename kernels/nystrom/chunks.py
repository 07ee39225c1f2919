"""Scores of a chunk of keys, and the normalisers and the state that follow from them."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import cut_operand, kept_tokens, load_rows, lower, mm, mm_acc, operand, upper
from .reading import landmark_dots

RISE = tl.constexpr(90.0)  # largest exponent above the reference; the products add up to 2^97
MOST = tl.constexpr(2.0**90)
LIMIT = tl.constexpr(0x70000000)  # bits of 2^97
MOST_SHIFT = tl.constexpr(45.0)  # of the reference, so that totals, near 2^-45 then, stay exact


@triton.jit
def times_steps(x, first, F: tl.constexpr):
    """x_lj times j = first + 1, .., the chunk's own time; x is [PAD_M, CHUNK] or [PAD_M, 1]."""
    return x * (tl.arange(0, F.CHUNK) + (first + 1)).to(tl.float32)[None, :]


@triton.jit
def all_scores(keys, t0, keep, lq, decay2, marks, F: tl.constexpr):
    """(scores in the chunk's own time, [PAD_M, CHUNK], those of hidden keys too; the keys)."""
    dots, k = landmark_dots(keys, t0, keep, lq, F)
    s = dots * marks.scale2
    if F.DECAY:
        s += times_steps(decay2[:, None], 0, F)
    return s, k


@triton.jit
def key_scores(keys, t0, keep, lq, decay2, marks, F: tl.constexpr):
    """`all_scores`, -inf where hidden."""
    s, k = all_scores(keys, t0, keep, lq, decay2, marks, F)
    return tl.where(keep[None, :], s, float("-inf")), k


@triton.jit
def token(s, j, F: tl.constexpr):
    """Column j of [PAD_M, CHUNK]."""
    return tl.sum(tl.where((tl.arange(0, F.CHUNK) == j)[None, :], s, 0.0), 1)


@triton.jit
def raised(s, ref, tot, F: tl.constexpr):
    """(ref, factor of totals): ref not below the score of a piece's first token.

    All rows of the piece see that token, so that none loses anything.
    """
    top = tl.where(tot == 0.0, ref, tl.maximum(ref, tl.ceil(token(s, 0, F))))
    return top, tl.exp2(ref - top)


@triton.jit
def middle(decay2, F: tl.constexpr):
    """Rise of scores by decay up to the middle of a chunk, a whole number, [PAD_M].

    The reference moves up by it. Scores in the chunk's own time rise by decay2 from token to token,
    over 64 tokens of a fresh module by more than RISE.
    """
    return tl.minimum(tl.floor(decay2 * (0.5 * F.CHUNK) + 0.5), MOST_SHIFT)


@triton.jit
def first_reference(s, keep, ref, tot, shift, due, F: tl.constexpr):
    """`ref`, or where nothing is held the first kept key's score plus `shift`, [PAD_M]. `due` is
    True if anything holds nothing: a column is dear to pick.
    """
    if due:
        head = 0
        if F.KEEP:
            head = tl.min(tl.where(keep, tl.arange(0, F.CHUNK), F.CHUNK), 0)
        ref = tl.where(tot == 0.0, tl.floor(token(s, head, F) + 0.5) + shift, ref)
    return ref


@triton.jit
def exponentials(s, keep, ref, tot, shift, due, F: tl.constexpr):
    """(ref, P = 2^(s - ref), first token that rises more than RISE above it, CHUNK if none).

    The reference is never one that a later token can change. P is 0 where it would rise further,
    but for the first token of a piece; rows from there on are not computed by it. After a NaN the
    rest is NaN, in pieces of any length.
    """
    offs = tl.arange(0, F.CHUNK)
    ref = first_reference(s, keep, ref, tot, shift, due, F)
    x = s - ref[:, None]
    calm = x <= RISE  # false for NaN
    if F.STEEP:
        calm = calm | (offs == 0)[None, :] | (tot != tot)[:, None]
    first = tl.min(tl.min(tl.where(calm | ~keep[None, :], F.CHUNK, offs[None, :]), 1), 0)
    return ref, tl.where(calm, tl.exp2(x), 0.0), first


@triton.jit
def running_sums(P, tot, first, H: tl.constexpr, F: tl.constexpr):
    """tot + sum over j <= i of P_j for the H.CHUNK tokens i of a chunk from number `first` on,
    [PAD_M, H.CHUNK].

    A product rounds P as the products of the numerator do: weights then still sum to 1.
    """
    if F.SCAN:
        sums = tl.cumsum(P, 1)
    else:
        sums = mm(P, upper(0, first, F.CHUNK, H.CHUNK).to(tl.float32), F)
    return sums + tot[:, None]


@triton.jit
def turned_sums(P, tot, F: tl.constexpr):
    """`running_sums` with a token a row, [CHUNK, PAD_M]."""
    if F.SCAN:
        sums = tl.trans(tl.cumsum(P, 1))
    else:
        sums = mm(lower(0, F).to(tl.float32), tl.trans(P), F)
    return sums + tot[None, :]


@triton.jit
def exponent(x):
    """floor(log2 x) of a number > 0; 128 of infinity and NaN."""
    return ((x.to(tl.int32, bitcast=True) >> 23 & 255) - 127).to(tl.float32)


@triton.jit
def turned_norms(ref, cum, decay2, F: tl.constexpr):
    """`norms` with a token a row, [CHUNK, PAD_M]."""
    norm = 0.0
    if F.MASS:
        norm = ref[None, :] + tl.log2(cum)
        if F.DECAY:
            norm -= decay2[None, :] * (tl.arange(0, F.CHUNK) + 1).to(tl.float32)[:, None]
    return norm


@triton.jit
def norms(ref, cum, decay2, first, F: tl.constexpr):
    """log2 of Z for the tokens of a chunk from number `first` on, [PAD_M, CHUNK]; of no use but to
    the mass.
    """
    norm = 0.0
    if F.MASS:
        norm = ref[:, None] + tl.log2(cum)
        if F.DECAY:
            norm -= times_steps(decay2[:, None], first, F)
    return norm


@triton.jit
def rescaled(ref, tot, decay2, length, F: tl.constexpr):
    """(ref, tot, ratio that it was multiplied by): tot near 1, `length` tokens later."""
    bits = tl.where(tot > 0.0, exponent(tot), 0.0)
    ref += bits
    ratio = tl.exp2(-bits)
    if F.DECAY:
        fall = decay2 * length
        whole = tl.floor(fall + 0.5)
        ref -= whole
        ratio *= tl.exp2(whole - fall)
    return ref, tot * ratio, ratio


@triton.jit
def end_of_chunk(P, v, ref, tot, acc, decay2, length, F: tl.constexpr):
    """(ref, tot, acc, ratio) at the chunk's end, where e^{s - L} = P ratio / tot.

    `P` comes as an operand, rounded, so that weights sum to 1.
    """
    acc = mm_acc(P, v, acc, F)
    ref, tot, ratio = rescaled(ref, tot + tl.sum(P.to(tl.float32), 1), decay2, length, F)
    return ref, tot, acc * ratio[:, None], ratio


@triton.jit
def at_middle(ref, tot, decay2, F: tl.constexpr):
    """(ref, tot, shift, share): the reference moved by `shift` to the middle of the chunk, and what
    is referenced to it multiplied by `share`.
    """
    shift, share = 0.0, 1.0
    if F.DECAY:
        shift = middle(decay2, F)
        share = tl.exp2(-shift)
        ref, tot = ref + shift, tot * share
    return ref, tot, shift, share


@triton.jit
def bounded(P, F: tl.constexpr):
    """P as an operand, at most 2^97, which a NaN gives as well."""
    bits = tl.minimum(P.to(tl.uint32, bitcast=True), LIMIT)  # a NaN's are the greatest
    return cut_operand(bits.to(tl.float32, bitcast=True), F)


@triton.jit
def may_have_risen(highest):
    """False where no score rose too far, from the highest exponents of totals, [PAD_M]."""
    return tl.max(highest, 0) >= RISE - 1.0


@triton.jit
def open_calm_chunk(keys, t0, keep, ref, tot, lq, decay2, marks, due, HIDES: tl.constexpr,
                    F: tl.constexpr):  # fmt: skip
    """(keys, P, ref, tot, factor that totals moved by), scores not being looked at one by one.

    P = e^{s-ref}, [PAD_M, CHUNK], is at most 2^97, which a NaN gives as well: so rows before a
    steep rise are right, and totals tell of it. Hidden tokens have 0 if HIDES. `due` is that of
    `first_reference`.
    """
    s, k = all_scores(keys, t0, keep, lq, decay2, marks, F)
    if HIDES:
        s = tl.where(keep[None, :], s, float("-inf"))
    ref, tot, shift, share = at_middle(ref, tot, decay2, F)
    ref = first_reference(s, keep, ref, tot, shift, due, F)
    return k, bounded(tl.exp2(s - ref[:, None]), F), ref, tot, share


@triton.jit
def open_chunk(keys, t0, keep, ref, tot, lq, decay2, marks, due, F: tl.constexpr):
    """(keys, P, first token that rises too far, CHUNK if none, ref, tot, factor that totals moved
    by); `due` is that of `first_reference`.

    P = e^{s-ref}, [PAD_M, CHUNK].
    """
    if F.STEEP:
        s, k = key_scores(keys, t0, keep, lq, decay2, marks, F)
        ref, share = raised(s, ref, tot, F)
        tot *= share
        ref, P, first = exponentials(s, keep, ref, tot, 0.0, due, F)
    else:
        k, P, ref, tot, share = open_calm_chunk(keys, t0, keep, ref, tot, lq, decay2, marks, due,
                                                True, F)  # fmt: skip
        first = F.CHUNK
        if may_have_risen(exponent(tot + tl.sum(P, 1))):
            offs = tl.arange(0, F.CHUNK)[None, :]
            first = tl.min(tl.min(tl.where(P > MOST, offs, F.CHUNK), 1), 0)
    return k, P, first, ref, tot, share


@triton.jit
def enter_chunk(keys, values, keep_ptr, t0, stop, state, lq, decay2, v0, marks, F: tl.constexpr):
    """(keep, v, P, first token that rises too far, state, factor that totals moved by).

    P = e^{s-ref}, [PAD_M, CHUNK], as an operand.
    """
    ref, tot, acc = state
    keep = kept_tokens(keep_ptr, t0, stop, F)
    v = load_rows(values[0] + v0, t0, values[1], keep, F.DIM_V - v0, F.CHUNK, F.BLOCK_V,
                  F.DIM_V % F.BLOCK_V != 0)  # fmt: skip
    k, P, first, ref, tot, share = open_chunk(keys, t0, keep, ref, tot, lq, decay2, marks, True, F)
    if F.STEEP or F.DECAY:
        acc *= share[:, None]
    return keep, v, operand(P, F), first, ref, tot, acc, share


@triton.jit
def enter_calm_chunk(keys, values, keep_ptr, t0, stop, state, lq, decay2, v0, marks,
                     F: tl.constexpr):  # fmt: skip
    """(v, P as an operand, state) of a chunk whose scores are not looked at one by one.

    Tokens behind the end change nothing but the last state, of use in one pass.
    """
    ref, tot, acc = state
    keep = kept_tokens(keep_ptr, t0, stop, F)
    k, P, ref, tot, share = open_calm_chunk(keys, t0, keep, ref, tot, lq, decay2, marks, True,
                                            F.KEEP or F.ONE_PASS, F)  # fmt: skip
    v = load_rows(values[0] + v0, t0, values[1], keep, F.DIM_V - v0, F.CHUNK, F.BLOCK_V,
                  F.DIM_V % F.BLOCK_V != 0)  # fmt: skip
    if F.DECAY:
        acc *= share[:, None]
    return v, P, ref, tot, acc


@triton.jit
def first_rise(keys, keep_ptr, start, stop, ref, tot, lq, decay2, marks, F: tl.constexpr):
    """The first token of a stretch that rises too far above its chunk's reference, or `stop`."""
    rise = stop
    for t0 in tl.range(start, stop, F.CHUNK, num_stages=1):
        keep = kept_tokens(keep_ptr, t0, stop, F)
        s, k = key_scores(keys, t0, keep, lq, decay2, marks, F)
        ref, tot, shift, share = at_middle(ref, tot, decay2, F)
        ref, P, first = exponentials(s, keep, ref, tot, shift, True, F)
        P = cut_operand(P, F)
        if first < F.CHUNK:
            rise = tl.minimum(rise, t0 + first)
        ref, tot, ratio = rescaled(ref, tot + tl.sum(P, 1), decay2, F.CHUNK, F)
    return rise
