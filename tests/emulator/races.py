"""Order of accesses to memory, and reports of races.

Time is a counter. Every granule of shared memory (the bytes of the kernel's smallest access) knows
its last write and each agent's last read, with time and instruction. An agent is a warp, the matrix
products that it leads, the boxes that it stores, or the copies that complete on one mbarrier.
`seen[w, a]` is the time up to which warp w is ordered after agent a: barriers raise it, and an
access to something later is a race however the warps happened to be scheduled. A copy or a product
in flight has a time that no warp has seen, until it is waited for. `proxied` is the same for reads
by the async proxy: fences raise it.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

IN_FLIGHT = 1 << 30
NEVER = np.int64(IN_FLIGHT - 1)
ALL_LANES = 255


@dataclasses.dataclass(frozen=True)
class Report:
    """One fault: its kind, the access, and what it collides with."""

    kind: str
    kernel: str
    instruction: str
    cta: int
    warp: int
    lane: int
    address: int
    other: str = ""

    def __str__(self) -> str:
        place = f"{self.kernel}: CTA {self.cta}, warp {self.warp}, lane {self.lane}"
        other = f"; with {self.other}" if self.other else ""
        return f"{self.kind}: {place}, address {self.address:#x}, {self.instruction}{other}"


class EmulationError(RuntimeError):
    """Faults that a kernel would have on a GPU; `reports` lists them."""

    def __init__(self, reports: list[Report]):
        self.reports = reports
        lines = [str(r) for r in reports[:10]]
        if len(reports) > 10:
            lines.append(f"and {len(reports) - 10} more")
        super().__init__("\n".join(lines))


@functools.cache
def _all_lanes(warps: int, width: int) -> np.ndarray:
    lanes = np.arange(32) if width == 32 else np.array([ALL_LANES])
    return np.tile(lanes, warps)


class Races:
    """The order of accesses in one batch of CTAs."""

    SLOTS = 32  # mbarriers of a CTA

    def __init__(self, machine):
        self.machine = machine
        self.granule = machine.program.granule["shared"]
        self.per_cta = machine.shared_bytes // self.granule
        warps = machine.warps_per_cta
        self.first_product, self.first_store, self.first_slot = warps, 2 * warps, 3 * warps
        agents = 3 * warps + self.SLOTS
        granules = machine.ctas * self.per_cta
        self.writes = np.zeros(granules, "i8")  # time, instruction, agent, lane
        self.last_read = np.zeros(granules, "i8")  # time, instruction
        self.reads = np.zeros(3 * warps * granules, "i8")
        self.granules = granules
        self.now = 1
        self.seen = np.zeros((machine.warps, agents), "i8")
        self.seen[:, self.first_product :] = NEVER
        self.proxied = self.seen.copy()
        self.used = np.zeros(agents, bool)
        self.own = np.arange(machine.warps) % warps
        self.limit = np.empty(machine.warps, "i8")
        self.proxy_limit = np.empty(machine.warps, "i8")
        self.update(slice(None))

    # time

    def update(self, warps) -> None:
        """Update after a change of what the warps have seen."""
        self.limit[warps] = (self.seen[warps].min(1) + 1) << 32
        self.proxy_limit[warps] = (self.proxied[warps].min(1) + 1) << 32

    def tick(self) -> None:
        self.now += 1

    def use(self, agent: int) -> None:
        """From now on, nobody has seen what an agent does."""
        if not self.used[agent]:
            self.used[agent] = True
            self.seen[:, agent] = self.proxied[:, agent] = self.now - 1
            self.update(slice(None))

    def whole_barrier(self, warps: np.ndarray) -> None:
        """Warps, rows of (CTA, warp), have met: each has seen what any had."""
        shape = warps.shape
        both = self.seen[warps].max(1, keepdims=True)
        self.seen[warps] = both
        members = self.own[warps]  # [CTA, warp]
        ctas = np.arange(shape[0])[:, None, None]
        seen = self.seen[warps]
        seen[ctas, np.arange(shape[1])[None, :, None], members[:, None, :]] = self.now
        self.seen[warps] = seen
        self.proxied[warps] = self.proxied[warps].max(1, keepdims=True)
        self.tick()
        self.update(warps.ravel())

    def warp_barrier(self, warps: np.ndarray) -> None:
        self.seen[warps, self.own[warps]] = self.now
        self.tick()
        self.update(warps)

    def proxy_fence(self, warps: np.ndarray) -> None:
        """Let the async proxy see all that the warps have done and seen."""
        self.proxied[warps] = np.maximum(self.proxied[warps], self.seen[warps])
        self.proxied[warps, self.own[warps]] = self.now
        self.tick()
        self.update(warps)

    # accesses to shared memory; `at` holds bytes from the start of the batch's shared memory

    def _lanes(self, at, size: int, chosen, mask):
        """(granules, warps, lanes) [n, granules of an access] of the lanes that take part."""
        machine = self.machine
        warps = machine.all_warps if chosen is None else chosen
        if mask is not None:
            rows, lanes = np.nonzero(np.broadcast_to(mask, (len(warps), max(at.shape[1], mask.shape[1]))))  # fmt: skip # noqa: E501
            cells = at[rows, lanes if at.shape[1] > 1 else 0] // self.granule
            warps = warps[rows]
            if mask.shape[1] == 1 and at.shape[1] == 1:
                lanes = np.full(len(rows), ALL_LANES)
        else:
            cells = (at // self.granule).ravel()
            lanes = _all_lanes(*at.shape)
            warps = np.repeat(warps, at.shape[1])
        count = size // self.granule
        if count > 1:
            cells = cells[:, None] + np.arange(count)
        else:
            cells = cells[:, None]
        return cells, warps, lanes

    def read(self, i, at, size: int, chosen, mask) -> None:
        cells, warps, lanes = self._lanes(at, size, chosen, mask)
        if not len(warps):
            return
        last = self.writes[cells]
        bad = (last - 1).view("u8") >= (self.limit[warps][:, None] - 1).view("u8")
        if bad.any():
            self._check_writes(i, "read", bad, last, cells, warps, lanes, self.seen)
        self._note_reads(i, cells, self.own[warps])

    def _note_reads(self, i, cells, agents) -> None:
        stamp = self.now << 16 | i.index
        self.reads[cells + (agents * self.granules)[:, None]] = stamp
        self.last_read[cells] = stamp

    def write(self, i, at, size: int, chosen, mask, in_flight: bool = False, changes=None):
        """Returns the granules, warps and lanes of the write. `changes()` says which lanes change
        what is there: to write the same again is no race.
        """
        cells, warps, lanes = self._lanes(at, size, chosen, mask)
        if not len(warps):
            return cells, warps, lanes
        self._check_write(i, cells, warps, lanes, self.seen, self.limit, changes)
        stamp = (IN_FLIGHT if in_flight else self.now) << 32 | i.index << 16
        self.writes[cells] = (stamp | self.own[warps] << 8 | lanes)[:, None]
        return cells, warps, lanes

    def _check_write(self, i, cells, warps, lanes, seen, limits, changes=None) -> None:
        last = self.writes[cells]
        bad = last >= limits[warps][:, None]
        if bad.any() and changes is not None:
            bad &= changes()[:, None] | (last >> 32 == IN_FLIGHT)
        if bad.any():
            self._check_writes(i, "write", bad, last, cells, warps, lanes, seen)
        bad = self.last_read[cells] >= (self.limit[warps] >> 16)[:, None]
        if bad.any():
            self._check_reads(i, bad, cells, warps, lanes)

    def _check_writes(self, i, what: str, bad, last, cells, warps, lanes, seen) -> None:
        """Accesses after writes that may not be ordered."""
        n, k = np.nonzero(bad)
        last, warp, lane = last[n, k], warps[n], lanes[n]
        time, agent, writer = last >> 32, last >> 8 & 255, last & 255
        own = (agent == self.own[warp]) & ((writer == lane) | (writer == ALL_LANES))
        fault = time > seen[warp, agent]
        if seen is self.seen:
            fault &= ~(own & (time < IN_FLIGHT))
        fault &= last != 0
        if what != "write":
            fault |= last == 0
        if not fault.any():
            return
        j = np.nonzero(fault)[0]
        first = np.unique(last[j] >> 16, return_index=True)[1]
        for at in j[first][:4]:
            cell, w = cells[n[at], k[at]], int(warp[at])
            entry = int(last[at])
            if entry == 0:
                self._report(i, "uninitialised shared memory", w, int(lane[at]), cell, "")
                continue
            other = f"the write by {self._agent(entry >> 8 & 255, entry & 255)}, "
            other += str(self.machine.program.instructions[entry >> 16 & 0xFFFF])
            kind = f"race: {what} after write"
            if entry >> 32 == IN_FLIGHT:
                kind += " in flight"
            elif seen is self.proxied and entry >> 32 <= self.seen[w, entry >> 8 & 255]:
                kind = f"no proxy fence: async {what} after write"
            self._report(i, kind, w, int(lane[at]), cell, other)

    def _check_reads(self, i, bad, cells, warps, lanes) -> None:
        """Writes after reads that may not be ordered."""
        n, k = np.nonzero(bad)
        cell, warp = cells[n, k], warps[n]
        agents = self.first_slot
        stamps = self.reads[cell[:, None] + np.arange(agents) * self.granules]
        times = stamps >> 16
        fault = times > self.seen[warp, :agents]
        fault[np.arange(len(n)), self.own[warp]] = False  # a warp's own reads have returned
        if not fault.any():
            return
        j, agent = np.nonzero(fault)
        first = np.unique(stamps[j, agent] & 0xFFFF, return_index=True)[1]
        for at in first[:4]:
            row = j[at]
            stamp = int(stamps[row, agent[at]])
            other = f"the read by {self._agent(int(agent[at]), ALL_LANES)}, "
            other += str(self.machine.program.instructions[stamp & 0xFFFF])
            kind = "race: write after read" + (" in flight" if stamp >> 16 == IN_FLIGHT else "")
            self._report(i, kind, int(warp[row]), int(lanes[n[row]]), cell[row], other)

    def _agent(self, agent: int, lane: int) -> str:
        if agent < self.first_product:
            return f"warp {agent}" + ("" if lane == ALL_LANES else f", lane {lane}")
        if agent < self.first_store:
            return f"the products of warp {agent - self.first_product}'s group"
        if agent < self.first_slot:
            return f"the boxes that warp {agent - self.first_store} stores"
        return "the copies of an mbarrier"

    def _report(self, i, kind: str, warp: int, lane: int, cell: int, other: str) -> None:
        address = int(cell) % self.per_cta * self.granule
        self.machine.report(i, kind, warp, lane, address, other)

    def cells_of(self, at, size: int) -> np.ndarray:
        """Granules of elements of `size` bytes, each once."""
        if size > self.granule:
            at = at[:, None] + np.arange(0, size, self.granule)
        return np.unique(at // self.granule)

    # what is in flight

    def land(self, i, cells, warps, lanes) -> None:
        """Writes in flight have been waited for by the warps that started them."""
        mine = self.writes[cells] >> 32 == IN_FLIGHT
        stamp = self.now << 32 | i.index << 16 | self.own[warps] << 8 | lanes
        self.writes[cells[mine]] = np.broadcast_to(stamp[:, None], cells.shape)[mine]

    def async_read(self, i, cells, warps) -> None:
        """Products read granules [n, k], for warps [n] that lead their warp groups."""
        self._read_in_flight(i, cells, warps, self.first_product + self.own[warps])

    def _read_in_flight(self, i, cells, warps, agents) -> None:
        last = self.writes[cells]
        bad = (last - 1).view("u8") >= (self.proxy_limit[warps][:, None] - 1).view("u8")
        if bad.any():
            lanes = np.full(len(warps), ALL_LANES)
            self._check_writes(i, "read", bad, last, cells, warps, lanes, self.proxied)
        for agent in np.unique(agents):
            self.use(int(agent))
        stamp = IN_FLIGHT << 16 | i.index
        self.reads[cells + (agents * self.granules)[:, None]] = stamp
        self.last_read[cells] = stamp

    def store_read(self, i, cells, warp: int) -> None:
        """A box that a warp stores is read from granules, until `store_done`."""
        warps = np.array([warp])
        self._read_in_flight(i, cells[None, :], warps, self.first_store + self.own[warps])

    def store_done(self, cells, warp: int) -> None:
        agent = self.first_store + int(self.own[warp])
        self._read_done(cells[None, :], np.array([agent]))
        self.seen[warp, agent] = self.now
        self.tick()
        self.update(np.array([warp]))

    def async_read_done(self, cells, warps) -> None:
        self._read_done(cells, self.first_product + self.own[warps])

    def _read_done(self, cells, agents) -> None:
        at = cells + (agents * self.granules)[:, None]
        stamps = self.reads[at]
        done = self.now << 16 | stamps & 0xFFFF
        self.reads[at] = np.where(stamps >> 16 == IN_FLIGHT, done, stamps)
        stamps = self.last_read[cells]
        done = self.now << 16 | stamps & 0xFFFF
        self.last_read[cells] = np.where(stamps >> 16 == IN_FLIGHT, done, stamps)

    def async_write(self, i, cells, warp: int, lane: int) -> None:
        """A bulk copy into granules, started by a lane of a warp."""
        cells = cells[None, :]
        warps, lanes = np.array([warp]), np.array([lane])
        self._check_write(i, cells, warps, lanes, self.proxied, self.proxy_limit)
        self.writes[cells] = IN_FLIGHT << 32 | i.index << 16 | self.own[warp] << 8 | lane

    def async_arrival(self, i, cells, warp: int, lane: int) -> None:
        """A bulk copy will complete on an mbarrier: the async proxy writes what a thread has
        initialised. Arrivals need no order.
        """
        cells, warps, lanes = cells[None, :], np.array([warp]), np.array([lane])
        last = self.writes[cells]
        bad = last >= self.proxy_limit[warps][:, None]
        if bad.any():
            self._check_writes(i, "write", bad, last, cells, warps, lanes, self.proxied)

    def async_write_done(self, i, cells, slot: int) -> None:
        agent = self.first_slot + slot
        self.use(agent)
        self.writes[cells] = self.now << 32 | i.index << 16 | agent << 8 | ALL_LANES
