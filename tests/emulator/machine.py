"""The state of a launch: registers, global and shared memory, and what went wrong.

Global memory is that of CPU tensors, at their own addresses, in ranges that a launch names. CTAs
run in batches, side by side as far as they take the same branches.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses

import numpy as np

from .program import Program
from .races import EmulationError, Races, Report

LANES_AT_ONCE = 8192
BYTES_AT_ONCE = 48 << 20  # of shared memory, its shadow is ten times that


@dataclasses.dataclass
class Region:
    """A range of global memory, and who touched its granules in this launch."""

    start: int
    end: int
    writer: np.ndarray | None = None  # warp of the launch + 1, ATOMIC below 0
    write: np.ndarray | None = None  # time, instruction
    reader: np.ndarray | None = None
    read: np.ndarray | None = None


class Memory:
    """Ranges of global memory, sorted, merged where they touch."""

    def __init__(self, ranges: list[tuple[int, int]]):
        self.regions: list[Region] = []
        for start, end in sorted(r for r in ranges if r[1] > r[0]):
            if self.regions and start <= self.regions[-1].end:
                self.regions[-1].end = max(end, self.regions[-1].end)
            else:
                self.regions.append(Region(start, end))
        self.starts = [r.start for r in self.regions]

    def nearest(self, address: int) -> str:
        """Description of an address's distance to the nearest range."""
        if not self.regions:
            return "no tensor"
        region = min(self.regions, key=lambda r: max(r.start - address, address - r.end + 1))
        where = (f"{region.start - address} bytes before" if address < region.start
                 else f"{address - region.end} bytes after")  # fmt: skip
        return f"{where} a tensor of {region.end - region.start} bytes"

    def find(self, address: int) -> Region | None:
        n = bisect.bisect_right(self.starts, address) - 1
        if n >= 0 and address < self.regions[n].end:
            return self.regions[n]
        return None


@dataclasses.dataclass
class Options:
    """Options of a launch. `order`: "together", "ahead" (one warp far ahead) or "around" (round
    robin, a block each). `landing`: when copies land: "early", "late" or "drawn".
    """

    order: str = "together"
    landing: str = "early"
    seed: int = 0
    check_races: bool = True
    count_conflicts: bool = False  # of banks of shared memory
    most_reports: int = 1
    same_bits: bool = False  # no rounding between what lanes store to one address
    only_noted: tuple[str, ...] = ()  # kinds of faults, by their beginnings, that end no launch


