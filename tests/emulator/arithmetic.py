"""Integer and floating-point arithmetic."""

from __future__ import annotations

import numpy as np

from .parser import SIZES
from .registry import opcode, unknown

FLOATS = ("f16", "f32", "f64")
FTZ_LEAST = np.float32(2.0**-126)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 values become zeros of their sign: `.ftz`."""
    small = np.abs(x) < FTZ_LEAST
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def fma32(a, b, c) -> np.ndarray:
    """a * b + c, rounded to float32 once; the product is exact in float64.

    The sum is rounded to odd there, so that the second rounding cannot go wrong.
    """
    p = np.multiply(a, b, dtype="f8")
    s = p + c
    bits = s.view("i8")
    near = (bits & 0x1FFFFFFF) == 0x10000000  # half way between two float32 values
    if near.any():
        big = s - p
        rest = (p - (s - big)) + (c - big)  # what the sum lost, exactly (2Sum)
        up = (rest > 0) == (s > 0)
        moved = np.where(up, bits + 1, bits - 1).view("f8")
        s = np.where(near & (rest != 0) & np.isfinite(s), moved, s)
    return s.astype("f4")


def fma64(a, b, c) -> np.ndarray:
    """In extended precision, rounded to float64: exact but for rare double roundings."""
    wide = np.multiply(a.astype(np.longdouble), b)
    return (wide + c).astype("f8")


def divide_int(a, b) -> np.ndarray:
    """Quotient rounded towards zero; all ones for a division by zero, as GPUs give."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a, a // np.where(b == 0, 1, b).astype(a.dtype))
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, -1, quotient).astype(a.dtype)


def remainder_int(a, b) -> np.ndarray:
    return a - divide_int(a, b) * b


def multiply_high(a, b) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    if bits <= 32:
        return (a.astype("i8") * b.astype("i8") >> bits if a.dtype.kind == "i" else
                a.astype("u8") * b.astype("u8") >> np.uint64(bits)).astype(a.dtype)  # fmt: skip
    x, y = a.astype("u8"), b.astype("u8")
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, 0).astype("u8") - np.where(b < 0, x, 0).astype("u8")
    return high.view(a.dtype)


def packed(function, dtype: str, *values) -> np.ndarray:
    """A function over the two halves of 32-bit values."""
    halves = [v.view(dtype).reshape(*v.shape, 2) for v in values]
    result = np.ascontiguousarray(function(*halves).astype(dtype))
    return result.view("u4")[..., 0]


def towards(direction: str, x64: np.ndarray) -> np.ndarray:
    """float64 to float32, rounded up (p), down (m) or towards zero (z)."""
    near = x64.astype("f4")
    if direction == "n":
        return near
    wide = near.astype("f8")
    if direction == "p":
        return np.where(wide < x64, np.nextafter(near, np.float32(np.inf)), near)
    if direction == "m":
        return np.where(wide > x64, np.nextafter(near, np.float32(-np.inf)), near)
    away = np.abs(wide) > np.abs(x64)
    return np.where(away, np.nextafter(near, np.float32(0)), near)


def exp2_approx(x) -> np.ndarray:
    return np.exp2(x)


def _rounded(i) -> str:
    return next((r for r in ("rz", "rm", "rp") if i.has(r)), "rn")


def _float(c, i, function, count: int) -> None:
    """An operation on floats: ftz of operands and result, saturation, rounding."""
    kind = i.type
    values = [c.read(o, kind) for o in i.operands[1 : 1 + count]]
    if i.has("ftz"):
        values = [c.call(flush, v) for v in values]
    if _rounded(i) != "rn":
        if kind != "f32":
            raise unknown(i)
        wide = [f"{v}.astype('f8')" for v in values]
        exact = {fma32: "{0} * {1} + {2}", np.add: "{0} + {1}", np.multiply: "{0} * {1}",
                 np.subtract: "{0} - {1}", np.divide: "{0} / {1}"}[function]  # fmt: skip
        result = c.call(towards, repr(_rounded(i)[1]), exact.format(*wide))
    else:
        result = c.call(function, *values)
    if i.has("ftz"):
        result = c.call(flush, result)
    if i.has("sat"):
        result = f"np.nan_to_num(np.clip({result}, 0, 1), nan=0.0).astype('{'f4'}')"
    c.write(i.operands[0], kind, result, i.guard)


def plain(c, i, function, count: int, kind: str | None = None) -> None:
    kind = kind or i.type
    values = [c.read(o, kind) for o in i.operands[1 : 1 + count]]
    c.write(i.operands[0], kind, c.call(function, *values), i.guard)


