"""Integer and floating-point arithmetic, comparison, selection, logic and moves."""

from __future__ import annotations

import numpy as np

from .parser import SIZES, Name, Pair, Vector
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


def _plain(c, i, function, count: int, kind: str | None = None) -> None:
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
        _plain(c, i, function, 2)


@opcode("mul")
def emit_mul(c, i):
    if i.type in FLOATS:
        return _float(c, i, np.multiply, 2)
    if i.has("wide"):
        return c.write(i.operands[0], _twice(i.type), _wide_product(c, i), i.guard)
    _plain(c, i, multiply_high if i.has("hi") else np.multiply, 2)


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
    _plain(c, i, divide_int, 2)


@opcode("rem")
def emit_rem(c, i):
    _plain(c, i, remainder_int, 2)


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
    _plain(c, i, np.maximum if up else np.minimum, 2)


@opcode("neg")
def emit_neg(c, i):
    if i.type in FLOATS:
        return _float(c, i, np.negative, 1)
    _plain(c, i, np.negative, 1)


@opcode("abs")
def emit_abs(c, i):
    if i.type in FLOATS:
        return _float(c, i, np.abs, 1)
    _plain(c, i, np.abs, 1)


@opcode("copysign")
def emit_copysign(c, i):
    sign, size = (c.read(o, i.type) for o in i.operands[1:3])
    c.write(i.operands[0], i.type, c.call(np.copysign, size, sign), i.guard)


@opcode("and", "or", "xor")
def emit_logic(c, i):
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.base]
    _plain(c, i, function, 2)


@opcode("not")
def emit_not(c, i):
    _plain(c, i, np.invert, 1)


@opcode("cnot")
def emit_cnot(c, i):
    value = c.read(i.operands[1], i.type)
    c.write(i.operands[0], i.type, f"({value} == 0).astype({value}.dtype)", i.guard)


@opcode("shl", "shr")
def emit_shift(c, i):
    """Shifts by the width or more leave zeros, or signs."""
    value, by = c.read(i.operands[1], i.type), c.read(i.operands[2], "u32")
    most = 8 * SIZES[i.type]
    call = c.call(shift, repr(i.base == "shl"), most, value, by)
    c.write(i.operands[0], i.type, call, i.guard)


def shift(left: bool, bits: int, value, by) -> np.ndarray:
    if by.size == 1:
        n = int(by.flat[0])
        if n >= bits:
            if left or value.dtype.kind == "u":
                return np.zeros_like(value)
            n = bits - 1
        by = value.dtype.type(n)
        return value << by if left else value >> by
    over = by >= bits
    amount = np.where(over, bits - 1, by).astype(value.dtype)
    result = value << amount if left else value >> amount
    if left or value.dtype.kind == "u":
        return np.where(over, value.dtype.type(0), result)
    return result


@opcode("shf")
def emit_funnel(c, i):
    low, high, by = (c.read(o, "u32") for o in i.operands[1:4])
    call = c.call(funnel, repr(i.has("l")), repr(i.has("wrap")), low, high, by)
    c.write(i.operands[0], "u32", call, i.guard)


def funnel(left: bool, wrap: bool, low, high, by) -> np.ndarray:
    n = (by & 31 if wrap else np.minimum(by, 32)).astype("u8")
    both = high.astype("u8") << np.uint64(32) | low
    if left:
        return (np.where(n == 0, high, both << n >> np.uint64(32))).astype("u4")
    return (both >> n).astype("u4")


@opcode("bfe")
def emit_bfe(c, i):
    value = c.read(i.operands[1], i.type)
    start, length = (c.read(o, "u32") for o in i.operands[2:4])
    c.write(i.operands[0], i.type, c.call(extract_bits, value, start, length), i.guard)


def extract_bits(value, start, length) -> np.ndarray:
    """`length` bits from bit `start` on, extended by their sign where the type has one."""
    bits = 8 * value.dtype.itemsize
    start, length = (start & 0xFF).astype("i8"), (length & 0xFF).astype("i8")
    wide = value.astype("i8" if value.dtype.kind == "i" else "u8")
    stop = np.minimum(start + length, bits)
    length = np.maximum(stop - start, 0)
    moved = wide >> np.minimum(start, 63).astype(wide.dtype)
    if value.dtype.kind == "i":  # bits beyond the top are signs already
        drop = 64 - length
        return np.where(length == 0, 0, moved << (drop & 63) >> (drop & 63)).astype(value.dtype)
    keep = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << (length.astype("u8") & np.uint64(63))) - np.uint64(1))  # fmt: skip # noqa: E501
    return (moved & keep).astype(value.dtype)


