"""Arithmetic, comparison, logic and moves against NumPy, Python's integers and fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from .harness import floats, integers, one, run
from .registry import UnknownInstruction


def same(got, wanted) -> None:
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "op, function",
    [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div.rn", np.divide)],
)
@pytest.mark.parametrize("dtype, kind", [("f4", "f32"), ("f8", "f64")])
def test_float_operations_round_to_nearest(op, function, dtype, kind):
    a, b = floats(seed=1, dtype=dtype), floats(seed=2, dtype=dtype)
    with np.errstate(all="ignore"):
        same(one(f"{op}.{kind} %y0, %x0, %x1;", a, b, output=dtype), function(a, b))


def test_ftz_flushes_operands_and_results():
    tiny, least = np.float32(1e-40), np.float32(2.0**-126)
    a = np.array([tiny, -tiny, least, least, 3.0] + [1.0] * 27, "f4")
    b = np.array([1.0, 0.0, -least * np.float32(1.5), 0.0, 4.0] + [1.0] * 27, "f4")
    plain = one("add.f32 %y0, %x0, %x1;", a, b, output="f4")
    flushed = one("add.ftz.f32 %y0, %x0, %x1;", a, b, output="f4")
    same(plain, a + b)
    same(flushed[:5], np.array([1.0, 0.0, 0.0, least, 7.0], "f4"))
    assert np.signbit(flushed[2])


def nearest32(x: Fraction) -> np.float32:
    """x to float32, once, ties to even."""
    guess = np.float32(float(x))
    around = [
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    ]
    return min(around, key=lambda v: (abs(Fraction(float(v)) - x), int(v.view("u4")) & 1))


def test_fma_rounds_once():
    a, b, c = (floats(seed=s, wide=False) for s in (1, 2, 3))
    # a product just above the middle of two floats: rounding it to float64 first would hide that
    a[0], b[0], c[0] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80
    a[1], b[1], c[1] = 1 + 2.0**-23, 1.0, np.float32(2.0**-24)
    a[2], b[2], c[2] = 2.0**-30 + 2.0**-53, 2.0**-30, 1 + 2.0**-23
    c[3:100] *= np.float32(1e-6)
    got = one("fma.rn.f32 %y0, %x0, %x1, %x2;", a, b, c, output="f4")
    wanted = [nearest32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
              for x, y, z in zip(a, b, c, strict=True)]  # fmt: skip
    same(got, np.array(wanted))


@pytest.mark.parametrize("mode, sign", [("rp", 1), ("rm", -1), ("rz", 0)])
def test_directed_rounding(mode, sign):
    a, b = floats(seed=1, wide=False), floats(seed=2, wide=False)
    got = one(f"add.{mode}.f32 %y0, %x0, %x1;", a, b, output="f4").astype("f8")
    exact = a.astype("f8") + b.astype("f8")
    toward = sign if sign else -np.sign(exact)
    assert ((got - exact) * toward >= 0).all()
    assert (np.abs(got - exact) < np.spacing(np.abs(exact).astype("f4"))).all()


def test_ex2_is_within_its_stated_error():
    x = np.linspace(-126, 127, 1024).astype("f4")
    got = one("ex2.approx.ftz.f32 %y0, %x0;", x, output="f4").astype("f8")
    exact = np.exp2(x.astype("f8"))
    assert (np.abs(got / exact - 1) <= 2.0**-22).all()


def test_ex2_of_the_ends_of_the_range():
    x = np.array([-np.inf, np.inf, np.nan, -0.0, -140.0, 200.0, 1e-40] + [0.0] * 25, "f4")
    got = one("ex2.approx.ftz.f32 %y0, %x0;", x, output="f4")
    same(got[:7], np.array([0.0, np.inf, np.nan, 1.0, 0.0, np.inf, 1.0], "f4"))
    kept = one("ex2.approx.f32 %y0, %x0;", x, output="f4")
    assert 0 < kept[4] < 1e-40


@pytest.mark.parametrize("op", ["rcp.rn", "sqrt.rn", "lg2.approx", "rsqrt.approx", "tanh.approx"])
def test_functions_of_one_operand(op):
    x = np.abs(floats(seed=3, wide=False)) + np.float32(0.1)
    function = {"rcp": np.reciprocal, "sqrt": np.sqrt, "lg2": np.log2, "tanh": np.tanh,
                "rsqrt": lambda x: 1 / np.sqrt(x)}[op.split(".")[0]]  # fmt: skip
    got = one(f"{op}.f32 %y0, %x0;", x, output="f4")
    np.testing.assert_allclose(got, function(x.astype("f8")), rtol=5e-7, atol=5e-7)


def test_max_and_min_ignore_nan_unless_told():
    a, b = floats(seed=1), floats(seed=2)
    same(one("max.f32 %y0, %x0, %x1;", a, b, output="f4"), np.fmax(a, b))
    same(one("min.f32 %y0, %x0, %x1;", a, b, output="f4"), np.fmin(a, b))
    same(one("max.NaN.f32 %y0, %x0, %x1;", a, b, output="f4"), np.maximum(a, b))


def test_saturation_clamps_to_one():
    x = np.array([-1.0, 0.25, 2.0, np.nan] * 8, "f4")
    same(one("cvt.sat.f32.f32 %y0, %x0;", x, output="f4")[:4], np.array([0, 0.25, 1, 0], "f4"))


@pytest.mark.parametrize(
    "dtype, kind", [("i4", "s32"), ("u4", "u32"), ("i8", "s64"), ("u8", "u64")]
)
def test_integer_operations_wrap(dtype, kind):
    a, b = integers(dtype, seed=1), integers(dtype, seed=2)
    bits = 8 * a.itemsize
    x, y = a.astype(object), b.astype(object)

    def wrap(values):
        return np.array([int(v) % (1 << bits) for v in values], f"u{a.itemsize}").view(dtype)

    same(one(f"add.{kind} %y0, %x0, %x1;", a, b, output=dtype), wrap(x + y))
    same(one(f"sub.{kind} %y0, %x0, %x1;", a, b, output=dtype), wrap(x - y))
    same(one(f"mul.lo.{kind} %y0, %x0, %x1;", a, b, output=dtype), wrap(x * y))
    same(one(f"mul.hi.{kind} %y0, %x0, %x1;", a, b, output=dtype), wrap([v >> bits for v in x * y]))
    same(one(f"mad.lo.{kind} %y0, %x0, %x1, %x0;", a, b, output=dtype), wrap(x * y + x))
    same(one(f"max.{kind} %y0, %x0, %x1;", a, b, output=dtype), np.maximum(a, b))
    if bits == 32:
        wide = f"{dtype[0]}8"
        got = one(f"mul.wide.{kind} %y0, %x0, %x1;", a, b, output=wide)
        same(got, a.astype(wide) * b.astype(wide))


@pytest.mark.parametrize(
    "dtype, kind", [("i4", "s32"), ("u4", "u32"), ("i8", "s64"), ("u8", "u64")]
)
def test_division_rounds_towards_zero(dtype, kind):
    a, b = integers(dtype, seed=1), integers(dtype, seed=2)
    b[::2] %= 17
    b[b == 0] = 3
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    quotient = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs]
    rest = [x - q * y for (x, y), q in zip(pairs, quotient, strict=True)]
    least = np.iinfo(dtype).min
    keep = (a != least) | (np.array([y for _, y in pairs], object) != -1)
    same(
        one(f"div.{kind} %y0, %x0, %x1;", a, b, output=dtype)[keep],
        np.array(quotient, object)[keep],
    )
    same(one(f"rem.{kind} %y0, %x0, %x1;", a, b, output=dtype)[keep], np.array(rest, object)[keep])


@pytest.mark.parametrize("kind, dtype", [("b32", "u4"), ("b64", "u8")])
def test_shifts_clamp_their_distance(kind, dtype):
    a = integers(dtype, seed=1)
    by = np.arange(1024, dtype="u4") % 80
    bits = 8 * a.itemsize
    left = [
        int(x) << int(n) & (1 << bits) - 1 if n < bits else 0 for x, n in zip(a, by, strict=True)
    ]
    right = [int(x) >> int(n) for x, n in zip(a, by, strict=True)]
    signed = a.view(f"i{a.itemsize}")
    signs = [int(x) >> min(int(n), bits - 1) for x, n in zip(signed, by, strict=True)]
    same(one(f"shl.{kind} %y0, %x0, %x1;", a, by, output=dtype), np.array(left, dtype))
    same(one(f"shr.u{bits} %y0, %x0, %x1;", a, by, output=dtype), np.array(right, dtype))
    same(one(f"shr.s{bits} %y0, %x0, %x1;", a, by, output=signed.dtype.str), signs)
    for n in (1, bits - 1, bits, 70):
        wanted = [int(x) >> n for x in a]
        same(one(f"shr.u{bits} %y0, %x0, {n};", a, output=dtype), np.array(wanted, dtype))


def test_bit_fields():
    a, b = integers("u4", seed=1), integers("u4", seed=2)
    start = (np.arange(1024, dtype="u4") * 7) % 32
    length = (np.arange(1024, dtype="u4") * 3) % 33
    taken = np.minimum(length, 32 - start).astype(int)
    rows = list(zip(a, b, start, length, taken, strict=True))
    unsigned = [int(x) >> int(s) & (1 << n) - 1 for x, _, s, _, n in rows]
    signed = [
        v - (1 << n) if n and v >> n - 1 & 1 else v
        for v, (*_, n) in zip(unsigned, rows, strict=True)
    ]
    same(one("bfe.u32 %y0, %x0, %x1, %x2;", a, start, length, output="u4"), unsigned)
    exact = [v if s + w <= 32 else None for v, (_, _, s, w, _) in zip(signed, rows, strict=True)]
    got = one("bfe.s32 %y0, %x0, %x1, %x2;", a, start, length, output="i4")
    assert all(e is None or e == g for e, g in zip(exact, got, strict=True))
    inserted = []
    for x, y, s, w, _ in rows:
        field = ((1 << int(w)) - 1) << int(s) & 0xFFFFFFFF
        inserted.append(int(y) & ~field & 0xFFFFFFFF | int(x) << int(s) & field)
    same(one("bfi.b32 %y0, %x0, %x1, %x2, %x3;", a, b, start, length, output="u4"), inserted)


def test_counts_of_bits():
    a = integers("u4", seed=5)
    a[10:40] = [1 << n for n in range(30)]
    same(one("popc.b32 %y0, %x0;", a, output="u4"), [int(x).bit_count() for x in a])
    same(one("clz.b32 %y0, %x0;", a, output="u4"), [32 - int(x).bit_length() for x in a])
    same(one("brev.b32 %y0, %x0;", a, output="u4"), [int(f"{x:032b}"[::-1], 2) for x in a])
    wide = integers("u8", seed=5)
    same(one("clz.b64 %y0, %x0;", wide, output="u4"), [64 - int(x).bit_length() for x in wide])


def test_logic_and_selection():
    a, b = integers("u4", seed=1), integers("u4", seed=2)
    same(one("and.b32 %y0, %x0, %x1;", a, b, output="u4"), a & b)
    same(one("xor.b32 %y0, %x0, %x1;", a, b, output="u4"), a ^ b)
    same(one("not.b32 %y0, %x0;", a, output="u4"), ~a)
    same(one("lop3.b32 %y0, %x0, %x1, %x0, 0x3c;", a, b, output="u4"), a ^ b)
    body = "setp.lt.u32 %p0, %x0, %x1; selp.b32 %y0, %x0, %x1, %p0;"
    same(one(body, a, b, output="u4"), np.minimum(a, b))


@pytest.mark.parametrize("compare", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu",
                                     "gtu", "geu", "num", "nan"])  # fmt: skip
def test_comparison_of_floats_and_nan(compare):
    a, b = floats(seed=1), floats(seed=2)
    b[::3] = a[::3]
    nan = np.isnan(a) | np.isnan(b)
    plain = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    if compare in ("num", "nan"):
        wanted = nan if compare == "nan" else ~nan
    else:
        wanted = np.where(nan, compare.endswith("u"), plain[compare[:2]])
    body = f"setp.{compare}.f32 %p0, %x0, %x1; selp.u32 %y0, 1, 0, %p0;"
    same(one(body, a, b, output="u4"), wanted)


def test_comparison_with_a_third_predicate_and_two_results():
    a, b = integers("i4", seed=1), integers("i4", seed=2)
    body = """setp.lt.s32 %p0, %x0, 0; setp.lt.and.s32 %p1|%p2, %x0, %x1, %p0;
              selp.u32 %y0, 1, 0, %p1; selp.u32 %y1, 1, 0, %p2;"""
    both, other = run(body, a, b, outputs=["u4", "u4"])
    same(both, (a < b) & (a < 0))
    same(other, ~(a < b) & (a < 0))


def test_a_guard_keeps_what_was_there():
    a, b = integers("u4", seed=1), integers("u4", seed=2)
    body = "setp.gt.u32 %p0, %x0, %x1; mov.b32 %y0, %x0; @!%p0 add.u32 %y0, %x0, %x1;"
    same(one(body, a, b, output="u4"), np.where(a > b, a, a + b))


def test_moves_pack_and_unpack():
    a, b = integers("u4", seed=1), integers("u4", seed=2)
    packed = one("mov.b64 %y0, {%x0, %x1};", a, b, output="u8")
    same(packed, a.astype("u8") | b.astype("u8") << np.uint64(32))
    body = "mov.b64 %d0, {%x0, %x1}; mov.b64 {_, %y0}, %d0;"
    same(one(body, a, b, output="u4"), b)
    low, high = run("mov.b32 {%y0, %y1}, %x0;", a, outputs=["u2", "u2"])
    same(low, a & 0xFFFF)
    same(high, a >> 16)


def test_byte_permutation():
    a, b = integers("u4", seed=1), integers("u4", seed=2)
    selector = integers("u4", seed=3)
    wanted = []
    for x, y, s in zip(a, b, selector, strict=True):
        octets = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        result = []
        for n in range(4):
            nibble = int(s) >> 4 * n & 15
            octet = octets[nibble & 7]
            result.append((255 if octet & 128 else 0) if nibble & 8 else octet)
        wanted.append(int.from_bytes(bytes(result), "little"))
    same(one("prmt.b32 %y0, %x0, %x1, %x2;", a, b, selector, output="u4"), wanted)


@pytest.mark.parametrize("kind", ["bf16x2", "f16x2"])
def test_halves_that_are_unequal(kind):
    """-0 equals 0, and NaN nothing."""
    a = np.array([0x00010000, 0x80000001, 0x7FFF0000, 0x00008000], "u4")
    wanted = np.array([0xFFFF0000, 0x0000FFFF, 0xFFFF0000, 0], "u4")
    a, wanted = (np.resize(x, 32) for x in (a, wanted))
    same(one(f"set.neu.u32.{kind} %y0, %x0, %x1;", a, 0 * a, output="u4"), wanted)


def test_an_unknown_instruction_is_named():
    a = integers("u4")
    with pytest.raises(UnknownInstruction, match=r"dp4a.u32.u32.*line \d+"):
        one("dp4a.u32.u32 %y0, %x0, %x0, %x0;", a, output="u4")
    with pytest.raises(UnknownInstruction, match="add.cc.u32"):
        one("add.cc.u32 %y0, %x0, %x0;", a, output="u4")


def test_registers_of_a_nested_scope_are_its_own():
    a = integers("u4")
    body = "{ .reg .b32 own; add.u32 own, %x0, 1; mov.b32 %s0, own; }"
    body += "{ .reg .b32 own; add.u32 own, %x0, 2; add.u32 %y0, own, %s0; }"
    same(one(body, a, output="u4"), 2 * a + 3)
