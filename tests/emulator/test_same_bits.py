"""Threads that hold one entry of a landmark's gradient hold the same bits of it, so that it does
not matter which of them a GPU lets store it.
"""

from __future__ import annotations

import pytest

from flashmark.nystrom import nystrom_attention
from tests.nystrom.cases import Case

from .device import emulating
from .machine import Options

CASES = {
    "decay": Case(40, 8, decay=0.1),
    "pieces": Case(40, 8, decay=0.1, spread=300.0),
    "mass": Case(40, 8, decay=0.1, normalize="mass"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_of_nystrom_in_float32(case):
    with emulating(90, Options(same_bits=True)) as device:
        out = nystrom_attention(**case.arguments(), backend="triton")
        out.sum().backward()
    assert {"rows_kernel", "keys_kernel"} <= {launch.kernel for launch in device.launches}
