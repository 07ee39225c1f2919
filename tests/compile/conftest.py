"""Triton kernels compiled offline, no GPU needed. A process of its own: `pytest tests/compile`,
without TRITON_INTERPRET.

FLASHMARK_COMPILE_TARGETS=sm_80,sm_89,sm_90,sm_100,gfx942 names the targets; sm_90 alone when unset.
"""

from __future__ import annotations

import os

import pytest


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("tests/compile needs TRITON_INTERPRET unset")


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str]]:
    """The kernels that Triton is asked to compile, by name and specialisation. None is compiled."""
    from triton.runtime.jit import JITFunction  # not installed where only the CUDA sources are

    kernels: list[tuple[str, str]] = []

    def note(kernel, key, *_) -> None:
        kernels.append((kernel.fn.__name__, key))

    monkeypatch.setattr(JITFunction, "_do_compile", note)
    # a device of its own, for which nothing has been compiled
    monkeypatch.setattr("bench.offline._Absent.get_current_device", lambda driver: -1)
    return kernels
