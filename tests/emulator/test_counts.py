"""Instructions are counted by kind and warp, and by what a loop adds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from .counts import executed, per_step
from .harness import HEADER
from .machine import launch
from .parser import parse
from .program import Program

LOOP = (
    HEADER
    + """
.extern .shared .align 16 .b8 space[];
.visible .entry k(.param .u32 turns)
.reqntid 64
{
.reg .b32 %n; .reg .b32 %a; .reg .f32 %x; .reg .pred %p;
ld.param.b32 %n, [turns];
mov.u32 %a, space;
mov.f32 %x, 0f3F800000;
AGAIN:
fma.rn.f32 %x, %x, %x, %x;
st.shared.b32 [%a], 7;
cp.async.commit_group;
sub.u32 %n, %n, 1;
setp.ne.u32 %p, %n, 0;
@%p bra AGAIN;
ret;
}
"""
)


def counts(turns: int) -> Counter:
    program = Program(parse(LOOP)["k"])
    done = launch(program, (1, 1, 1), 64, np.uint32(turns).tobytes(), [], 16)
    return executed(program, done.counts)


def test_kinds_and_warps():
    assert counts(3) == {
        "ld.param": 2, "mov": 2, "mov.f32": 2, "fma.f32": 6, "st.shared": 6, "cp.async": 6,
        "sub": 6, "setp": 6, "bra": 6, "ret": 2,
    }  # fmt: skip


@pytest.mark.parametrize("more", [1, 4])
def test_one_turn_of_a_loop(more):
    each = per_step(counts(2), counts(2 + more), 2 * more)  # of two warps
    assert each == dict.fromkeys(("fma.f32", "st.shared", "cp.async", "sub", "setp", "bra"), 1.0)
