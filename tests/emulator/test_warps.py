"""Exchanges between lanes of a warp: shuffles, votes, reductions, matrix fragments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .harness import integers, one, run
from .machine import Options
from .races import EmulationError

LANES = np.arange(64, dtype="u4")


def by_warp(x):
    return np.asarray(x).reshape(-1, 32)


@pytest.mark.parametrize("distance", [0, 1, 5, 16, 31])
def test_shuffles(distance):
    x = integers("u4", 64)
    lane = np.arange(32)
    warps = by_warp(x)
    up = np.where(lane >= distance, lane - distance, lane)
    down = np.where(lane + distance < 32, lane + distance, lane)
    for mode, clamp, source in (("up", 0, up), ("down", 31, down), ("bfly", 31, lane ^ distance),
                                ("idx", 31, np.full(32, distance))):  # fmt: skip
        got = one(f"shfl.sync.{mode}.b32 %y0, %x0, {distance}, {clamp}, -1;", x, output="u4")
        np.testing.assert_array_equal(by_warp(got), warps[:, source], mode)


def test_a_shuffle_clamped_to_segments_of_eight():
    x = integers("u4", 64)
    segment = (32 - 8) << 8
    body = f"""shfl.sync.down.b32 %y0|%p0, %x0, 3, {segment | 31}, -1; selp.u32 %y1, 1, 0, %p0;"""
    got, valid = run(body, x, outputs=["u4", "u4"])
    lane = np.arange(32)
    inside = lane % 8 + 3 < 8
    np.testing.assert_array_equal(by_warp(valid), [inside, inside])
    np.testing.assert_array_equal(by_warp(got), by_warp(x)[:, np.where(inside, lane + 3, lane)])


def test_a_shuffle_by_what_each_lane_asks_for():
    x, wanted = integers("u4", 64), (LANES * 7 + 3) % 32
    got = one("shfl.sync.idx.b32 %y0, %x0, %x1, 31, -1;", x, wanted, output="u4")
    np.testing.assert_array_equal(
        by_warp(got), np.take_along_axis(by_warp(x), by_warp(wanted).astype(int), 1)
    )


def test_votes_and_the_leader():
    x = integers("i4", 64)
    body = """setp.lt.s32 %p0, %x0, 0; vote.sync.ballot.b32 %y0, %p0, -1;
              vote.sync.any.pred %p1, %p0, -1; selp.u32 %y1, 1, 0, %p1;
              elect.sync %s0|%p2, -1; selp.u32 %y2, 1, 0, %p2;"""
    ballot, some, leader = run(body, x, outputs=["u4"] * 3)
    bits = [sum(1 << n for n in range(32) if row[n] < 0) for row in by_warp(x)]
    np.testing.assert_array_equal(by_warp(ballot), np.repeat(bits, 32).reshape(-1, 32))
    assert some.all()
    np.testing.assert_array_equal(by_warp(leader), [[1] + [0] * 31] * 2)


def test_reductions_over_members():
    x, members = integers("i4", 64), np.where(LANES % 32 < 8, 0xFF, 0xFFFFFF00).astype("u4")
    got = by_warp(one("redux.sync.min.s32 %y0, %x0, %x1;", x, members, output="i4"))
    rows = by_warp(x)
    np.testing.assert_array_equal(got[:, :8], np.repeat(rows[:, :8].min(1, keepdims=True), 8, 1))
    np.testing.assert_array_equal(got[:, 8:], np.repeat(rows[:, 8:].min(1, keepdims=True), 24, 1))


def test_lanes_that_part_meet_again():
    """Each side of a branch runs with its own lanes; both are there for the shuffle behind it."""
    x = integers("u4", 64)
    body = """and.b32 %s0, %x0, 1; setp.eq.u32 %p0, %s0, 0; @%p0 bra EVEN;
              add.u32 %s1, %x0, 5; bra MEET;
              EVEN: add.u32 %s1, %x0, 7;
              MEET: shfl.sync.bfly.b32 %y0, %s1, 1, 31, -1;"""
    got = one(body, x, output="u4")
    moved = by_warp(np.where(x % 2 == 0, x + 7, x + 5))
    np.testing.assert_array_equal(by_warp(got), moved[:, np.arange(32) ^ 1])


def test_a_loop_of_another_length_in_every_lane():
    body = """mov.u32 %s0, 0; mov.u32 %y0, 0;
              LOOP: setp.ge.u32 %p0, %s0, %x0; @%p0 bra DONE;
              add.u32 %y0, %y0, %s0; add.u32 %s0, %s0, 1; bra LOOP;
              DONE:"""
    x = (LANES * 5) % 23
    np.testing.assert_array_equal(one(body, x, output="u4"), x * (x - 1).astype("i4") // 2)


def test_a_shuffle_whose_lanes_are_elsewhere_is_reported():
    body = """setp.lt.u32 %p0, %t, 16; mov.u32 %y0, 0; @%p0 bra SKIP;
              shfl.sync.bfly.b32 %y0, %x0, 16, 31, -1; SKIP:"""
    with pytest.raises(EmulationError, match="diverged.*warp 0, lane 0.*shfl.sync.bfly"):
        one(body, LANES, output="u4")


# fragments

STORE = "mul.lo.u32 %s0, %t, 16; mov.u32 %s1, space; add.u32 %s0, %s0, %s1;"


def halves(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int32).numpy().view("u4").reshape(-1)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
def test_ldmatrix(transposed):
    """Lane l of four 8 x 8 matrices gets row l // 4, columns 2 * (l % 4) and the next, of each."""
    data = np.arange(4 * 64, dtype="u2").reshape(4, 8, 8)
    rows = data.reshape(32, 8).view("u4")
    trans = ".trans" if transposed else ""
    body = f"""{STORE} st.shared.v4.b32 [%s0], {{%x0, %x1, %x2, %x3}}; bar.sync 0;
               ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%y0, %y1, %y2, %y3}}, [%s0];"""
    got = run(
        body, *(np.ascontiguousarray(rows[:, n]) for n in range(4)), outputs=["u4"] * 4, shared=512
    )
    for matrix, register in zip(data, got, strict=True):
        shown = matrix.T if transposed else matrix
        np.testing.assert_array_equal(register.view("u2").reshape(8, 8), shown)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_undoes_ldmatrix(count):
    x = [integers("u4", 32, seed=n) for n in range(count)]
    names = [", ".join(f"%{r}{n}" for n in range(count)) for r in "xy"]
    body = f"""{STORE} stmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 [%s0], {{{names[0]}}};
               bar.sync 0;
               ldmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 {{{names[1]}}}, [%s0];"""
    got = run(body, *x, outputs=["u4"] * count, shared=512)
    for mine, theirs in zip(x, got, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def mma_fragments(a: torch.Tensor, b: torch.Tensor, each: int):
    """Registers of A [16, k] and B [k, 8] by the ISA's tables; `each` elements to a register."""
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    k = a.shape[1]

    def registers(matrix, rows, columns):
        parts = [matrix[rows, columns + n] for n in range(each)]
        return words(torch.stack(parts, -1))

    first = [
        registers(a, g + 8 * (r % 2), t * each + 4 * each * (r // 2))
        for r in range(k // (4 * each) * 2)
    ]
    second = [registers(b.T, g, t * each + 4 * each * r) for r in range(k // (4 * each))]
    return first, second


@pytest.mark.parametrize(
    "kind, shape",
    [
        ("bf16", "m16n8k16"),
        ("f16", "m16n8k16"),
        ("bf16", "m16n8k8"),
        ("tf32", "m16n8k8"),
        ("tf32", "m16n8k4"),
    ],
)
def test_mma(kind, shape):
    k = int(shape.split("k")[1])
    a, b, c = halves(16, k, seed=1), halves(k, 8, seed=2), halves(16, 8, seed=3)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    each = 1 if kind == "tf32" else 2
    a, b = a.to(dtype), b.to(dtype)
    if kind == "tf32":  # the product takes 19 bits
        a, b = (torch.from_numpy((x.numpy().view("u4") & 0xFFFFE000).view("f4")) for x in (a, b))
    first, second = mma_fragments(a, b, each)
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    acc = [c[g + 8 * (r // 2), 2 * t + r % 2].numpy().view("u4") for r in range(4)]
    names = [f"%x{n}" for n in range(len(first) + len(second) + 4)]
    split = len(first), len(first) + len(second)
    groups = [
        ", ".join(names[: split[0]]),
        ", ".join(names[split[0] : split[1]]),
        ", ".join(names[split[1] :]),
    ]
    body = f"""mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32
               {{%y0, %y1, %y2, %y3}}, {{{groups[0]}}}, {{{groups[1]}}}, {{{groups[2]}}};"""
    got = run(body, *first, *second, *acc, outputs=["f4"] * 4)
    wanted = a.double() @ b.double() + c
    for r, register in enumerate(got):
        np.testing.assert_allclose(
            register, wanted[g + 8 * (r // 2), 2 * t + r % 2], rtol=1e-5, atol=1e-5
        )


def test_a_matrix_instruction_needs_its_whole_warp():
    body = """mov.u32 %y0, 0; mov.u32 %s1, space; setp.lt.u32 %p0, %t, 9; @%p0 bra SKIP;
              ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%y0}, [%s1]; SKIP:"""
    with pytest.raises(EmulationError, match="diverged.*ldmatrix"):
        one(body, LANES[:32], output="u4", shared=512, options=Options(check_races=False))
