"""Control flow, and barriers of CTAs and warps."""

from __future__ import annotations

import numpy as np

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
