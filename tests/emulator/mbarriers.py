"""Barriers that lie in shared memory: arrivals, bytes of copies, and waits for a phase."""

from __future__ import annotations

import numpy as np

from .registry import opcode, unknown


class Barriers:
    """The mbarriers of a batch: by CTA and slot, a slot an address."""

    def __init__(self, machine):
        slots = machine.races.SLOTS
        shape = (machine.ctas, slots)
        self.machine = machine
        self.slots: dict[int, int] = {}
        self.live = np.zeros(shape, bool)
        self.phase = np.zeros(shape, "i8")
        self.expected = np.zeros(shape, "i8")
        self.pending = np.zeros(shape, "i8")
        self.bytes = np.zeros(shape, "i8")
        agents = machine.races.seen.shape[1]
        self.seen = np.zeros((*shape, agents), "i8")  # released so far in this phase, or before
        self.proxied = np.zeros((*shape, agents), "i8")
        self.done_seen = np.zeros((*shape, agents), "i8")  # at the end of the last phase
        self.done_proxied = np.zeros((*shape, agents), "i8")

    def slot(self, i, address: int, warp: int, lane: int, initialise: bool = False) -> int:
        machine = self.machine
        if address % 8 or address < 0 or address + 8 > machine.shared_limit:
            machine.report(i, "mbarrier out of bounds or misaligned", warp, lane, address)
        if initialise and address not in self.slots:
            if len(self.slots) == machine.races.SLOTS:
                raise NotImplementedError("more mbarriers than the emulator keeps")
            self.slots[address] = len(self.slots)
        slot = self.slots.get(address)
        if slot is None or not (initialise or self.live[machine.cta_of[warp], slot]):
            machine.report(i, "mbarrier used before its initialisation", warp, lane, address)
            return 0
        return slot

    def initialise(self, i, address: int, count: int, warp: int, lane: int) -> None:
        slot, cta = self.slot(i, address, warp, lane, True), self.machine.cta_of[warp]
        self.live[cta, slot] = True
        self.phase[cta, slot] = self.bytes[cta, slot] = 0
        self.expected[cta, slot] = self.pending[cta, slot] = count
        for array in (self.seen, self.proxied, self.done_seen, self.done_proxied):
            array[cta, slot] = 0

    def invalidate(self, i, address: int, warp: int, lane: int) -> None:
        self.live[self.machine.cta_of[warp], self.slot(i, address, warp, lane)] = False

    def arrive(
        self, i, address: int, warp: int, lane: int, count: int = 1, expect: int = 0
    ) -> None:
        machine = self.machine
        slot, cta = self.slot(i, address, warp, lane), machine.cta_of[warp]
        races = machine.races
        seen = races.seen[warp].copy()
        seen[races.own[warp]] = races.now
        self.seen[cta, slot] = np.maximum(self.seen[cta, slot], seen)
        self.proxied[cta, slot] = np.maximum(self.proxied[cta, slot], races.proxied[warp])
        races.tick()
        self.bytes[cta, slot] += expect
        self.pending[cta, slot] -= count
        if self.pending[cta, slot] < 0:
            machine.report(i, "more arrivals than an mbarrier counts", warp, lane, address)
        self.settle(cta, slot)

    def landed(self, cta: int, slot: int, nbytes: int) -> None:
        """A copy's bytes are there."""
        races = self.machine.races
        self.seen[cta, slot, races.first_slot + slot] = races.now
        self.proxied[cta, slot, races.first_slot + slot] = races.now
        self.bytes[cta, slot] -= nbytes
        self.settle(cta, slot)

    def settle(self, cta: int, slot: int) -> None:
        if self.pending[cta, slot] == 0 and self.bytes[cta, slot] == 0:
            self.phase[cta, slot] += 1
            self.pending[cta, slot] = self.expected[cta, slot]
            self.done_seen[cta, slot] = self.seen[cta, slot]
            self.done_proxied[cta, slot] = self.proxied[cta, slot]
            self.machine.progress = True

    def acquire(self, warps, slots) -> None:
        races, ctas = self.machine.races, self.machine.cta_of[warps]
        races.seen[warps] = np.maximum(races.seen[warps], self.done_seen[ctas, slots])
        races.proxied[warps] = np.maximum(races.proxied[warps], self.done_proxied[ctas, slots])
        races.tick()
        races.update(warps)