class Machine:
    """One batch of CTAs of a launch."""

    def __init__(self, program: Program, memory: Memory, params: bytes, grid, block: int,
                 dynamic_shared: int, first_cta: int, ctas: int, options: Options,
                 done: Launch):  # fmt: skip
        self.program, self.memory, self.options = program, memory, options
        self.counts, self.conflicts, self.noted = done.counts, done.conflicts, done.noted
        self.grid, self.threads = grid, block
        self.first_cta, self.ctas = first_cta, ctas
        self.warps_per_cta = -(-block // 32)
        self.warps = ctas * self.warps_per_cta
        self.all_warps = np.arange(self.warps)
        self.cta_of = self.all_warps // self.warps_per_cta
        size = program.static_shared + dynamic_shared
        self.shared_limit = size
        self.shared_bytes = -(-max(size, 16) // 1024) * 1024
        self.shared = np.zeros(ctas * self.shared_bytes, "u1")
        self.shared[:] = 0xFF  # NaN in every type, where nobody wrote
        self.words = {n: self.shared.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.shared_base = (self.cta_of * self.shared_bytes)[:, None]
        self.params = np.frombuffer(params + bytes(-len(params) % 8 + 8), "u1")
        self.registers = [np.zeros((1, 1), s) for s in program.sizes]
        self.races = Races(self)
        self.reports: list[Report] = []
        self.draw = np.random.default_rng(options.seed)
        self.copies = None  # made by copies.py
        self.stores = None  # made by stores.py
        self.last_region: dict[int, Region] = {}
        self.progress = False
        self.dynamic_shared = dynamic_shared
        self.barriers = None  # made by barriers.py
        self.products = None  # made by warpgroup.py
        self.issued = np.zeros(self.warps, int)  # products of warp groups

    # faults

    def report(self, i, kind: str, warp: int, lane: int, address: int, other: str = "") -> None:
        """Note a fault; the launch ends when there are enough of them."""
        if kind.startswith(self.options.only_noted or ("\0",)):
            self.noted[kind] += 1
            return
        cta = self.first_cta + int(self.cta_of[warp])
        self.reports.append(
            Report(kind, self.program.kernel.name, str(i), cta, warp % self.warps_per_cta, lane,
                   int(address), other)
        )  # fmt: skip
        if len(self.reports) >= self.options.most_reports:
            raise EmulationError(self.reports)

    def report_lanes(self, i, kind: str, bad, addresses, chosen, other: str = "") -> None:
        row, lane = np.argwhere(bad)[0]
        warps = self.all_warps if chosen is None else chosen
        addresses = np.broadcast_to(addresses, bad.shape)
        self.report(i, kind, int(warps[row % len(warps)]), int(lane), addresses[row, lane], other)

    # special registers

    def special(self, name: str, chosen) -> np.ndarray:
        cta = (self.first_cta + self.cta_of)[:, None]
        if chosen is not None:
            cta = cta[chosen]
        lane = np.arange(32)[None, :]
        warps = self.all_warps if chosen is None else chosen
        kind, _, axis = name.partition(".")
        axis = "xyz".find(axis or "x")
        if kind == "%tid":
            if axis:
                return np.zeros((1, 1), "u4")
            return ((warps % self.warps_per_cta)[:, None] * 32 + lane).astype("u4")
        if kind == "%ntid":
            return np.array([[self.threads if axis == 0 else 1]], "u4")
        if kind == "%nctaid":
            return np.array([[self.grid[axis]]], "u4")
        if kind == "%ctaid":
            step = int(np.prod(self.grid[:axis], dtype=int))
            return (cta // step % self.grid[axis]).astype("u4")
        if kind == "%laneid":
            return lane.astype("u4")
        if kind == "%warpid":
            return (warps % self.warps_per_cta)[:, None].astype("u4")
        if kind == "%dynamic_smem_size":
            return np.array([[self.dynamic_shared]], "u4")
        raise NotImplementedError(f"special register {name}")

    # global memory

    def check_global(self, i, address, size: int, chosen, mask) -> Region | None:
        """Bounds and alignment of the lanes that take part. Returns their region, if it is one."""
        live = address
        if mask is not None:
            shape = _shape(address, mask)
            live = np.broadcast_to(address, shape)[np.broadcast_to(mask, shape)]
        if not live.size:
            return None
        low, high = int(live.min()), int(live.max()) + size
        if size > 1 and (live & (size - 1)).any():
            bad = (address & (size - 1) != 0) & (True if mask is None else mask)
            self.report_lanes(i, f"misaligned access of {size} bytes", bad, address, chosen)
        region = self.last_region.get(i.index)
        if region is None or low < region.start or high > region.end:
            region = self.memory.find(low)
            if region is None or high > region.end:
                return self._several_regions(i, address, size, chosen, mask)
            self.last_region[i.index] = region
        return region

    def _several_regions(self, i, address, size: int, chosen, mask) -> None:
        shape = _shape(address, mask)
        address = np.broadcast_to(address, shape)
        live = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
        for row, lane in np.argwhere(live):
            at = int(address[row, lane])
            region = self.memory.find(at)
            if region is None or at + size > region.end:
                bad = np.zeros(shape, bool)
                bad[row, lane] = True
                kind = f"out of bounds: {size} bytes of global memory"
                self.report_lanes(i, kind, bad, address, chosen, self.memory.nearest(at))
        return None

    # shared memory

    def shared_at(self, i, address, size: int, chosen, mask) -> np.ndarray:
        """Bytes from the start of the batch's shared memory; lanes off the mask get 0."""
        bad = (address < 0) | (address + size > self.shared_limit)
        if size > 1:
            bad |= address & (size - 1) != 0
        if bad.any():
            if mask is not None:
                bad = bad & mask
            if bad.any():
                row, lane = np.argwhere(bad)[0]
                at = int(np.broadcast_to(address, bad.shape)[row, lane])
                kind = "misaligned access" if at + size <= self.shared_limit else "out of bounds"
                self.report_lanes(i, f"{kind}: {size} bytes of shared memory", bad, address, chosen)
            address = np.where(mask, address, 0)
        if self.options.count_conflicts:
            self.conflicts[i.index] += bank_conflicts(address, size, mask)
        base = self.shared_base if chosen is None else self.shared_base[chosen]
        return address + base


def bank_conflicts(address: np.ndarray, size: int, mask) -> int:
    """Passes over shared memory beyond the first, of all warps. A pass serves 32 banks of 4 bytes,
    one word each; accesses of 8 or 16 bytes take half or a quarter of a warp at a time.
    """
    if address.shape[1] == 1:
        return 0
    lanes = 32 * 4 // max(size, 4)
    words = (address // 4)[..., None] + np.arange(max(size // 4, 1))
    if mask is not None:
        words = np.where(np.broadcast_to(mask, address.shape)[..., None], words, -1)
    words = np.sort(words.reshape(-1, lanes * words.shape[2]), 1)
    first = words >= 0
    first[:, 1:] &= words[:, 1:] != words[:, :-1]
    rows = np.arange(len(words))[:, None] * 32 + words % 32
    counts = np.bincount(rows[first], minlength=32 * len(words)).reshape(-1, 32)
    return int(np.maximum(counts.max(1) - 1, 0).sum())


def _shape(address, mask):
    return np.broadcast_shapes(address.shape, mask.shape) if mask is not None else address.shape


@dataclasses.dataclass
class Launch:
    """Record of a launch, with its counts."""

    kernel: str
    counts: collections.Counter  # warps that ran each block
    conflicts: collections.Counter  # of banks, by instruction, where they are counted
    noted: collections.Counter  # faults that are only noted
    steps: int = 0


def launch(program: Program, grid, block: int, params: bytes, ranges, dynamic_shared: int = 0,
           options: Options | None = None) -> Launch:  # fmt: skip
    """Run all CTAs of a grid. Raises EmulationError with reports of what went wrong."""
    from .scheduler import Scheduler

    options = options or Options()
    memory = Memory(ranges)
    total = int(np.prod(grid, dtype=int))
    bytes_each = program.static_shared + dynamic_shared + 1024
    warps = -(-block // 32)
    at_once = max(1, min(LANES_AT_ONCE // (32 * warps), BYTES_AT_ONCE // bytes_each, total))
    done = Launch(program.kernel.name, *(collections.Counter() for _ in range(3)))
    with np.errstate(all="ignore"):
        for first in range(0, total, at_once):
            ctas = min(at_once, total - first)
            machine = Machine(program, memory, params, grid, block, dynamic_shared, first, ctas,
                              options, done)  # fmt: skip
            scheduler = Scheduler(machine)
            scheduler.run()
            done.steps += scheduler.steps
            if machine.reports:
                raise EmulationError(machine.reports)
    return done
