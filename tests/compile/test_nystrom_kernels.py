"""The Nyström kernels compile, fit, and use the tensor cores; the light ones do not spill."""

from __future__ import annotations

import os

import pytest
from compiler import SHARED_MEMORY, compiling_for, inspect, parse_target
from nystrom_launches import Launch, all_launches

TARGETS = os.environ.get("FLASHMARK_COMPILE_TARGETS", "sm_90").split(",")
SUITE = [
    Launch("forward", 64, 64),
    Launch("backward", 64, 64),
    Launch("forward", 32, 32),
    Launch("forward", 128, 128),
    Launch("decode", 64, 64),
]
SCANS = ("scan_kernel", "reverse_scan_kernel")  # sums only
HEAVY = ("output_kernel", "rows_kernel", "keys_kernel")  # their exact paths take registers too


@pytest.mark.parametrize("launch", all_launches() if len(TARGETS) > 1 else SUITE, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kernel(target, launch):
    arch = parse_target(target)
    with compiling_for(arch) as launches:
        launch.run()
    reports = [inspect(*each) for each in launches]
    assert reports
    for report in reports:
        assert arch not in (90, 100) or report.shared <= SHARED_MEMORY[arch], report
        if arch == 90:
            if max(launch.marks, launch.dim) <= 64 and report.kernel not in HEAVY:
                assert report.spilled == 0, report
            if report.kernel not in SCANS:
                assert report.hgmma + report.hmma > 0, report
                assert launch.pass_ == "decode" or report.hgmma > 0, report
