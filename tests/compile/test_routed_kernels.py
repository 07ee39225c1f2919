"""The kernels of attention over chosen blocks compile, fit, and use the tensor cores."""

from __future__ import annotations

import os

import pytest

from bench.offline import SHARED_MEMORY, compiling_for, inspect, parse_target
from tests.compile import budgets
from tests.compile.routed_launches import HALF, all_launches

TARGETS = os.environ.get("FLASHMARK_COMPILE_TARGETS", "sm_90").split(",")
WITHOUT_PRODUCTS = ("tokens_kernel", "delta_kernel", "merge_kernel")


@pytest.mark.parametrize("launch", all_launches(), ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kernel(target, launch):
    arch = parse_target(target)
    with compiling_for(arch) as launches:
        launch.run()
    assert launches
    for name, kernel in launches:
        report = inspect(name, kernel)
        assert report.shared <= SHARED_MEMORY[arch], report
        if name in WITHOUT_PRODUCTS:
            continue
        if arch == 90:
            assert budgets.complaints(str(launch), name, kernel) == []
            assert report.spilled <= launch.spill_allowed(name), report
        if launch.dtype == HALF and arch in (80, 90):
            assert report.hgmma + report.hmma > 0, report
        if launch.dtype == HALF and arch == 90 and launch.pass_ != "decode" and launch.block >= 64:
            assert report.hgmma > 0, report
