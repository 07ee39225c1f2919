"""Matrix products of a warp group: wgmma, its descriptors of shared memory, and its registers.

A product is computed when it is issued, and is in flight until `wait_group` says otherwise: until
then nobody may touch its registers, nor write what it reads. Every warp computes its own 16 of the
64 rows.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np

from .conversions import bf16_to_f32
from .copies import swizzle
from .matrix import _whole_warps, a_matrix, full
from .parser import Vector
from .registry import opcode, unknown

SWIZZLE_BYTES = {0: 0, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory. Offsets in bytes."""

    start: int
    leading: int
    stride: int
    width: int  # of the swizzle, bytes

    @classmethod
    def of(cls, bits: int) -> Descriptor:
        field = lambda low: (bits >> low & 0x3FFF) << 4  # noqa: E731
        return cls(field(0), field(16), field(32), SWIZZLE_BYTES[bits >> 62 & 3])

    @functools.lru_cache(1024)  # noqa: B019
    def places(self, rows: int, depth: int, size: int, transposed: bool) -> np.ndarray:
        """[rows, depth] bytes of elements, `rows` along M or N and `depth` along K.

        K-major unless `transposed`: canonical layouts of the ISA's "asynchronous warpgroup level
        matrix shared memory layout", a row of a core matrix being 16 bytes.
        """
        unit = 16 // size
        r, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
        if not transposed:
            if self.width:
                at = r % 8 * self.width + r // 8 * self.stride + k * size
            else:
                at = r % 8 * 16 + r // 8 * self.stride + k % unit * size + k // unit * self.leading
        else:
            across = max(self.width, 16) // size  # elements side by side
            at = r % across * size + k % 8 * max(self.width, 16)
            if self.width:
                at = at + r // across * self.leading + k // 8 * self.stride
            else:
                at = at + r // across * self.stride + k // 8 * self.leading
        return swizzle(self.start + at, self.width)


_SHAPE = re.compile(r"m64n(\d+)k(\d+)")


@opcode("wgmma")
def emit_wgmma(c, i):
    if i.guard or not i.has("aligned"):
        raise unknown(i)
    if i.has("fence"):
        return
    if i.has("commit_group"):
        c.do(c.call(commit, "M", "s"))
    elif i.has("wait_group"):
        c.do(c.call(wait, "M", i.operands[0].value, "s"))
    elif i.has("mma_async"):
        _product(c, i)
    else:
        raise unknown(i)


def _product(c, i) -> None:
    kind = i.parts[6]
    if i.parts[5] != "f32" or i.parts[7] != kind or kind not in ("f16", "bf16", "tf32"):
        raise unknown(i)
    n, k = map(int, _SHAPE.fullmatch(i.parts[4]).groups())
    d, a, b, scale_d, *rest = i.operands
    signs = [x.value for x in rest[:2]]
    transposes = [bool(x.value) for x in rest[2:]]
    acc = ", ".join(c.read(r, "f32") for r in d.items)
    if isinstance(a, Vector):
        words = ", ".join(c.read(r, "b32") for r in a.items)
        first, transpose_a = f"[{words}]", False
        transpose_b = transposes[0] if transposes else False
    else:
        first = c.read(a, "b64")
        transpose_a, transpose_b = transposes if transposes else (False, False)
    call = c.call(product, "M", c.thing(i), repr(kind), n, k, first, c.read(b, "b64"), f"[{acc}]",
                  c.read(scale_d, "pred"), signs, (transpose_a, transpose_b), "s", "m")  # fmt: skip
    name = c.let(call)
    for at, register in enumerate(d.items):
        c.write(register, "f32", f"{name}[:, {at}]")


class Products:
    """Reads of shared memory by products in flight, each under the first of the warps that issued
    it together.
    """

    def __init__(self, machine):
        self.committed = np.zeros(machine.warps, int)
        self.under_way: list = []  # (instruction, leaders, their group numbers, cells)


def products_of(M) -> Products:  # noqa: N803
    if M.products is None:
        M.products = Products(M)
    return M.products


