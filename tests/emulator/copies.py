"""Asynchronous copies: cp.async by lanes, and bulk copies of tensors by their maps.

When a copy lands is the option `landing`: at once, when it is waited for, or drawn.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .addresses import FIRST, PARAM_WINDOW, SHARED_WINDOW, WHOLE
from .global_races import global_read
from .mbarriers import Barriers
from .registry import opcode, unknown


@dataclasses.dataclass
class Copy:
    """cp.async of some lanes: where it goes, and to which group of each warp it belongs."""

    instruction: object
    group: np.ndarray  # of every lane's warp
    cells: np.ndarray
    warps: np.ndarray
    lanes: np.ndarray
    target: np.ndarray  # bytes, from the start of the batch's shared memory
    source: np.ndarray
    size: int
    filled: np.ndarray  # bytes to read; zeros beyond
    landed: bool


class Copies:
    """Copies in flight, and the number of groups that each warp has committed."""

    def __init__(self, machine):
        self.machine = machine
        self.committed = np.zeros(machine.warps, int)
        self.under_way: list[Copy] = []
        self.bulk: list = []

    def start(self, copy: Copy) -> None:
        landing = self.machine.options.landing
        if landing == "early" or (landing == "drawn" and self.machine.draw.random() < 0.5):
            self.land(copy, np.ones(len(copy.warps), bool))
            copy.landed = True
        self.under_way.append(copy)

    def land(self, copy: Copy, some) -> None:
        target, source, filled = copy.target[some], copy.source[some], copy.filled[some]
        words = copy.size // 4
        data = np.zeros((len(target), words), "u4")
        for n in range(words):
            read = filled > 4 * n
            data[read, n] = WHOLE[4][(source[read] - FIRST) // 4 + n]
        self.machine.words[4][(target // 4)[:, None] + np.arange(words)] = data

    def finish(self, i, warps, keep: int | None) -> None:
        """Warps wait until all but their newest `keep` groups have landed; None: for all."""
        least = np.full(self.machine.warps, -1)
        least[warps] = (1 << 40) if keep is None else self.committed[warps] - keep
        rest = []
        for copy in self.under_way:
            over = copy.group < least[copy.warps]
            if over.any():
                if not copy.landed:
                    self.land(copy, over)
                if self.machine.options.check_races:
                    races = self.machine.races
                    races.land(
                        copy.instruction, copy.cells[over], copy.warps[over], copy.lanes[over]
                    )
                copy = _without(copy, over)
            if len(copy.warps):
                rest.append(copy)
        self.under_way = rest


def _without(copy: Copy, over) -> Copy:
    left = ~over
    names = ("group", "cells", "warps", "lanes", "target", "source", "filled")
    return dataclasses.replace(copy, **{n: getattr(copy, n)[left] for n in names})


def copies_of(M) -> Copies:  # noqa: N803
    if M.copies is None:
        M.copies = Copies(M)
    return M.copies


@opcode("cp")
def emit_cp(c, i):
    if not i.has("async") or i.has("reduce"):
        raise unknown(i)
    if i.has("bulk"):
        return _bulk(c, i)
    if i.has("commit_group"):
        c.do(c.call(commit, "M", "s", c.mask(i)))
    elif i.has("wait_group"):
        c.do(c.call(wait, "M", c.thing(i), i.operands[0].value, "s", c.mask(i)))
    elif i.has("wait_all"):
        c.do(c.call(wait, "M", c.thing(i), None, "s", c.mask(i)))
    elif i.has("mbarrier"):
        raise unknown(i)
    else:
        size = i.operands[2].value
        filled = c.read(i.operands[3], "u32") if len(i.operands) > 3 else size
        call = c.call(copy_lanes, "M", c.thing(i), c.address(i.operands[0]),
                      c.address(i.operands[1]), size, filled, "s", c.mask(i))  # fmt: skip
        c.do(call)


def copy_lanes(M, i, target, source, size: int, filled, s, m) -> None:  # noqa: N803
    """cp.async: `size` bytes a lane, of which `filled` are read."""
    warps = M.all_warps if s is None else s
    shape = (len(warps), 32)
    some = np.ones(shape, bool) if m is None else np.broadcast_to(m, shape)
    if not some.any():
        return
    target, source = np.broadcast_to(target, shape), np.broadcast_to(source, shape)
    filled = np.broadcast_to(np.asarray(filled).astype(int), shape)
    reading = some & (filled > 0)
    if reading.any():
        region = M.check_global(i, source, size, s, reading)
        if M.options.check_races:
            global_read(M, i, region, source, size, s, reading)
    at = M.shared_at(i, target, size, s, some)
    rows, lanes = np.nonzero(some)
    cells = np.zeros((len(rows), 0), int)
    if M.options.check_races:
        cells, _, _ = M.races.write(i, at, size, s, some, in_flight=True)
    copies = copies_of(M)
    copies.start(Copy(i, copies.committed[warps[rows]], cells, warps[rows], lanes, at[rows, lanes],
                      source[rows, lanes], size, filled[rows, lanes], False))  # fmt: skip


def _running(M, s, m) -> np.ndarray:  # noqa: N803
    warps = M.all_warps if s is None else s
    if m is None:
        return warps
    return warps[np.broadcast_to(m, (len(warps), m.shape[1])).any(1)]


def commit(M, s, m) -> None:  # noqa: N803
    copies_of(M).committed[_running(M, s, m)] += 1


def wait(M, i, keep: int | None, s, m) -> None:  # noqa: N803
    M.races.tick()
    copies_of(M).finish(i, _running(M, s, m), keep)


# bulk copies of tensors

# 128 bytes of our own: the ISA leaves a tensor map's form open
MAP = np.dtype([
    ("address", "u8"), ("rank", "u4"), ("element", "u4"), ("swizzle", "u4"), ("fill", "u4"),
    ("dims", "u4", 5), ("strides", "u8", 4), ("box", "u4", 5), ("steps", "u4", 5),
    ("rest", "u1", 12),
])  # fmt: skip
assert MAP.itemsize == 128
ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 2}  # ISA's codes
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes


def swizzle(address: np.ndarray, width: int) -> np.ndarray:
    """Bits 4 and up, xor bits 7 and up: one, two or three of them for 32, 64 or 128 bytes."""
    if not width:
        return address
    return address ^ ((address >> 7 & (width // 16 - 1)) << 4)


_FIELDS = {"global_address": "address", "rank": "rank", "box_dim": "box", "global_dim": "dims",
           "global_stride": "strides", "element_stride": "steps", "elemtype": "element",
           "swizzle_mode": "swizzle", "fill_mode": "fill", "interleave_layout": None}  # fmt: skip


@opcode("tensormap")
def emit_tensormap(c, i):
    if i.has("replace"):
        name = _FIELDS[i.parts[3]]
        *place, value = i.operands[1:]
        kind = i.type if i.type in ("b64", "b32") else "b32"
        place = place[0].value if place else None
        call = c.call(replace_field, "M", c.thing(i), repr(name), place, c.address(i.operands[0]),
                      c.read(value, kind), "s", c.mask(i))  # fmt: skip
        c.do(call)
    elif i.has("cp_fenceproxy"):
        call = c.call(copy_map, "M", c.thing(i), c.address(i.operands[0]), c.address(i.operands[1]),
                      "s", c.mask(i))  # fmt: skip
        c.do(call)
    else:
        raise unknown(i)


def _shared_address(address):
    return np.where(address >= SHARED_WINDOW, address - SHARED_WINDOW, address)


def _map_at(M, i, address: int, warp: int) -> np.ndarray:  # noqa: N803
    start = int(M.cta_of[warp]) * M.shared_bytes + address
    return M.shared[start : start + 128].view(MAP)


def replace_field(M, i, name: str | None, place, address, value, s, m) -> None:  # noqa: N803
    warps = M.all_warps if s is None else s
    shape = (len(warps), 32)
    some = np.ones(shape, bool) if m is None else np.broadcast_to(m, shape)
    address = np.broadcast_to(_shared_address(address), shape)
    if not some.any():
        return
    at = M.shared_at(i, address, 128, s, some)
    if M.options.check_races:
        M.races.write(i, at, 128, s, some)
    value = np.broadcast_to(value, shape)
    for row, lane in np.argwhere(some):
        entry = _map_at(M, i, int(address[row, lane]), int(warps[row]))[0]
        number = int(value[row, lane])
        if name == "rank":
            entry["rank"] = number + 1
        elif name in ("box", "dims", "strides", "steps"):
            entry[name][place] = number
        elif name is not None:
            entry[name] = number
        elif number:
            raise unknown(i)


def copy_map(M, i, target, source, s, m) -> None:  # noqa: N803
    """A map from shared to global memory, by a whole warp."""
    warps = M.all_warps if s is None else s
    shape = (len(warps), 32)
    some = np.ones(shape, bool) if m is None else np.broadcast_to(m, shape)
    source = np.broadcast_to(_shared_address(source), shape)
    target = np.broadcast_to(target, shape)
    for row in np.nonzero(some.any(1))[0]:
        one = np.zeros((1, 32), bool)
        one[0, 0] = True
        warp = warps[row : row + 1]
        if M.options.check_races:
            at = M.shared_at(i, source[row : row + 1], 128, warp, one)
            M.races.read(i, at, 128, warp, one)
        M.check_global(i, target[row : row + 1], 128, warp, one)
        data = _map_at(M, i, int(source[row, 0]), int(warps[row])).view("u1")
        start = int(target[row, 0]) - FIRST
        WHOLE[1][start : start + 128] = data


@dataclasses.dataclass
class BulkCopy:
    """A box of a tensor on its way into shared memory."""

    cta: int
    slot: int
    at: np.ndarray  # bytes of the CTA's shared memory, one an element
    size: int
    addresses: np.ndarray
    inside: np.ndarray
    instruction: object
    cells: np.ndarray

    def land(self, M) -> None:  # noqa: N803
        words = M.words[self.size]
        start = self.cta * M.shared_bytes
        data = np.zeros(len(self.at), words.dtype)
        data[self.inside] = WHOLE[self.size][(self.addresses[self.inside] - FIRST) // self.size]
        words[(start + self.at) // self.size] = data
        M.races.tick()
        if M.options.check_races:
            M.races.async_write_done(self.instruction, self.cells, self.slot)
        M.barriers.landed(self.cta, self.slot, len(self.at) * self.size)


def _bulk(c, i) -> None:
    if i.has("bulk_group") or i.has("commit_group") or i.has("wait_group"):
        from .stores import emit_store

        return emit_store(c, i)
    if not (i.has("tensor") and i.has("mbarrier::complete_tx::bytes")) or i.has(
        "multicast::cluster"
    ):
        raise unknown(i)
    target, source, barrier = i.operands[:3]
    coordinates = ", ".join(c.read(x, "s32") for x in source.coordinates)
    call = c.call(copy_box, "M", c.thing(i), c.address(target), c.address(source),
                  f"[{coordinates}]", c.address(barrier), "s", c.mask(i))  # fmt: skip
    c.do(call)


def read_map(M, i, address: int, warp: int, lane: int):  # noqa: N803

    if address >= PARAM_WINDOW:
        start = address - PARAM_WINDOW
        return M.params[start : start + 128].copy().view(MAP)[0]
    if address % 64 or M.memory.find(address) is None:
        M.report(i, "a tensor map out of bounds or misaligned", warp, lane, address)
    start = address - FIRST
    return WHOLE[1][start : start + 128].copy().view(MAP)[0]


def copy_box(M, i, target, source, coordinates: list, barrier, s, m) -> None:  # noqa: N803
    warps = M.all_warps if s is None else s
    shape = (len(warps), 32)
    some = np.ones(shape, bool) if m is None else np.broadcast_to(m, shape)
    target, source, barrier = (np.broadcast_to(x, shape) for x in (target, source, barrier))
    coordinates = [np.broadcast_to(x, shape) for x in coordinates]
    for row, lane in np.argwhere(some):
        warp, lane = int(warps[row]), int(lane)
        tensor = read_map(M, i, int(source[row, lane]), warp, lane)
        start = [int(x[row, lane]) for x in coordinates]
        place = int(target[row, lane])
        _start_box(M, i, tensor, start, place, int(barrier[row, lane]), warp, lane)


def box_addresses(tensor, start: list[int]):
    """(address of every element of a box, whether it is inside the tensor), innermost first."""
    rank, size = int(tensor["rank"]), ELEMENT_BYTES[int(tensor["element"])]
    address = np.full((1,), int(tensor["address"]), "i8")
    inside = np.ones((1,), bool)
    for axis in reversed(range(rank)):
        step = size if axis == 0 else int(tensor["strides"][axis - 1])
        at = start[axis] + np.arange(int(tensor["box"][axis]))
        ok = (at >= 0) & (at < int(tensor["dims"][axis]))
        address = (address[:, None] + at * step).ravel()
        inside = (inside[:, None] & ok).ravel()
    return address, inside


def box_places(tensor, place: int) -> np.ndarray:
    """Bytes of shared memory where the elements of a box go, swizzled."""
    rank, size = int(tensor["rank"]), ELEMENT_BYTES[int(tensor["element"])]
    count = int(np.prod(tensor["box"][:rank], dtype=int))
    return swizzle(place + np.arange(count) * size, SWIZZLES[int(tensor["swizzle"])])


def _start_box(M, i, tensor, start, place: int, barrier: int, warp: int, lane: int) -> None:  # noqa: N803
    if M.barriers is None:
        M.barriers = Barriers(M)
    slot = M.barriers.slot(i, barrier, warp, lane)
    size = ELEMENT_BYTES[int(tensor["element"])]
    width = SWIZZLES[int(tensor["swizzle"])]
    row = int(tensor["box"][0]) * size
    if place % 128 or (width and row > width):
        M.report(i, "a box that its swizzle or its place does not allow", warp, lane, place)
    addresses, inside = box_addresses(tensor, start)
    at = box_places(tensor, place)
    if at.max() + size > M.shared_limit:
        M.report(i, "out of bounds: a box in shared memory", warp, lane, place)
    if inside.any():
        low, high = int(addresses[inside].min()), int(addresses[inside].max())
        region = M.memory.find(low)
        if region is None or high + size > region.end:
            M.report(i, "out of bounds: a box of global memory", warp, lane, low)
    cta = int(M.cta_of[warp])
    cells = np.zeros(0, int)
    if M.options.check_races:
        start = cta * M.shared_bytes
        M.races.async_arrival(i, M.races.cells_of(start + barrier + np.arange(8), 1), warp, lane)
        cells = M.races.cells_of(at + start, size)
        M.races.async_write(i, cells, warp, lane)
    copy = BulkCopy(cta, slot, at, size, addresses, inside, i, cells)
    landing = M.options.landing
    copies = copies_of(M)
    if landing == "early" or (landing == "drawn" and M.draw.random() < 0.5):
        copy.land(M)
    else:
        copies.bulk.append(copy)
