"""Fixtures of every test: uninitialised memory holds NaN, randomness is seeded, one thread."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "flashmark",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.data_too_large,
    ],
)
hypothesis.settings.load_profile("flashmark")


def pytest_configure(config):
    config.addinivalue_line("markers", "plain_empty: leave torch.empty as it is in this test")


def pytest_sessionstart(session):
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype is torch.bool:
        return tensor
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poisoning(allocate):
    def empty(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or kwargs.get("requires_grad"):
            return tensor
        return _poison(tensor)

    return empty


@pytest.fixture(autouse=True)
def nan_filled_empty(request, monkeypatch):
    """`torch.empty` and its relatives return NaN: an element that no one writes is seen."""
    if request.node.get_closest_marker("plain_empty"):
        return
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1234)
