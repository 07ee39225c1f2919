"""The Nyström kernels compile, fit, and use the tensor cores; what may spill, and how much."""

from __future__ import annotations

import os

import pytest
import triton
from nystrom_launches import HALF, Launch, all_launches

from bench.offline import SHARED_MEMORY, Report, compiling_for, inspect, parse_target

TARGETS = os.environ.get("FLASHMARK_COMPILE_TARGETS", "sm_90").split(",")
SUITE = [
    Launch("forward", 64, 64),
    Launch("backward", 64, 64),
    Launch("forward", 32, 32),
    Launch("forward", 128, 128),
    Launch("decode", 64, 64),
]
SCANS = ("scan_kernel", "reverse_scan_kernel")  # sums only
CUT = ("output_kernel", "rows_kernel", "keys_kernel")  # launched for chunks, then for pieces
# bytes to a thread, on the newer Triton; the pieces run where a chunk is cut, and seldom
SPILLED, SPILLED_BY_KEYS, SPILLED_WHEN_WIDE, SPILLED_BY_PIECES = 16, 96, 128, 896


def roles(reports: list[Report], decode: bool) -> list[tuple[Report, bool]]:
    """Each report, and whether it is of a launch for pieces."""
    marked, turns = [], dict.fromkeys(CUT, decode)
    for report in reports:
        pieces = turns.get(report.kernel, False)
        marked.append((report, pieces))
        if report.kernel in turns and not decode:
            turns[report.kernel] = not pieces
    return marked


def spill_allowed(report: Report, pieces: bool, wide: bool) -> int:
    if pieces:
        return SPILLED_BY_PIECES
    slack = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 64
    if wide and report.kernel in CUT:
        return slack + SPILLED_WHEN_WIDE
    return slack + (SPILLED_BY_KEYS if report.kernel == "keys_kernel" else SPILLED)


@pytest.mark.parametrize("launch", all_launches() if len(TARGETS) > 1 else SUITE, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kernel(target, launch):
    arch = parse_target(target)
    with compiling_for(arch) as launches:
        launch.run()
    reports = [inspect(*each) for each in launches]
    assert reports
    wide = max(launch.marks, launch.dim, launch.v_dim) > 64
    for report, pieces in roles(reports, launch.pass_ == "decode"):
        assert arch not in (90, 100) or report.shared <= SHARED_MEMORY[arch], report
        if arch != 90 or launch.dtype != HALF:
            continue
        if launch.feature == "plain":
            assert report.spilled <= spill_allowed(report, pieces, wide), report
        if report.kernel not in SCANS:
            assert report.hgmma + report.hmma > 0, report
            assert launch.marks < 64 or launch.pass_ == "decode" or report.hgmma > 0, report