@opcode("bfi")
def emit_bfi(c, i):
    value, into = (c.read(o, i.type) for o in i.operands[1:3])
    start, length = (c.read(o, "u32") for o in i.operands[3:5])
    call = c.call(insert_bits, value, into, start, length)
    c.write(i.operands[0], i.type, call, i.guard)


def insert_bits(value, into, start, length) -> np.ndarray:
    one = np.uint64(1)
    start, length = (start & 0xFF).astype("u8"), (length & 0xFF).astype("u8")
    ones = np.where(length >= 64, ~np.uint64(0), (one << (length & np.uint64(63))) - one)
    field = np.where(start >= 64, np.uint64(0), ones << (start & np.uint64(63)))
    placed = value.astype("u8") << (start & np.uint64(63))
    return ((into.astype("u8") & ~field) | (placed & field)).astype(into.dtype)


@opcode("popc")
def emit_popc(c, i):
    value = c.read(i.operands[1], i.type)
    c.write(i.operands[0], "u32", f"np.bitwise_count({value}).astype('u4')", i.guard)


@opcode("clz")
def emit_clz(c, i):
    value = c.read(i.operands[1], i.type)
    c.write(i.operands[0], "u32", c.call(leading_zeros, value), i.guard)


def leading_zeros(value) -> np.ndarray:
    bits = 8 * value.dtype.itemsize
    spread = value
    for step in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
        spread = spread | spread >> value.dtype.type(step)
    return (bits - np.bitwise_count(spread)).astype("u4")


@opcode("bfind")
def emit_bfind(c, i):
    if i.type not in ("u32", "u64"):
        raise unknown(i)
    value = c.read(i.operands[1], i.type)
    most = 8 * SIZES[i.type] - 1
    zeros = c.call(leading_zeros, value)
    c.write(
        i.operands[0], "u32", f"np.where({value} == 0, 0xFFFFFFFF, {most} - {zeros}).astype('u4')"
    )


@opcode("brev")
def emit_brev(c, i):
    value = c.read(i.operands[1], i.type)
    c.write(i.operands[0], i.type, c.call(reverse_bits, value), i.guard)


def reverse_bits(value) -> np.ndarray:
    octets = np.ascontiguousarray(value)[..., None].view("u1")
    bits = np.unpackbits(octets, axis=-1, bitorder="little")[..., ::-1]
    packed_bits = np.packbits(bits, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed_bits).view(value.dtype)[..., 0]


@opcode("selp")
def emit_selp(c, i):
    yes, no = (c.read(o, i.type) for o in i.operands[1:3])
    which = c.read(i.operands[3], "pred")
    c.write(i.operands[0], i.type, f"np.where({which}, {yes}, {no})", i.guard)


COMPARE = {
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "lo": "{0} < {1}", "ls": "{0} <= {1}",
    "hi": "{0} > {1}", "hs": "{0} >= {1}",
    # unordered: true where an operand is NaN
    "equ": "~(({0} < {1}) | ({0} > {1}))", "neu": "{0} != {1}", "ltu": "~({0} >= {1})",
    "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
    "num": "({0} == {0}) & ({1} == {1})", "nan": "({0} != {0}) | ({1} != {1})",
}  # fmt: skip


