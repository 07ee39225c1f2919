"""Calls that between them run every kernel on both architectures: no fault, errors like PyTorch's.

`python -m tests.emulator.table` runs all calls; the features here are others on each architecture.
"""

from __future__ import annotations

import pytest

from . import table
from .calls import calls
from .device import emulating
from .machine import Options

EVERYWHERE = (
    "block-sparse: window",
    "block-sparse: decode",
    "block-sparse: forward mode, window",
    "Nyström: decay, state",
    "Nyström: bidirectional",
    "hybrid: slots",
    "hybrid: mass",
    "hybrid: decode",
    "routed: chosen blocks, deterministic",
    "routed: decode",
)
CHOSEN = {
    80: (*EVERYWHERE, "block-sparse: relative bias"),
    90: (
        *EVERYWHERE,
        "block-sparse: window, float32",
        "block-sparse: window, rows of 200 bytes",
        "block-sparse: dropout",
    ),
}


@pytest.mark.parametrize(
    ("arch", "name"), [(a, name) for a, names in CHOSEN.items() for name in names]
)
def test_call(arch, name):
    with emulating(arch, Options(only_noted=table.NOTED)):
        error, pytorch = calls(arch)[name]()
    assert error <= table.allowed(pytorch)


@pytest.mark.parametrize("arch", CHOSEN)
def test_the_calls_run_every_kernel(arch):
    """But for those of csrc, which have tests of their own."""
    rows = [x for x in table.read() if x.arch == arch and not x.call.startswith("CUDA C++")]
    assert {x.kernel for x in rows} == {x.kernel for x in rows if x.call in CHOSEN[arch]}
