"""cvt: between integers and floats, with their rounding modes."""

from __future__ import annotations

import numpy as np

from .arithmetic import flush, towards
from .moves import join
from .parser import SIZES, Pair  # noqa: F401
from .registry import opcode, unknown

INTEGER = {"i": np.iinfo}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("u4") << np.uint32(16)).view("f4")


def f32_to_bf16(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    bits = np.ascontiguousarray(x).view("u4")
    if rounding == "rn":
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(
            16
        )
    elif rounding == "rz":
        rounded = bits >> np.uint32(16)
    else:
        raise NotImplementedError(f"bf16 rounded by {rounding}")
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype("u2"))


def f32_to_tf32(x: np.ndarray, rounding: str = "rna") -> np.ndarray:
    """19 bits that a matrix product takes; ties away from zero for `rna`, to even for `rn`."""
    bits = np.ascontiguousarray(x).view("u4")
    add = np.uint32(0x1000)
    if rounding == "rn":
        add = np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))
    rounded = (bits + add) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)


def f32_to_f16(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    near = x.astype("f2")
    if rounding == "rz":
        over = np.abs(near.astype("f4")) > np.abs(x)
        near = np.where(over, np.nextafter(near, np.float16(0)), near)
    return near


def to_integer(x: np.ndarray, dtype: str, rounding: str) -> np.ndarray:
    """Rounded and clamped to what the type holds; NaN becomes 0."""
    whole = round_whole(x.astype("f8"), rounding)
    info = np.iinfo(dtype)
    inside = np.clip(whole, float(info.min), float(info.max))
    high = whole >= float(info.max)
    result = np.where(high | np.isnan(whole), 0, inside).astype(dtype)
    return np.where(high, dtype_max(dtype), result)


def dtype_max(dtype: str):
    return np.array(np.iinfo(dtype).max, dtype)


def round_whole(x: np.ndarray, rounding: str) -> np.ndarray:
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](x)


def wide_value(c, operand, kind: str) -> str:
    """A float operand, in float32 where it is narrower."""
    if kind == "bf16":
        return c.call(bf16_to_f32, c.read(operand, "bf16"))
    if kind == "f16":
        return f"{c.read(operand, 'f16')}.astype('f4')"
    return c.read(operand, kind)


FLOAT = ("f16", "bf16", "f32", "f64")


@opcode("cvt")
def emit_cvt(c, i):
    if "x2" in i.parts[-2]:
        return _packed_pair(c, i)
    to, source = i.parts[-2], i.parts[-1]
    rounding = next((p for p in i.parts if p in _ROUNDINGS), "rn")
    if to == "tf32":
        value = c.call(f32_to_tf32, c.read(i.operands[1], "f32"), repr(rounding))
        return c.write(i.operands[0], "b32", value, i.guard)
    if source in FLOAT:
        value = c.let(wide_value(c, i.operands[1], source))
        if i.has("ftz"):
            value = c.let(c.call(flush, value))
        if to in FLOAT:
            text = _float_to_float(c, i, value, to, source, rounding)
        else:
            text = c.call(to_integer, value, repr(_numpy(to)), repr(rounding))
        return c.write(i.operands[0], to, text, i.guard)
    value = c.read(i.operands[1], source)
    if i.has("sat"):
        raise unknown(i)
    if to in FLOAT:
        if to == "f64" or (to == "f32" and SIZES[source] < 4):
            text = f"{value}.astype('{_numpy(to)}')"
        elif to == "f32" and rounding == "rn":
            text = f"{value}.astype('f4')"
        elif to == "f32" and SIZES[source] == 4:
            text = c.call(towards, repr(rounding[1]), f"{value}.astype('f8')")
        elif to == "f16":
            text = f"{value}.astype('f4').astype('f2')"
        elif to == "bf16":
            text = c.call(f32_to_bf16, f"{value}.astype('f4')")
        else:
            raise unknown(i)
        return c.write(i.operands[0], to, text, i.guard)
    # integers: narrowing drops bits, widening extends by the source's sign
    text = f"{value}.astype('{_numpy(to)}')" if SIZES[to] != SIZES[source] else value
    result = c.let(text)
    register = c.program.sizes[c.program.numbers[i.operands[0].name]]
    if SIZES[to] < int(register[1]):  # the register's other bits: sign or zeros
        signed = "i" if to[0] == "s" else "u"
        narrow, wide = f"{signed}{SIZES[to]}", f"{signed}{register[1]}"
        result = f"{result}.view('{narrow}').astype('{wide}').view('{register}')"
        return c.write(i.operands[0], f"b{8 * int(register[1])}", result, i.guard)
    c.write(i.operands[0], to, f"{result}.view('{_numpy(to)}')", i.guard)


_ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")


def _numpy(kind: str) -> str:
    return {"s": "i", "u": "u", "f": "f", "b": "u"}[kind[0]] + str(SIZES[kind])


def _float_to_float(c, i, value: str, to: str, source: str, rounding: str) -> str:
    if rounding.endswith("i"):  # to a whole number of the same type
        if to != source:
            raise unknown(i)
        text = f"{c.call(round_whole, value, repr(rounding))}"
        if to not in ("f32", "f64"):
            raise unknown(i)
    elif to == "bf16":
        text = c.call(f32_to_bf16, f"{value}.astype('f4')", repr(rounding))
    elif to == "f16":
        text = c.call(f32_to_f16, value, repr(rounding))
    elif to == "f32":
        text = c.call(towards, repr(rounding[1]), value) if source == "f64" else value
    else:
        text = f"{value}.astype('f8')"
    if i.has("ftz") and to == "f32":
        text = c.call(flush, text)
    if i.has("sat"):
        if to != "f32":
            raise unknown(i)
        text = f"np.nan_to_num(np.clip({text}, 0, 1), nan=0.0).astype('f4')"
    return text


def _packed_pair(c, i) -> None:
    """cvt.rn.bf16x2.f32 d, a, b: a in the upper half."""
    to, source = i.parts[-2], i.parts[-1]
    if source != "f32" or to not in ("bf16x2", "f16x2") or i.has("relu") or i.has("satfinite"):
        raise unknown(i)
    rounding = repr(i.parts[1])
    high, low = (c.read(o, "f32") for o in i.operands[1:3])
    if to == "bf16x2":
        high, low = (c.call(f32_to_bf16, x, rounding) for x in (high, low))
    else:
        high, low = (f"{c.call(f32_to_f16, x, rounding)}.view('u2')" for x in (high, low))
    c.write(i.operands[0], "b32", c.call(join, low, high), i.guard)
