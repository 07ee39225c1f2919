"""Exchanges between the lanes of a warp."""

from __future__ import annotations

import numpy as np

from .barriers import ALL, converged
from .parser import Pair
from .registry import opcode, unknown


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
