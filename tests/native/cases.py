"""Helpers shared by the tests of the native operators."""

from __future__ import annotations

import pytest

from flashmark import native

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not() or "built")


@pytest.fixture
def in_pytorch(monkeypatch):
    """Run a callable the pure PyTorch way."""

    def run(call):
        with monkeypatch.context() as patch:
            patch.setattr(native, "preferred", lambda device: False)
            return call()

    return run
