"""What the two Gluon kernels of the backward pass compute of a tile alike."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .primitives import LOG2E, log2_factor, logits


@gluon.jit
def probabilities(s, lse2, residual2, base, r2, n2, work, F: gl.constexpr):
    """(P of a tile, also where nothing is seen, d capped / d scaled score), from its scores."""
    s, slope = logits(s, base, r2, n2, work.offset, work.sizes, work.modifiers, F)
    if F.NATURAL:  # the difference is exact where both are large
        p = gl.exp2((s - lse2) * LOG2E - residual2)
    else:
        p = gl.exp2(s * log2_factor(work.modifiers, F) - lse2)
    return p, slope
