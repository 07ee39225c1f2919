"""The Triton kernels on CPU tensors, in Triton's interpreter: `TRITON_INTERPRET=1 pytest
tests/interpreter`.

The same files run on a GPU: `pytest tests/interpreter --device cuda`.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PAD, CANARY = 512, 7

if INTERPRETED:
    from tests.interpreter import (
        bfloat16,  # noqa: F401
        faster,  # noqa: F401
    )


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu (the interpreter) or cuda")


def pytest_configure(config):
    if (config.getoption("--device") == "cpu") != INTERPRETED:
        raise pytest.UsageError(
            "--device cpu needs TRITON_INTERPRET=1, and --device cuda needs it unset"
        )


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def guarded_allocations(nan_filled_empty, monkeypatch):
    """`torch.empty` and `torch.zeros` return memory between canaries: a write beside it shows."""
    buffers = []

    def guarding(allocate):
        def allocator(*args, **kwargs):
            plain = allocate(*args, **kwargs)
            if plain.dtype == torch.bool or kwargs.get("out") is not None:
                return plain
            count = plain.numel()
            buffer = plain.new_full((count + 2 * PAD,), CANARY)
            buffers.append((buffer, count))
            return buffer[PAD : PAD + count].view(plain.shape).copy_(plain)

        return allocator

    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, guarding(getattr(torch, name)))
    yield
    for buffer, count in buffers:
        assert (buffer[:PAD] == CANARY).all() and (buffer[PAD + count :] == CANARY).all()
