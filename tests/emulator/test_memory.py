"""Loads, stores and atomic operations: what they move, and what they may not."""

from __future__ import annotations

import numpy as np
import pytest

from .harness import floats, integers, one, run
from .machine import Options, bank_conflicts
from .races import EmulationError

X = integers("u4", 64)
T = np.arange(64, dtype="u4")
AT = "mov.u32 %s9, space; mad.lo.u32 %s0, %t, 16, %s9;"


def test_vectors_and_small_elements_of_shared_memory():
    body = f"""{AT} st.shared.v2.b32 [%s0], {{%x0, %x1}}; st.shared.b8 [%s0+9], %x2;
               st.shared.b16 [%s0+10], %x2; bar.sync 0;
               ld.shared.v2.b32 {{%y1, %y0}}, [%s0]; ld.shared.s8 %y2, [%s0+9];
               ld.shared.u16 %y3, [%s0+10];"""
    small = (X & 0xFFFF).astype("u2")
    first, second, signed, whole = run(
        body, X, X + 1, small, outputs=["u4", "u4", "i2", "u2"], shared=1024
    )
    np.testing.assert_array_equal(first, X + 1)
    np.testing.assert_array_equal(second, X)
    np.testing.assert_array_equal(signed, small.astype("i1").astype("i2"))
    np.testing.assert_array_equal(whole, small)


def test_a_value_of_another_thread_through_shared_memory():
    body = """mov.u32 %s9, space; mad.lo.u32 %s0, %t, 4, %s9; st.shared.b32 [%s0], %x0; bar.sync 0;
              sub.u32 %s1, 63, %t; mad.lo.u32 %s1, %s1, 4, %s9; ld.shared.b32 %y0, [%s1];"""
    np.testing.assert_array_equal(one(body, X, output="u4", shared=256), X[::-1])


def test_an_address_is_a_sum_in_the_width_of_its_register():
    """The register alone may lie below shared memory."""
    body = f"""{AT} sub.u32 %s1, %s0, 64; st.shared.b32 [%s1+64], %x0; bar.sync 0;
               ld.shared.b32 %y0, [%s0];"""
    np.testing.assert_array_equal(one(body, X, output="u4", shared=1024), X)


def test_generic_addresses_reach_shared_memory():
    body = f"""{AT} cvt.u64.u32 %d0, %s0; cvta.shared.u64 %d1, %d0; st.b32 [%d1], %x0; bar.sync 0;
               ld.b32 %y0, [%d1];"""
    np.testing.assert_array_equal(one(body, X, output="u4", shared=1024), X)


def test_atomic_additions_all_count():
    body = """mov.u32 %s9, space; setp.eq.u32 %p0, %t, 0; @%p0 st.shared.b32 [%s9], 0; bar.sync 0;
              atom.shared.add.u32 %y0, [%s9], %x0; bar.sync 0; ld.shared.b32 %y1, [%s9];"""
    before, total = run(body, T, outputs=["u4", "u4"], shared=128)
    assert (total == T.sum()).all()
    assert len(set(before[1:].tolist())) >= 32  # every thread saw another sum


def test_compare_and_swap_has_one_winner():
    body = "ld.param.b64 %d0, [g_0]; atom.global.cas.b32 %y0, [%d0], 777, %x0;"
    cell = np.full(1, 777, "u4")
    old = one(body, X, output="u4", arrays=(cell,))
    assert cell[0] in X
    assert (old == 777).sum() == 1