@opcode("setp")
def emit_setp(c, i):
    kind = i.type
    a, b = (c.read(o, kind) for o in i.operands[1:3])
    if i.has("ftz"):
        a, b = c.let(c.call(flush, a)), c.let(c.call(flush, b))
    compare = i.parts[1]
    text = COMPARE[compare].format(a, b)
    if compare == "ne" and kind in FLOATS:  # ordered: false for NaN
        text = f"({a} < {b}) | ({a} > {b})"
    result = c.let(text)
    other = next((p for p in i.parts[2:-1] if p in ("and", "or", "xor")), None)
    first, second = result, None
    if isinstance(i.operands[0], Pair):
        second = f"~{result}"
    if other:
        sign = {"and": "&", "or": "|", "xor": "^"}[other]
        third = c.read(i.operands[3], "pred")
        first = f"{result} {sign} {third}"
        second = second and f"({second}) {sign} {third}"
    if isinstance(i.operands[0], Pair):
        first = c.let(first)
        c.write(i.operands[0].first, "pred", first, i.guard)
        c.write(i.operands[0].second, "pred", second, i.guard)
    else:
        c.write(i.operands[0], "pred", first, i.guard)


@opcode("mov")
def emit_mov(c, i):
    to, source = i.operands
    kind = i.type
    if isinstance(source, Vector):  # pack
        part = {2: "b16", 4: "b32"}[SIZES[kind] // len(source.items)]
        if SIZES[kind] // len(source.items) == 1:
            raise unknown(i)
        values = [c.read(o, part) for o in source.items]
        c.write(to, kind, c.call(join, *values), i.guard)
    elif isinstance(to, Vector):  # unpack
        part = {2: "b16", 4: "b32"}[SIZES[kind] // len(to.items)]
        value = c.read(source, kind)
        size = SIZES[part]
        pieces = c.let(c.call(pieces_of, value, f"'u{size}'"))
        for n, register in enumerate(to.items):
            if not (isinstance(register, Name) and register.name == "_"):
                c.write(register, part, f"{pieces}[..., {n}]", i.guard)
    else:
        c.write(to, kind, c.read(source, kind), i.guard)


def join(*values) -> np.ndarray:
    size = values[0].dtype.itemsize
    wide = f"u{size * len(values)}"
    result = values[0].astype(wide)
    for n, value in enumerate(values[1:], 1):
        result = result | value.astype(wide) << np.array(8 * size * n, wide)
    return result


def pieces_of(value, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(value)[..., None].view(dtype)


@opcode("prmt")
def emit_prmt(c, i):
    """Four of the eight bytes of two words, by the nibbles of a selector."""
    if len(i.parts) != 2:
        raise unknown(i)
    a, b, selector = (c.read(o, "u32") for o in i.operands[1:4])
    c.write(i.operands[0], "u32", c.call(permute_bytes, a, b, selector), i.guard)


def permute_bytes(a, b, selector) -> np.ndarray:
    both = a.astype("u8") | b.astype("u8") << np.uint64(32)
    result = np.zeros((1, 1), "u4")
    for n in range(4):
        nibble = selector >> np.uint32(4 * n) & np.uint32(15)
        octet = (both >> (8 * (nibble & 7)).astype("u8") & np.uint64(255)).astype("u4")
        signs = np.where(octet & 128, np.uint32(255), np.uint32(0))
        octet = np.where(nibble & 8, signs, octet)
        result = result | octet << np.uint32(8 * n)
    return result


@opcode("lop3")
def emit_lop3(c, i):
    a, b, d = (c.read(o, "u32") for o in i.operands[1:4])
    table = i.operands[4].value
    terms = []
    for n in range(8):
        if table >> n & 1:
            names = [x if n >> k & 1 else f"~{x}" for x, k in ((a, 2), (b, 1), (d, 0))]
            terms.append(f"({' & '.join(names)})")
    c.write(i.operands[0], "b32", " | ".join(terms) or f"{a} & ~{a}", i.guard)


@opcode("cvta")
def emit_cvta(c, i):
    """Between addresses of a space and generic ones, which are the same but for shared memory."""
    value = c.read(i.operands[1], i.type)
    if i.has("shared"):
        sign = "-" if i.has("to") else "+"
        value = f"{value} {sign} {c.thing(np.uint64(SHARED_WINDOW))}"
    elif not (i.has("global") or i.has("param")):
        raise unknown(i)
    elif i.has("param"):
        value = f"{value} + {c.thing(np.uint64(PARAM_WINDOW))}"
    c.write(i.operands[0], i.type, value, i.guard)


SHARED_WINDOW, PARAM_WINDOW = 1 << 56, 1 << 57  # generic addresses of shared memory, parameters
