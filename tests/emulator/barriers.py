"""Control flow, barriers of CTAs, warps and mbarriers, and what lanes of a warp exchange."""

from __future__ import annotations

import numpy as np

from .parser import Pair
from .registry import opcode, unknown

ALL = 0xFFFFFFFF


@opcode("bra")
def emit_bra(c, i):
    c.result = c.read(i.guard, "pred") if i.guard else "None"


@opcode("brx")
def emit_brx(c, i):
    if i.guard:
        raise unknown(i)
    c.result = c.read(i.operands[0], "u32")


@opcode("ret", "exit")
def emit_ret(c, i):
    c.result = c.read(i.guard, "pred") if i.guard else "None"


@opcode("trap")
def emit_trap(c, i):
    c.do(c.call(trap, "M", c.thing(i), "s", c.mask(i)))


def trap(M, i, s, m) -> None:  # noqa: N803
    some = np.ones((1, 1), bool) if m is None else m
    if some.any():
        M.report_lanes(i, "trap", np.broadcast_to(some, (some.shape[0], 1)), np.zeros((1, 1)), s)


@opcode("bar", "barrier")
def emit_bar(c, i):
    if i.guard:
        raise unknown(i)
    if i.has("warp"):
        c.do(c.call(warp_sync, "M", c.thing(i), "s", "m", c.read(i.operands[0], "u32")))
    elif i.has("sync"):
        threads = c.read(i.operands[1], "u32") if len(i.operands) > 1 else "None"
        c.result = f"({c.read(i.operands[0], 'u32')}, {threads})"
    else:
        raise unknown(i)


def warp_sync(M, i, s, m, members) -> None:  # noqa: N803
    converged(M, i, s, m, members)
    M.races.warp_barrier(M.all_warps if s is None else s)


def converged(M, i, s, m, members) -> None:  # noqa: N803
    """All lanes of `members` execute the instruction together."""
    if m is None:
        return
    live = np.broadcast_to(m, (m.shape[0], 32))
    bits = (members >> np.arange(32, dtype="u4") & np.uint32(1)).astype(bool)
    exited = M.exited if s is None else M.exited[s]
    missing = live.any(1, keepdims=True) & bits & ~live & ~exited
    if missing.any():
        M.report_lanes(i, "diverged: a lane of the mask is elsewhere", missing, np.zeros((1, 1)), s)


# between lanes


@opcode("shfl")
def emit_shfl(c, i):
    """shfl.sync.mode.b32 d|p, a, b, c, members"""
    mode = i.parts[2]
    to, value, b, clamp, members = i.operands
    value, b, clamp = c.read(value, "b32"), c.read(b, "b32"), c.read(clamp, "b32")
    c.do(c.call(converged, "M", c.thing(i), "s", c.mask(i), c.read(members, "u32")))
    name = c.let(c.call(shuffle, "M", repr(mode), value, b, clamp, c.mask(i), c.thing(i), "s"))
    first, second = (to.first, to.second) if isinstance(to, Pair) else (to, None)
    c.write(first, "b32", f"{name}[0]", i.guard)
    if second is not None:
        c.write(second, "pred", f"{name}[1]", i.guard)


def shuffle(M, mode: str, value, b, clamp, m, i, s):  # noqa: N803
    """(the value of the source lane, whether it is in range), by the ISA's own formula."""
    if m is None and b.size == 1 and clamp.size == 1:
        key = (mode, int(b.flat[0]), int(clamp.flat[0]))
        if key not in _SOURCES:
            _SOURCES[key] = _source_lanes(mode, b, clamp)
        source, valid = _SOURCES[key]
        if value.shape[1] == 1:
            return value, valid
        return value[:, source[0]], valid
    source, valid = _source_lanes(mode, b, clamp)
    if m is not None:
        live = np.broadcast_to(m, (m.shape[0], 32))
        asleep = live & ~np.take_along_axis(live, np.broadcast_to(source, live.shape), 1)
        if asleep.any():
            M.report_lanes(i, "shuffle from a lane that does not take part", asleep, np.zeros((1, 1)), s)  # fmt: skip # noqa: E501
    if value.shape[1] == 1:
        return value, valid
    rows = max(value.shape[0], source.shape[0])
    wide = np.broadcast_to(value, (rows, 32))
    return np.take_along_axis(wide, np.broadcast_to(source, (rows, 32)), 1), valid


_SOURCES: dict = {}


