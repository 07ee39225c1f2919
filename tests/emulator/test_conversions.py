"""Conversions between types against NumPy and PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .conversions import f32_to_tf32
from .harness import floats, integers, one


def test_bfloat16_is_pytorchs():
    x = floats(seed=1)
    x[np.isnan(x)] = 1.5
    wanted = torch.tensor(x).to(torch.bfloat16).view(torch.int16).numpy().view("u2")
    np.testing.assert_array_equal(one("cvt.rn.bf16.f32 %y0, %x0;", x, output="u2"), wanted)
    back = one("cvt.f32.bf16 %y0, %x0;", wanted, output="f4")
    np.testing.assert_array_equal(back.view("u4"), wanted.astype("u4") << 16)


def test_a_pair_has_its_first_operand_on_top():
    a, b = floats(seed=1, wide=False), floats(seed=2, wide=False)
    got = one("cvt.rn.bf16x2.f32 %y0, %x0, %x1;", a, b, output="u4")
    high, low = (
        torch.tensor(x).to(torch.bfloat16).view(torch.int16).numpy().view("u2") for x in (a, b)
    )
    np.testing.assert_array_equal(got >> 16, high)
    np.testing.assert_array_equal(got & 0xFFFF, low)
    got = one("cvt.rn.f16x2.f32 %y0, %x0, %x1;", a, b, output="u4")
    np.testing.assert_array_equal(got & 0xFFFF, b.astype("f2").view("u2"))


def test_half_precision_and_nan():
    x = floats(seed=3)
    with np.errstate(over="ignore"):
        wanted = x.astype("f2")
    np.testing.assert_array_equal(one("cvt.rn.f16.f32 %y0, %x0;", x, output="f2"), wanted)
    np.testing.assert_array_equal(
        one("cvt.f32.f16 %y0, %x0;", wanted, output="f4"), wanted.astype("f4")
    )


def test_tf32_rounds_half_away():
    x = floats(seed=4, wide=False)
    x[0] = 1 + 2.0**-11
    x[1] = 1 + 3 * 2.0**-11
    got = one("cvt.rna.tf32.f32 %y0, %x0;", x, output="f4")
    assert ((got.view("u4") & 0x1FFF) == 0).all()
    assert got[0] == 1 + 2.0**-10 and got[1] == 1 + 2 * 2.0**-10
    assert (np.abs(got - x) <= np.abs(x) * 2.0**-11).all()
    assert f32_to_tf32(x[:1], "rn").view("f4")[0] == 1.0


@pytest.mark.parametrize("mode, function", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor),
                                            ("rpi", np.ceil)])  # fmt: skip
def test_floats_to_integers_round_and_clamp(mode, function):
    x = floats(seed=5)
    x[100:200] = np.random.default_rng(0).uniform(-9, 9, 100)
    x[8:10] = 2.5, -2.5
    for kind, dtype in (("s32", "i4"), ("u32", "u4"), ("s64", "i8")):
        info = np.iinfo(dtype)
        exact = [0 if np.isnan(v) else float(function(np.float64(v))) for v in x]
        wanted = [int(max(min(v, info.max), info.min)) if np.isfinite(v) else
                  (info.max if v > 0 else info.min) for v in exact]  # fmt: skip
        got = one(f"cvt.{mode}.{kind}.f32 %y0, %x0;", x, output=dtype)
        np.testing.assert_array_equal(got.astype(object), np.array(wanted, object))
    got = one(f"cvt.{mode}.f32.f32 %y0, %x0;", x, output="f4")
    np.testing.assert_array_equal(got, function(x))


def test_integers_to_floats():
    for kind, dtype in (("s32", "i4"), ("u32", "u4"), ("s64", "i8"), ("u64", "u8")):
        x = integers(dtype, seed=6)
        np.testing.assert_array_equal(
            one(f"cvt.rn.f32.{kind} %y0, %x0;", x, output="f4"), x.astype("f4")
        )
        np.testing.assert_array_equal(
            one(f"cvt.rn.f64.{kind} %y0, %x0;", x, output="f8"), x.astype("f8")
        )
    x = integers("i4", seed=6)
    up = one("cvt.rp.f32.s32 %y0, %x0;", x, output="f4").astype("f8")
    assert (up >= x).all() and (up - x <= 256).all()


def test_widening_and_narrowing_integers():
    x = integers("i4", seed=7)
    np.testing.assert_array_equal(one("cvt.s64.s32 %y0, %x0;", x, output="i8"), x.astype("i8"))
    np.testing.assert_array_equal(
        one("cvt.u64.u32 %y0, %x0;", x, output="u8"), x.view("u4").astype("u8")
    )
    np.testing.assert_array_equal(one("cvt.u16.u32 %y0, %x0;", x, output="u2"), x.astype("u2"))
    # to eight bits, in a register of sixteen: the others are the sign's
    np.testing.assert_array_equal(
        one("cvt.s8.s32 %y0, %x0;", x, output="i2"), x.astype("i1").astype("i2")
    )
    np.testing.assert_array_equal(
        one("cvt.u8.u32 %y0, %x0;", x, output="u2"), x.astype("u1").astype("u2")
    )


def test_doubles_round_once():
    x = floats(seed=8, dtype="f8", wide=False)
    np.testing.assert_array_equal(one("cvt.rn.f32.f64 %y0, %x0;", x, output="f4"), x.astype("f4"))
    down = one("cvt.rz.f32.f64 %y0, %x0;", x, output="f4").astype("f8")
    assert (np.abs(down) <= np.abs(x)).all()
