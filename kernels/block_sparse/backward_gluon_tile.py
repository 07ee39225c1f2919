"""Tiles that a program of the Gluon kernels of the backward pass holds."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .gluon_loads import ROWS, barriers, buffers


class Held(NamedTuple):
    """Shared memory: what a program holds, K and V or Q and dO, ROWS by ROWS, and its barriers."""

    one: object
    other: object
    full: object


@gluon.jit
def hold(desc, other_desc, b, h, start, WARPGROUPS: gl.constexpr):
    """Load ROWS rows for each warpgroup, from row `start` on. All barriers are made before."""
    held = Held(buffers(desc, WARPGROUPS), buffers(other_desc, WARPGROUPS), barriers(WARPGROUPS, 1))
    fence_async_shared()
    for w in gl.static_range(WARPGROUPS):
        first, full = start + w * ROWS, held.full.index(w)
        mbarrier.expect(full, desc.block_type.nbytes + other_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [b, h, first, 0], full, held.one.index(w))
        tma.async_copy_global_to_shared(other_desc, [b, h, first, 0], full, held.other.index(w))
    return held


@gluon.jit
def operands_of(held, w: gl.constexpr, F: gl.constexpr):
    """Tiles that a warpgroup holds, [ROWS, PAD] and [ROWS, PAD_V] in shared memory, once there."""
    mbarrier.wait(held.full.index(w), 0)
    one = held.one.index(w).reshape([ROWS, F.PAD])
    return one, held.other.index(w).reshape([ROWS, F.PAD_V])