@opcode("add", "sub")
def emit_add(c, i):
    function = np.add if i.base == "add" else np.subtract
    if i.type in FLOATS:
        _float(c, i, function, 2)
    elif i.type in ("s16x2", "u16x2"):
        a, b = (c.read(o, "b32") for o in i.operands[1:3])
        call = c.call(packed, c.thing(function, "f"), "'i2'", a, b)
        c.write(i.operands[0], "b32", call, i.guard)
    elif i.has("cc") or i.has("sat") or i.type not in SIZES or i.type == "bf16":
        raise unknown(i)
    else:
        plain(c, i, function, 2)


@opcode("mul")
def emit_mul(c, i):
    if i.type in FLOATS:
        return _float(c, i, np.multiply, 2)
    if i.has("wide"):
        return c.write(i.operands[0], _twice(i.type), _wide_product(c, i), i.guard)
    plain(c, i, multiply_high if i.has("hi") else np.multiply, 2)


def _twice(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def _wide_product(c, i) -> str:
    a, b = (c.read(o, i.type) for o in i.operands[1:3])
    wide = c.thing(np.dtype(f"{'i' if i.type[0] == 's' else 'u'}{2 * SIZES[i.type]}").type)
    return c.let(f"np.multiply({a}, {b}, dtype={wide})")


@opcode("mad")
def emit_mad(c, i):
    if i.type in FLOATS:
        return _float(c, i, fma32 if i.type == "f32" else fma64, 3)
    if i.has("wide"):
        product, kind = _wide_product(c, i), _twice(i.type)
    elif i.has("lo") or i.has("hi"):
        a, b = (c.read(o, i.type) for o in i.operands[1:3])
        product, kind = c.call(multiply_high if i.has("hi") else np.multiply, a, b), i.type
    else:
        raise unknown(i)
    c.write(i.operands[0], kind, f"np.add({product}, {c.read(i.operands[3], kind)})", i.guard)


@opcode("fma")
def emit_fma(c, i):
    _float(c, i, {"f32": fma32, "f64": fma64}[i.type], 3)


@opcode("div")
def emit_div(c, i):
    if i.type in FLOATS:
        return _float(c, i, np.divide, 2)
    plain(c, i, divide_int, 2)


@opcode("rem")
def emit_rem(c, i):
    plain(c, i, remainder_int, 2)


@opcode("rcp")
def emit_rcp(c, i):
    _float(c, i, lambda_reciprocal, 1)


def lambda_reciprocal(x):
    return np.divide(x.dtype.type(1), x)


def inverse_root(x):
    return np.divide(x.dtype.type(1), np.sqrt(x))


@opcode("sqrt")
def emit_sqrt(c, i):
    _float(c, i, np.sqrt, 1)


@opcode("rsqrt")
def emit_rsqrt(c, i):
    _float(c, i, inverse_root, 1)


@opcode("ex2")
def emit_ex2(c, i):
    _float(c, i, exp2_approx, 1)


@opcode("lg2")
def emit_lg2(c, i):
    _float(c, i, np.log2, 1)


@opcode("tanh")
def emit_tanh(c, i):
    _float(c, i, np.tanh, 1)


@opcode("sin")
def emit_sin(c, i):
    _float(c, i, np.sin, 1)


@opcode("cos")
def emit_cos(c, i):
    _float(c, i, np.cos, 1)


@opcode("max", "min")
def emit_extreme(c, i):
    up = i.base == "max"
    if i.type in FLOATS:
        if i.has("NaN"):
            function = np.maximum if up else np.minimum
        else:
            function = np.fmax if up else np.fmin
        return _float(c, i, function, 2)
    if i.has("relu"):
        a, b = (c.read(o, i.type) for o in i.operands[1:3])
        extreme = c.call(np.maximum if up else np.minimum, a, b)
        return c.write(i.operands[0], i.type, f"np.maximum({extreme}, 0)", i.guard)
    plain(c, i, np.maximum if up else np.minimum, 2)


@opcode("neg")
def emit_neg(c, i):
    if i.type in FLOATS:
        return _float(c, i, np.negative, 1)
    plain(c, i, np.negative, 1)


@opcode("abs")
def emit_abs(c, i):
    if i.type in FLOATS:
        return _float(c, i, np.abs, 1)
    plain(c, i, np.abs, 1)


@opcode("copysign")
def emit_copysign(c, i):
    sign, size = (c.read(o, i.type) for o in i.operands[1:3])
    c.write(i.operands[0], i.type, c.call(np.copysign, size, sign), i.guard)
