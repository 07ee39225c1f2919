"""Atomic operations on global and shared memory."""

from __future__ import annotations

import numpy as np

from .addresses import FIRST, SHARED_WINDOW, WHOLE
from .global_races import global_write
from .memory import first_address, registers_of
from .parser import SIZES
from .registry import opcode, unknown


@opcode("atom", "red")
def emit_atom(c, i):
    """`red` gives no old value."""
    known = {"atom", "red", "global", "shared", "gpu", "cta", "sys", "relaxed", "acquire",
             "acq_rel", "release", "v2", "v4", "add", "min", "max", "cas", "exch", "and", "or", "xor", "noftz"}  # fmt: skip # noqa: E501
    if set(i.parts[:-1]) - known:
        raise unknown(i)
    kind = i.type
    has_result = i.base == "atom"
    address, *operands = i.operands[1:] if has_result else i.operands
    name = next(p for p in i.parts if p in _UPDATES)
    columns = [[c.read(x, kind) for x in registers_of(o)] for o in operands]
    lists = ", ".join(f"[{', '.join(names)}]" for names in columns)
    shared = i.has("shared")
    at = c.address(address)
    call = c.call(atomic, "M", c.thing(i), repr(name), repr(shared), at, f"[{lists}]", "s",
                  c.mask(i))  # fmt: skip
    value = c.let(call)
    if has_result:
        for n, register in enumerate(registers_of(i.operands[0])):
            bits = f"b{8 * SIZES[kind]}"
            c.write(register, bits, f"{value}[{n}].view('u{SIZES[kind]}')", i.guard)


def _compare_and_swap(old, expected, new):
    return new if old == expected else old


_UPDATES = {
    "add": lambda old, x: old + x, "min": min, "max": max, "exch": lambda old, x: x,
    "and": lambda old, x: old & x, "or": lambda old, x: old | x, "xor": lambda old, x: old ^ x,
    "cas": _compare_and_swap,
}  # fmt: skip


def atomic(M, i, name: str, shared: bool, address, operands: list, s, m) -> list:  # noqa: N803
    """Lane by lane, in a drawn order. Returns old values."""
    count = len(operands[0])
    dtype = operands[0][0].dtype
    size = dtype.itemsize
    warps = M.all_warps if s is None else s
    shape = (len(warps), 32)
    some = np.ones(shape, bool) if m is None else np.broadcast_to(m, shape)
    address = np.broadcast_to(address, shape)
    first = first_address(address, some)
    if first is None:
        return [np.zeros((1, 1), dtype)] * count
    if not shared and first >= SHARED_WINDOW:
        shared, address = True, address - SHARED_WINDOW
    if shared:
        at = M.shared_at(i, address, size * count, s, some)
        words, index = M.words[size].view(dtype), at // size
    else:
        region = M.check_global(i, address, size * count, s, some)
        if M.options.check_races:
            global_write(M, i, region, address, size * count, s, some, atomic=True)
        words, index = WHOLE[size].view(dtype), (address - FIRST) // size
    old = [np.zeros(shape, dtype) for _ in range(count)]
    rows, lanes = np.nonzero(some)
    order = M.draw.permutation(len(rows))
    rows, lanes = rows[order], lanes[order]
    cells = index[rows, lanes]
    update = _UPDATES[name]
    if name == "add" and len(np.unique(cells)) == len(cells):
        for n in range(count):
            previous = words[cells + n]
            old[n][rows, lanes] = previous
            words[cells + n] = previous + np.broadcast_to(operands[0][n], shape)[rows, lanes]
        return old
    for n in range(count):
        values = [np.broadcast_to(o[n], shape)[rows, lanes] for o in operands]
        before = old[n]
        for k, cell in enumerate(cells + n):
            previous = words[cell]
            before[rows[k], lanes[k]] = previous
            words[cell] = update(previous, *(v[k] for v in values))
    return old