def groups_of(M, warps) -> np.ndarray:  # noqa: N803
    per_cta = -(-M.warps_per_cta // 4)
    return M.cta_of[warps] * per_cta + warps % M.warps_per_cta // 4


def _matrices(M, i, bits, kind: str, rows: int, depth: int, transposed: bool, warps):  # noqa: N803
    """([n, rows, depth] float32, number of each warp's matrix, cells, the warps that lead)."""
    size = 4 if kind == "tf32" else 2
    bits = np.broadcast_to(bits, (len(warps), bits.shape[1]))
    if bits.shape[1] == 32 and (bits != bits[:, :1]).any():
        M.report(i, "a descriptor that differs between lanes", int(warps[0]), 0, 0)
    keys = list(zip(groups_of(M, warps).tolist(), bits[:, 0].tolist(), strict=True))
    unique = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    if len({group for group, _ in unique}) != len(unique):
        M.report(i, "a descriptor that differs between warps of a group", int(warps[0]), 0, 0)
    number = np.array([unique[key] for key in keys])
    leaders = warps[[keys.index(key) for key in unique]]
    at = np.empty((len(unique), rows, depth), "i8")
    places: dict[int, np.ndarray] = {}
    for (_, pattern), n in unique.items():
        if pattern not in places:
            here = Descriptor.of(pattern).places(rows, depth, size, transposed)
            if here.max() + size > M.shared_limit:
                M.report(i, "out of bounds: a descriptor", int(leaders[n]), 0, here.max())
            places[pattern] = here
        at[n] = places[pattern]
    at += (M.cta_of[leaders] * M.shared_bytes)[:, None, None]
    words = M.words[size][at // size]
    if kind == "tf32":
        values = (words & np.uint32(0xFFFFE000)).view("f4")
    else:
        values = bf16_to_f32(words) if kind == "bf16" else words.view("f2").astype("f4")
    return values, number, at, leaders


def _note_read(M, i, at, leaders, size: int) -> None:  # noqa: N803
    if not M.options.check_races:
        return
    races = M.races
    cells = (at.reshape(len(leaders), -1)) // races.granule
    step = max(1, races.granule // size)
    if step > 1:
        cells = np.sort(cells, 1)[:, ::step]
    elif size > races.granule:
        count = size // races.granule
        cells = (cells[..., None] + np.arange(count)).reshape(len(leaders), -1)
    races.async_read(i, cells, leaders)
    products = products_of(M)
    products.under_way.append((i, leaders, products.committed[leaders], cells))


def product(M, i, kind, n, k, first, second, acc, scale, signs, transposes, s, m):  # noqa: N803
    """[warps, n / 2, 32]: the registers of D."""
    _whole_warps(M, i, s, m)
    warps = M.all_warps if s is None else s
    size = 4 if kind == "tf32" else 2
    M.issued[warps] += 1  # that all four warps of a group do, is seen when the kernel ends
    b, number, at, leaders = _matrices(M, i, second, kind, n, k, transposes[1], warps)
    _note_read(M, i, at, leaders, size)
    if isinstance(first, list):
        a = a_matrix(first, kind, len(warps))
    else:
        values, which, at, leaders = _matrices(M, i, first, kind, 64, k, transposes[0], warps)
        _note_read(M, i, at, leaders, size)
        rows = warps % M.warps_per_cta % 4
        a = values.reshape(-1, 4, 16, k)[which, rows]
    result = np.matmul(a, b.transpose(0, 2, 1)[number])
    if signs[0] * signs[1] < 0:
        result = -result
    # rows g + 8 * half, columns 8 * j + 2 * t + one -> register 4 * j + 2 * half + one
    result = result.reshape(len(warps), 2, 8, n // 8, 4, 2).transpose(0, 3, 1, 5, 2, 4)
    result = result.reshape(len(warps), n // 2, 32)
    if not scale.any():
        return result
    c = np.stack([full(x, len(warps)) for x in acc], 1)
    return np.where(scale[:, None], c + result, result) if not scale.all() else c + result


def commit(M, s) -> None:  # noqa: N803
    products_of(M).committed[M.all_warps if s is None else s] += 1


def wait(M, keep: int, s) -> None:  # noqa: N803
    """All but the newest `keep` groups of products are done."""
    warps = M.all_warps if s is None else s
    products, races = products_of(M), M.races
    races.tick()
    least = np.full(M.warps, -1)
    least[warps] = products.committed[warps] - keep
    rest = []
    for i, leaders, numbers, cells in products.under_way:
        over = numbers < least[leaders]
        if over.any():
            races.async_read_done(cells[over], leaders[over])
        left = ~over
        if left.any():
            rest.append((i, leaders[left], numbers[left], cells[left]))
    products.under_way = rest
    # the warps of a group that wait together have seen each other's products
    first = warps - warps % M.warps_per_cta % 4
    for n in range(4):
        theirs = np.minimum(first + n, M.warps - 1)
        mine = warps[least[theirs] >= 0]
        agents = races.first_product + races.own[theirs[least[theirs] >= 0]]
        used = races.used[agents]
        races.seen[mine[used], agents[used]] = races.now
    races.tick()
    races.update(warps)
