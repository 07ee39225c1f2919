"""States at the start of each slot, and reverse states at its end, from what is stored of them.

A stretch is cut into slots of SLOT tokens. The state before a slot is that at the stretch's start
and what the stretch holds by itself so far, joined; the reverse state after it is what the rest of
the stretch adds by itself, and that at the stretch's end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import state_ptrs, vector_ptrs
from .states import decayed, joined


@triton.jit
def start_of_slot(stored, line, slot, elapsed, decay2, F: tl.constexpr):
    """(ref, tot, factors of what `saved` and `slots` hold) before a slot, `elapsed` tokens after
    the start of its stretch.
    """
    ref, tot = load_totals(stored.saved.ref, stored.saved.tot, line, F)
    own_ref, own_tot = load_totals(stored.slots.ref, stored.slots.tot, slot, F)
    ref, tot, fade = decayed(ref, tot, decay2, elapsed, F)
    ref, tot, past, new = joined(ref, tot, own_ref, own_tot)
    return ref, tot, past * fade, new


@triton.jit
def end_of_stretch(stored, line, tokens, decay2, F: tl.constexpr):
    """(ref, tot) after the last token of a stretch."""
    ref, tot = load_totals(stored.saved.ref, stored.saved.tot, line, F)
    own_ref, own_tot = load_totals(stored.ref, stored.tot, line, F)
    ref, tot, fade = decayed(ref, tot, decay2, tokens, F)
    ref, tot, past, new = joined(ref, tot, own_ref, own_tot)
    return ref, tot


@triton.jit
def load_totals(ref_ptr, tot_ptr, line, F: tl.constexpr):
    return tl.load(vector_ptrs(ref_ptr, line, F)), tl.load(vector_ptrs(tot_ptr, line, F))


@triton.jit
def load_held(place, past, new, F: tl.constexpr):
    """BLOCK_V columns of `acc` before a slot, [PAD_M, BLOCK_V]; factors from `start_of_slot`."""
    stored, reverse, rises, line, slot, v0, piece = place
    acc = tl.load(state_ptrs(stored.saved.acc, line, v0, F)) * past[:, None]
    own = tl.load(state_ptrs(stored.slots.acc, slot, v0, F)).to(tl.float32)
    return acc + own * new[:, None]


@triton.jit
def share_left(ref, tot, end_ref, end_tot, tokens, decay2, F: tl.constexpr):
    """e^{L - L_end}: the part of the total `tokens` later that is this one's; 0 of nothing."""
    ref, tot, fade = decayed(ref, tot, decay2, tokens, F)
    part = tl.exp2(ref - end_ref) * tot / end_tot
    return tl.where(tot == 0.0, 0.0, part)


@triton.jit
def end_of_slot(place, F: tl.constexpr):
    """(G, pull) after a slot: BLOCK_V columns, [PAD_M, BLOCK_V], of which `piece` is the number."""
    stored, reverse, rises, line, slot, v0, piece = place
    ratio = tl.load(vector_ptrs(reverse.slots.ratio, slot, F))
    pull = tl.load(vector_ptrs(reverse.slots.pull, slot * F.SLICES + piece, F))
    pull += tl.load(vector_ptrs(reverse.pull, line * F.SLICES + piece, F)) * ratio
    G = tl.load(state_ptrs(reverse.slots.G, slot, v0, F)).to(tl.float32)
    G += tl.load(state_ptrs(reverse.G, line, v0, F)) * ratio[:, None]
    return G, pull
