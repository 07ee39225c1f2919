"""The Triton kernels on CPU tensors, in Triton's interpreter: `TRITON_INTERPRET=1 pytest
tests/interpreter`.

The same files run on a GPU, `pytest tests/interpreter --device cuda`, and compiled for one in the
emulator of tests/emulator, `--device emulated`, with `--arch 80` or 90.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

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
    parser.addoption("--device", default="cpu", help="cpu (the interpreter), emulated or cuda")
    parser.addoption("--pointers", action="store_true", help="without the Hopper forms")
    parser.addoption("--arch", default="90", choices=("80", "90"), help="of --device emulated")


def pytest_configure(config):
    device = config.getoption("--device")
    if (device == "cpu") != INTERPRETED:
        raise pytest.UsageError(
            "--device cpu needs TRITON_INTERPRET=1, and any other needs it unset"
        )
    if device == "emulated":
        os.environ["FLASHMARK_EMULATED"] = config.getoption("--arch")


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    from tests.interpreter import running

    if running.EMULATED is None:
        yield running.DEVICE
        return
    from tests.emulator.device import emulating

    with emulating(running.EMULATED):
        yield running.DEVICE


@pytest.fixture(autouse=True)
def on_device(device):
    """Also tests that do not ask for the device run on it."""


@pytest.fixture(scope="session", autouse=True)
def forms(request) -> Iterator[None]:
    """The Hopper forms of kernels run where they can, unless told otherwise."""
    from flashmark.kernels.block_sparse import configs

    with configs.pointer_forms() if request.config.getoption("--pointers") else nullcontext():
        yield


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