@opcode("mbarrier")
def emit_mbarrier(c, i):
    if i.has("init"):
        count = c.read(i.operands[1], "u32")
        c.do(_each(c, i, i.operands[0], "initialise", count))
    elif i.has("inval"):
        c.do(_each(c, i, i.operands[0], "invalidate"))
    elif i.has("expect_tx") and not i.has("arrive"):
        raise unknown(i)
    elif i.has("arrive") and not i.has("noComplete"):
        last = c.read(i.operands[2], "u32") if len(i.operands) > 2 else None
        if i.has("expect_tx"):
            c.do(_each(c, i, i.operands[1], "expect", last))
        else:
            c.do(_each(c, i, i.operands[1], "arrive", *([last] if last else [])))
    elif i.has("try_wait") or i.has("test_wait"):
        if not i.has("parity") or i.guard:
            raise unknown(i)
        to, address, parity = i.operands[:3]
        call = c.call(
            try_wait, "M", c.thing(i), c.address(address), c.read(parity, "u32"), "s", "m"
        )
        name = c.let(call)
        c.write(to, "pred", name)
        c.result = name
    else:
        raise unknown(i)


def _each(c, i, address, what: str, *value: str) -> str:
    values = value[0] if value else "None"
    return c.call(
        each_lane, "M", c.thing(i), repr(what), c.address(address), values, "s", c.mask(i)
    )


def each_lane(M, i, what: str, address, values, s, m) -> None:  # noqa: N803
    """An operation on mbarriers, lane by lane."""
    warps = M.all_warps if s is None else s
    shape = (len(warps), 32)
    some = np.ones(shape, bool) if m is None else np.broadcast_to(m, shape)
    address = np.broadcast_to(address, shape)
    if values is not None:
        values = np.broadcast_to(values, shape)
    if M.barriers is None:
        M.barriers = Barriers(M)
    barriers = M.barriers
    if what != "initialise":
        for row, lane in np.argwhere(some):
            barriers.slot(i, int(address[row, lane]), int(warps[row]), int(lane))
    if what != "initialise" and M.options.check_races and some.any():
        M.races.read(i, M.shared_at(i, address, 8, s, some), 8, s, some)
    for row, lane in np.argwhere(some):
        at, warp, lane = int(address[row, lane]), int(warps[row]), int(lane)
        number = None if values is None else int(values[row, lane])
        if what == "initialise":
            barriers.initialise(i, at, number, warp, lane)
        elif what == "invalidate":
            barriers.invalidate(i, at, warp, lane)
        elif what == "expect":
            barriers.arrive(i, at, warp, lane, 1, number)
        else:
            barriers.arrive(i, at, warp, lane, 1 if number is None else number)
    if what == "initialise" and M.options.check_races and some.any():
        M.races.write(i, M.shared_at(i, address, 8, s, some), 8, s, some)


def try_wait(M, i, address, parity, s, m) -> np.ndarray:  # noqa: N803
    """Whether the phase of a parity is over, for each lane; what it released is seen then."""
    warps = M.all_warps if s is None else s
    width = max(address.shape[1], parity.shape[1])
    shape = (len(warps), width)
    address = np.broadcast_to(address, shape)
    some = (
        np.ones(shape, bool)
        if m is None
        else np.broadcast_to(m, (len(warps), max(width, m.shape[1])))
    )
    if M.barriers is None:
        M.barriers = Barriers(M)
    barriers = M.barriers
    slots = np.zeros(shape, int)
    for at in np.unique(address):
        where = address == at
        row = np.argwhere(where & some)
        if len(row):
            slots[where] = barriers.slot(i, int(at), int(warps[row[0][0]]), int(row[0][1]))
    done = (barriers.phase[M.cta_of[warps][:, None], slots] & 1) != np.broadcast_to(parity, shape)
    rows, lanes = np.nonzero(
        done & some if done.shape == some.shape else done & some.any(1, keepdims=True)
    )
    if len(rows):
        barriers.acquire(warps[rows], slots[rows, lanes if width > 1 else 0])
    return done
