"""Matrix products of a warp: mma.sync, and the loads and stores of their fragments.

Fragments are as the ISA draws them: lane = 4 * group + thread of the group.
"""

from __future__ import annotations

import numpy as np

from .conversions import bf16_to_f32
from .parser import Vector
from .registry import opcode, unknown

ELEMENT_BITS = {"f16": 16, "bf16": 16, "tf32": 32}


def full(value: np.ndarray, rows: int) -> np.ndarray:
    return value if value.shape == (rows, 32) else np.broadcast_to(value, (rows, 32))


def rows_of(*values) -> int:
    return max(v.shape[0] for v in values)


def widen(words: np.ndarray, kind: str) -> np.ndarray:
    """[..., n] words as float32 values: two of a 16-bit type each, or one of tf32.

    A product takes 19 bits of a tf32 operand and ignores the others.
    """
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view("f4")
    words = np.ascontiguousarray(words)
    halves = words.view("u2") if kind == "bf16" else words.view("f2")
    return bf16_to_f32(halves) if kind == "bf16" else halves.astype("f4")


@opcode("ldmatrix")
def emit_ldmatrix(c, i):
    if not (i.has("m8n8") and i.type == "b16") or i.guard:
        raise unknown(i)
    to = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    call = c.call(ldmatrix, "M", c.thing(i), c.address(i.operands[1]), len(to),
                  repr(i.has("trans")), "s", "m")  # fmt: skip
    name = c.let(call)
    for n, register in enumerate(to):
        c.write(register, "b32", f"{name}[:, {n}]")


def ldmatrix(M, i, address, count: int, transposed: bool, s, m) -> np.ndarray:  # noqa: N803
    """[warps, count, 32] words: lane 8 * n + r names row r, 16 bytes, of matrix n."""
    _whole_warps(M, i, s, m)
    at = M.shared_at(i, address, 16, s, None)
    at = np.broadcast_to(at, (at.shape[0], 32))[:, : 8 * count]
    if M.options.check_races:
        wide = np.zeros((at.shape[0], 32), bool)
        wide[:, : 8 * count] = True
        whole = at if count == 4 else np.pad(at, ((0, 0), (0, 32 - 8 * count)))
        M.races.read(i, whole, 16, s, None if count == 4 else wide)
    rows = M.words[4].reshape(-1, 4)[at // 16]  # [warps, 8 * count, 4]
    rows = rows.reshape(-1, count, 8, 4)
    if transposed:
        halves = rows.view("u2").reshape(-1, count, 8, 8).transpose(0, 1, 3, 2)
        rows = np.ascontiguousarray(halves).view("u4")
    return rows.reshape(-1, count, 32)


def _whole_warps(M, i, s, m) -> None:  # noqa: N803
    if m is not None and not m.all():
        M.report_lanes(i, "diverged: not all lanes execute an instruction of the warp",
                       ~np.broadcast_to(m, (m.shape[0], 32)), np.zeros((1, 1)), s)  # fmt: skip


@opcode("stmatrix")
def emit_stmatrix(c, i):
    if not (i.has("m8n8") and i.type == "b16") or i.guard:
        raise unknown(i)
    source = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    words = ", ".join(c.read(r, "b32") for r in source)
    call = c.call(stmatrix, "M", c.thing(i), c.address(i.operands[0]), f"[{words}]",
                  repr(i.has("trans")), "s", "m")  # fmt: skip
    c.do(call)


def stmatrix(M, i, address, words: list, transposed: bool, s, m) -> None:  # noqa: N803
    _whole_warps(M, i, s, m)
    count = len(words)
    warps = M.warps if s is None else len(s)
    at = np.broadcast_to(M.shared_at(i, address, 16, s, None), (warps, 32))
    if M.options.check_races:
        some = np.zeros((warps, 32), bool)
        some[:, : 8 * count] = True
        M.races.write(i, at, 16, s, some)
    stacked = np.stack([full(w, warps) for w in words], 1).reshape(warps, count, 8, 4)
    if transposed:
        halves = stacked.view("u2").reshape(warps, count, 8, 8).transpose(0, 1, 3, 2)
        stacked = np.ascontiguousarray(halves).view("u4")
    rows = stacked.reshape(warps, 8 * count, 4)
    M.words[4].reshape(-1, 4)[at[:, : 8 * count] // 16] = rows


SHAPES = {"m16n8k16": (16, 8, 16), "m16n8k8": (16, 8, 8), "m16n8k4": (16, 8, 4)}


@opcode("mma")
def emit_mma(c, i):
    """mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 d, a, b, c"""
    shape, kind = i.parts[3], i.parts[7]
    if i.parts[:3] != ("mma", "sync", "aligned") or shape not in SHAPES or i.guard:
        raise unknown(i)
    if (
        i.parts[4:7] != ("row", "col", "f32")
        or i.parts[8:] != (kind, "f32")
        or kind not in ELEMENT_BITS
    ):
        raise unknown(i)
    d, a, b, acc = (o.items for o in i.operands)
    a = ", ".join(c.read(r, "b32") for r in a)
    b = ", ".join(c.read(r, "b32") for r in b)
    acc = ", ".join(c.read(r, "f32") for r in acc)
    name = c.let(c.call(mma, "M", c.thing(i), repr(kind), f"[{a}]", f"[{b}]", f"[{acc}]", "s", "m"))
    for n, register in enumerate(d):
        c.write(register, "f32", f"{name}[:, {n}]")


def a_matrix(words: list, kind: str, warps: int) -> np.ndarray:
    """[warps, 16, k] float32 of the registers of A: rows g and g + 8, columns by thread."""
    stacked = np.stack([full(w, warps) for w in words], 1)
    columns = len(words) // 2
    each = 1 if kind == "tf32" else 2
    values = widen(stacked, kind).reshape(warps, columns, 2, 8, 4, each)
    return values.transpose(0, 2, 3, 1, 4, 5).reshape(warps, 16, columns * 4 * each)


def b_matrix(words: list, kind: str, warps: int) -> np.ndarray:
    """[warps, k, 8] float32 of the registers of B."""
    stacked = np.stack([full(w, warps) for w in words], 1)
    each = 1 if kind == "tf32" else 2
    values = widen(stacked, kind).reshape(warps, len(words), 8, 4, each)
    return values.transpose(0, 1, 3, 4, 2).reshape(warps, len(words) * 4 * each, 8)


def mma(M, i, kind: str, a: list, b: list, acc: list, s, m) -> np.ndarray:  # noqa: N803
    """[warps, 4, 32]: A @ B + C, products exact and sums in float32."""
    _whole_warps(M, i, s, m)
    warps = rows_of(*a, *b, *acc)
    product = a_matrix(a, kind, warps) @ b_matrix(b, kind, warps)
    # rows g + 8 * half, columns 2 * t + one -> register 2 * half + one, lane 4 * g + t
    product = product.reshape(warps, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3).reshape(warps, 4, 32)
    c = np.stack([full(x, warps) for x in acc], 1)
    return c + product
