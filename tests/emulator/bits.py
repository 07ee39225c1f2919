"""Logic, shifts, and fields of bits."""

from __future__ import annotations

import numpy as np

from .arithmetic import plain
from .parser import SIZES
from .registry import opcode, unknown


@opcode("and", "or", "xor")
def emit_logic(c, i):
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.base]
    plain(c, i, function, 2)


@opcode("not")
def emit_not(c, i):
    plain(c, i, np.invert, 1)


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