def _source_lanes(mode: str, b, clamp):
    lane = np.arange(32)[None, :]
    b, clamp = b.astype("i8") & 31, clamp.astype("i8")
    c, segments = clamp & 31, clamp >> 8 & 31
    most = (lane & segments) | (c & ~segments)
    least = lane & segments
    if mode == "up":
        j = lane - b
        valid = j >= most
    elif mode == "down":
        j = lane + b
        valid = j <= most
    elif mode == "bfly":
        j = lane ^ b
        valid = j <= most
    elif mode == "idx":
        j = least | (b & ~segments)
        valid = j <= most
    else:
        raise NotImplementedError(mode)
    return np.where(valid, j, lane), valid


@opcode("vote")
def emit_vote(c, i):
    """vote.sync.mode d, p, members"""
    mode = i.parts[2]
    to, predicate, members = i.operands
    c.do(c.call(converged, "M", c.thing(i), "s", c.mask(i), c.read(members, "u32")))
    value = c.read(predicate, "pred")
    call = c.call(vote, repr(mode), value, c.read(members, "u32"), c.mask(i))
    c.write(to, "b32" if mode == "ballot" else "pred", call, i.guard)


def vote(mode: str, value, members, m) -> np.ndarray:
    bits = (members >> np.arange(32, dtype="u4") & np.uint32(1)).astype(bool)
    if m is not None:
        bits = bits & np.broadcast_to(m, (m.shape[0], 32))
    value = np.broadcast_to(value, np.broadcast_shapes(value.shape, bits.shape))
    if mode == "ballot":
        return ((value & bits) << np.arange(32, dtype="u4")).sum(1, keepdims=True).astype("u4")
    if mode == "any":
        return (value & bits).any(1, keepdims=True)
    if mode == "all":
        return (value | ~bits).all(1, keepdims=True)
    if mode == "uni":
        return (value | ~bits).all(1, keepdims=True) | ~(value & bits).any(1, keepdims=True)
    raise NotImplementedError(mode)


@opcode("redux")
def emit_redux(c, i):
    function = {"min": np.minimum, "max": np.maximum, "add": np.add, "and": np.bitwise_and,
                "or": np.bitwise_or, "xor": np.bitwise_xor}[i.parts[2]]  # fmt: skip
    value = c.read(i.operands[1], i.type)
    c.do(c.call(converged, "M", c.thing(i), "s", c.mask(i), c.read(i.operands[2], "u32")))
    members = c.read(i.operands[2], "u32")
    call = c.call(reduce_members, c.thing(function, "f"), value, members, c.mask(i))
    c.write(i.operands[0], i.type, call, i.guard)


def reduce_members(function, value, members, m) -> np.ndarray:
    """Each group of lanes that name the same members gets the reduction over them."""
    rows = max(value.shape[0], members.shape[0])
    value = np.broadcast_to(value, (rows, 32))
    members = np.broadcast_to(members, (rows, 32))
    result = np.zeros((rows, 32), value.dtype)
    for mask in np.unique(members):
        lanes = [n for n in range(32) if mask >> n & 1]
        reduced = function.reduce(value[:, lanes], 1, keepdims=True).astype(value.dtype)
        result = np.where(members == mask, reduced, result)
    return result


@opcode("elect")
def emit_elect(c, i):
    """The lowest lane of the members is the leader."""
    members = c.read(i.operands[1], "u32")
    c.do(c.call(converged, "M", c.thing(i), "s", "m", members))
    leader = c.let(c.call(lowest_lane, members))
    c.write(i.operands[0].first, "b32", leader, i.guard)
    c.write(i.operands[0].second, "pred", f"np.arange(32)[None, :] == {leader}", i.guard)


def lowest_lane(members) -> np.ndarray:
    lowest = members & (~members + np.uint32(1))
    return np.bitwise_count(lowest - np.uint32(1)).astype("u4")


@opcode("match")
def emit_match(c, i):
    raise unknown(i)


@opcode("setmaxnreg")
def emit_setmaxnreg(c, i):
    """Moves registers between warps, which this machine has without end."""


@opcode("activemask")
def emit_activemask(c, i):
    c.write(i.operands[0], "b32", c.call(active, "m"), i.guard)


def active(m) -> np.ndarray:
    if m is None:
        return np.array([[ALL]], "u4")
    live = np.broadcast_to(m, (m.shape[0], 32))
    return (live << np.arange(32, dtype="u4")).sum(1, keepdims=True).astype("u4")


# mbarriers


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
