"""Races in global memory: between CTAs, and between warps of a CTA."""

from __future__ import annotations

import numpy as np

ATOMIC = -1


def _cells(M, region, address, size: int, s, m):  # noqa: N803
    """(granules [n], warps [n] of the batch) of an access to one region."""
    granule = M.program.granule["global"]
    warps = M.all_warps if s is None else s
    shape = (len(warps), max(address.shape[1], 1 if m is None else m.shape[1]))
    address = np.broadcast_to(address, shape)
    warps = np.broadcast_to(warps[:, None], shape)
    if m is not None:
        some = np.broadcast_to(m, shape)
        address, warps = address[some], warps[some]
    cells = (address.ravel() - region.start) // granule
    warps = warps.ravel()
    count = max(1, size // granule)
    if count > 1:
        cells = (cells[:, None] + np.arange(count)).ravel()
        warps = np.repeat(warps, count)
    if region.writer is None:
        n = -(-(region.end - region.start) // granule) + 1
        region.writer, region.write = np.zeros(n, "i4"), np.zeros(n, "i8")
        region.reader, region.read = np.zeros(n, "i4"), np.zeros(n, "i8")
    return cells, warps


def global_read(M, i, region, address, size: int, s, m, atomic: bool = False) -> None:  # noqa: N803
    if region is None:
        return
    cells, warps = _cells(M, region, address, size, s, m)
    me = (warps + M.first_cta * M.warps_per_cta + 1).astype("i4")
    writer = region.writer[cells]
    other = (writer != me) & (writer != 0)
    if other.any():
        _compare(M, i, "read after write", other, cells, warps, region, writer, region.write)
    region.reader[cells] = me
    region.read[cells] = M.races.now << 16 | i.index


def global_write(M, i, region, address, size: int, s, m, atomic: bool = False) -> None:  # noqa: N803
    if region is None:
        return
    cells, warps = _cells(M, region, address, size, s, m)
    me = (warps + M.first_cta * M.warps_per_cta + 1).astype("i4")
    writer, reader = region.writer[cells], region.reader[cells]
    other = (writer != me) & (writer != 0)
    if atomic:
        other &= writer != ATOMIC
    if other.any():
        _compare(M, i, "write after write", other, cells, warps, region, writer, region.write)
    other = (reader != me) & (reader != 0)
    if other.any():
        _compare(M, i, "write after read", other, cells, warps, region, reader, region.read)
    region.writer[cells] = ATOMIC if atomic else me
    region.write[cells] = M.races.now << 16 | i.index


def _compare(M, i, kind: str, other, cells, warps, region, owner, stamps) -> None:  # noqa: N803
    """Accesses after those of other warps: in another CTA nothing orders them."""
    first = M.first_cta * M.warps_per_cta
    n = np.nonzero(other)[0]
    theirs = owner[n] - 1 - first
    near = (theirs >= 0) & (theirs < M.warps)
    safe = np.where(near, theirs, 0)
    near &= M.cta_of[safe] == M.cta_of[warps[n]]
    seen = M.races.seen[warps[n], M.races.own[safe]] >= stamps[cells[n]] >> 16
    fault = np.nonzero(~(near & seen))[0]
    if fault.size:
        at = n[fault[0]]
        stamp, who = int(stamps[cells[at]]), int(owner[at])
        by = (
            "an atomic operation"
            if who == ATOMIC
            else f"CTA {(who - 1) // M.warps_per_cta}, warp {(who - 1) % M.warps_per_cta}"
        )  # noqa: E501
        text = f"{by}, {M.program.instructions[stamp & 0xFFFF]}"
        address = region.start + int(cells[at]) * M.program.granule["global"]
        M.report(i, f"race in global memory: {kind}", int(warps[at]), 0, address, text)
