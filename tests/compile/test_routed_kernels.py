"""The kernels of attention over chosen blocks compile, fit, and use the tensor cores."""

from __future__ import annotations

import pytest

from bench.offline import SHARED_MEMORY, compiling_for, inspect, parse_target
from tests.compile import budgets
from tests.compile.routed_launches import all_launches
from tests.compile.test_block_sparse_kernels import ALL, CHOSEN_WITH, TARGETS

# bytes to a thread that kernels spill; they may only get fewer
SPILLS = {"gathered_keys_kernel": 24}
SLACK = 0 if CHOSEN_WITH else 64  # other versions keep a few more values alive
WITHOUT_PRODUCTS = ("tokens_kernel", "delta_kernel", "merge_kernel")


def is_rare(launch) -> bool:
    """Whether a launch is compiled only where targets are named: D = 64 stands for its sibling."""
    return launch.dim == 128 and launch.block != 16 or launch.pass_ == "atomic"


@pytest.mark.parametrize("launch", [x for x in all_launches() if ALL or not is_rare(x)], ids=str)
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
            assert report.spilled <= SPILLS.get(name, 0) + SLACK, report
        if arch in (80, 90):
            assert report.hgmma + report.hmma > 0, report
        if arch == 90 and launch.pass_ != "decode":
            assert report.hgmma > 0, report
