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