FAULTS = {
    "out of bounds: 4 bytes of global memory": """ld.param.b64 %d0, [k_0];
        ld.global.b32 %y0, [%d0+256];""",
    "out of bounds: 4 bytes of shared memory": "mov.u32 %s0, 1024; ld.shared.b32 %y0, [%s0];",
    "misaligned access of 4 bytes": "ld.param.b64 %d0, [k_0]; ld.global.b32 %y0, [%d0+2];",
    "misaligned access: 8 bytes of shared": f"{AT} ld.shared.v2.b32 {{%y0, %s2}}, [%s0+4];",
    "uninitialised shared memory": f"{AT} ld.shared.b32 %y0, [%s0];",
    "two lanes store different values": """mov.u32 %s9, space; mov.u32 %y0, 0;
        st.shared.b32 [%s9], %t;""",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_fault(kind):
    """Reported with the kernel, CTA, warp, lane, address and instruction."""
    with pytest.raises(
        EmulationError, match=rf"{kind}.*k: CTA 0, warp 0, lane \d+, address 0x.*line \d+"
    ):
        one(FAULTS[kind], X, output="u4", shared=1024)


@pytest.mark.parametrize("used", ["0xff", "0xffff"])
def test_only_the_bytes_that_a_load_uses_must_be_written(used):
    """LLVM loads four words where the last ones are not needed."""
    body = f"""mov.u32 %s9, space; setp.eq.u32 %p0, %t, 0;
               @%p0 st.shared.v2.b32 [%s9], {{%x0, %t}}; bar.sync 0;
               .pragma "used_bytes_mask {used}";
               ld.shared.v4.b32 {{%y0, %s1, %s2, %s3}}, [%s9];"""
    if used == "0xff":
        assert (one(body, X, output="u4", shared=1024) == X[0]).all()
    else:
        with pytest.raises(EmulationError, match="uninitialised shared memory"):
            one(body, X, output="u4", shared=1024)


@pytest.mark.parametrize("fused", [False, True])
def test_lanes_that_store_one_entry_hold_the_same_bits_of_it(fused):
    """Not where the sum of two lanes' products is fused with each lane's own product."""
    sums = "fma.rn.f32 %w2, %x0, %x1, %w1" if fused else "add.rn.f32 %w2, %w0, %w1"
    body = f"""mov.u32 %s9, space; shr.u32 %s0, %t, 1; mad.lo.u32 %s0, %s0, 4, %s9;
               mul.rn.f32 %w0, %x0, %x1; shfl.sync.bfly.b32 %w1, %w0, 1, 31, -1;
               {sums}; st.shared.b32 [%s0], %w2; mov.b32 %y0, %w2;"""
    x, y = floats(64, 1, wide=False), floats(64, 2, wide=False)
    options = Options(same_bits=True)
    if fused:
        one(body, x, y, output="f4", shared=256)  # a rounding
        with pytest.raises(EmulationError, match="two lanes store different values"):
            one(body, x, y, output="f4", shared=256, options=options)
    else:
        got = one(body, x, y, output="f4", shared=256, options=options)
        np.testing.assert_array_equal(got, (x * y).reshape(-1, 2).sum(1).repeat(2))


def test_lanes_off_a_guard_may_hold_any_address():
    body = """setp.lt.u32 %p0, %t, 40; mov.b32 %y0, 5; ld.param.b64 %d0, [k_0];
              mul.wide.u32 %d1, %t, 4;
              add.s64 %d0, %d0, %d1; selp.b64 %d0, %d0, 12345, %p0;
              @%p0 ld.global.b32 %y0, [%d0];"""
    np.testing.assert_array_equal(one(body, X, output="u4"), np.where(T < 40, X, 5))


RACES = {
    "read after write": "st.shared.b32 [%s0], %x0; ld.shared.b32 %y0, [%s1];",
    "write after read": "st.shared.b32 [%s0], %x0; bar.sync 0; ld.shared.b32 %y0, [%s1]; "
    "st.shared.b32 [%s0], %t;",
    "write after write": "st.shared.b32 [%s0], %x0; st.shared.b32 [%s1], %t; mov.b32 %y0, %t;",
}
PLACES = """mov.u32 %s9, space; mad.lo.u32 %s0, %t, 4, %s9; add.u32 %s1, %t, 32;
              rem.u32 %s1, %s1, 64;
            mad.lo.u32 %s1, %s1, 4, %s9; st.shared.b32 [%s0], 0; bar.sync 0; """


@pytest.mark.parametrize("order", ["together", "ahead", "around"])
@pytest.mark.parametrize("kind", RACES)
def test_race_between_warps(kind, order):
    """Found whichever warp comes first, with both instructions."""
    options = Options(order=order, seed=3)
    with pytest.raises(
        EmulationError,
        match=r"race: (read|write) after (write|read).*with the .* by warp \d.*shared",
    ):
        one(PLACES + RACES[kind], X, output="u4", shared=256, options=options)
    ordered = (
        RACES[kind]
        .replace("; ld", "; bar.sync 0; ld")
        .replace("; st.shared.b32 [%s1]", "; bar.sync 0; st.shared.b32 [%s1]")
    )
    ordered = ordered.replace("[%s1]; st", "[%s1]; bar.sync 0; st")
    one(PLACES + ordered, X, output="u4", shared=256, options=options)


def test_lanes_of_a_warp_need_a_barrier_too():
    body = """mov.u32 %s9, space; mad.lo.u32 %s0, %t, 4, %s9; xor.b32 %s1, %t, 1;
              mad.lo.u32 %s1, %s1, 4, %s9;
              st.shared.b32 [%s0], %x0; SYNC ld.shared.b32 %y0, [%s1];"""
    with pytest.raises(EmulationError, match="read after write"):
        one(body.replace("SYNC", ""), X, output="u4", shared=256)
    got = one(body.replace("SYNC", "bar.warp.sync -1;"), X, output="u4", shared=256)
    np.testing.assert_array_equal(got, X[T ^ 1])


def test_race_in_global_memory_between_warps():
    one_lane = "setp.eq.u32 %p0, %t, {}; ld.param.b64 %d0, [g_0]; @%p0 st.global.b32 [%d0], %t;"
    body = one_lane.format(0) + "SYNC " + one_lane.format(33) + "mov.b32 %y0, %t;"
    cell = np.zeros(1, "u4")
    with pytest.raises(EmulationError, match="race in global memory: write after write"):
        one(body.replace("SYNC", ""), X, output="u4", arrays=(cell,))
    one(body.replace("SYNC", "bar.sync 0;"), X, output="u4", arrays=(cell,))
    assert cell[0] == 33


def test_deadlock_is_reported():
    body = """setp.lt.u32 %p0, %t, 32; mov.b32 %y0, %t; @%p0 bra SKIP; bar.sync 1, 64;
              SKIP: bar.sync 0, 64;"""
    with pytest.raises(EmulationError, match="deadlock.*bar.sync"):
        one(body, X, output="u4")


def test_named_barriers_join_some_warps():
    body = """mov.u32 %s9, space; mad.lo.u32 %s0, %t, 4, %s9; mov.b32 %y0, 0;
              setp.ge.u32 %p0, %t, 64;
              @%p0 bra REST; st.shared.b32 [%s0], %x0; bar.sync 1, 64; xor.b32 %s1, %t, 32;
              mad.lo.u32 %s1, %s1, 4, %s9; ld.shared.b32 %y0, [%s1]; REST: bar.sync 0;"""
    x = integers("u4", 128)
    t = np.arange(128)
    for order in ("together", "ahead", "around"):
        got = one(body, x, output="u4", shared=512, options=Options(order=order))
        np.testing.assert_array_equal(got, np.where(t < 64, x[t ^ 32], 0))


def test_bank_conflicts():
    """Extra passes of a warp: none for consecutive words or one word for all, 31 for a column."""
    lane = np.arange(32)[None, :]
    assert bank_conflicts(lane * 4, 4, None) == 0
    assert bank_conflicts(lane * 0, 4, None) == 0
    assert bank_conflicts(lane * 128, 4, None) == 31
    assert bank_conflicts(lane * 8, 4, None) == 1
    assert bank_conflicts(lane * 16, 16, None) == 0
    assert bank_conflicts(lane * 128, 16, None) == 4 * 7
    assert bank_conflicts(lane * 128, 4, lane < 2) == 1
