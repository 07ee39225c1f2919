"""Launches of a backward of causal Nyström attention: few, whatever the widths and the length."""

from __future__ import annotations

import pytest
import torch

import flashmark
from tests.compile.driver import stub
from tests.compile.driver.counting import Count, counting

MARKS = 16
pytestmark = pytest.mark.skipif(stub.why_not() is not None, reason=str(stub.why_not()))


def backward(dtype: torch.dtype, dim: int, tokens: int) -> Count:
    x = [torch.zeros(1, 2, tokens, dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    marks = torch.zeros(2, MARKS, dim, requires_grad=True)
    out = flashmark.nystrom_attention(
        *x, marks, core=torch.zeros(2, MARKS, MARKS), backend="triton"
    )
    with counting() as count:
        torch.autograd.grad(out, (*x, marks), torch.zeros_like(out))
    return count


@pytest.mark.parametrize("dim", [32, 128])
def test_float32_takes_fourteen_kernels(dim):
    with stub.launching(code=False):
        count = backward(torch.float32, dim, 1024)
    assert count.triton == {
        "states_kernel": 1, "scan_kernel": 1, "join_slots_kernel": 1, "rows_kernel": 6,
        "reverse_scan_kernel": 1, "keys_kernel": 4,
    }  # fmt: skip
    assert count.aten.total() <= 20


@pytest.mark.parametrize("tokens", [100, 4096])
def test_bfloat16_takes_one_launch_a_side_and_one_for_rises(tokens):
    with stub.launching(code=False):
        count = backward(torch.bfloat16, 64, tokens)
    assert count.triton == {
        "states_kernel": 1, "scan_kernel": 1, "join_slots_kernel": 1, "rows_kernel": 2,
        "reverse_scan_kernel": 1, "keys_kernel": 2,
    }  # fmt: skip
    assert count.aten.total() <= 20
