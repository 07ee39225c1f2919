"""Comparison, selection, and moves between registers."""

from __future__ import annotations

import numpy as np

from .addresses import PARAM_WINDOW, SHARED_WINDOW
from .arithmetic import FLOATS, flush
from .parser import SIZES, Name, Pair, Vector
from .registry import opcode, unknown


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


@opcode("set")
def emit_set(c, i):
    """Each half of a register compared with that of another: all ones where they are unequal."""
    if tuple(i.parts[1:3]) != ("neu", "u32") or i.type not in ("f16x2", "bf16x2"):
        raise unknown(i)
    a, b = (c.read(o, i.type) for o in i.operands[1:3])
    c.write(i.operands[0], "u32", c.call(unequal_halves, i.type == "bf16x2", a, b), i.guard)


def unequal_halves(bf16: bool, a, b) -> np.ndarray:
    def value(word, half: int) -> np.ndarray:
        bits = (word >> np.uint32(16 * half) & np.uint32(0xFFFF)).astype("u4")
        return (bits << np.uint32(16)).view("f4") if bf16 else bits.astype("u2").view("f2")

    low, high = (value(a, half) != value(b, half) for half in range(2))
    return np.where(low, np.uint32(0xFFFF), 0) | np.where(high, np.uint32(0xFFFF0000), 0)


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
