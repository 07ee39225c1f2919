"""Launches of hybrid attention over a whole sequence: as many for many chunks as for few."""

from __future__ import annotations

import pytest
import torch

import flashmark
from tests.compile.driver import stub
from tests.compile.driver.counting import counting

pytestmark = pytest.mark.skipif(stub.why_not() is not None, reason=str(stub.why_not()))


def counts(merge: str, tokens: int):
    """(of the forward, of the backward)"""
    x = [torch.zeros(1, 2, tokens, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    marks = flashmark.init_landmarks(2, 16, 64).requires_grad_()
    options = {} if merge == "slots" else {"core": torch.zeros(2, 16, 16)}
    if merge == "gate":
        options["gate"] = torch.zeros(1, 2, 1, 1)
    with counting() as forward:
        out = flashmark.hybrid_attention(
            *x, marks, window=32, merge=merge, backend="triton", **options
        )
    with counting() as backward:
        torch.autograd.grad(out, (*x, marks), torch.zeros_like(out))
    return forward, backward


SCANS = {
    "slots": ("sums_kernel", "sums_kernel"),
    "mass": ("states_kernel", "states_backward_kernel"),
    "gate": ("states_kernel", "states_backward_kernel"),
}


@pytest.mark.parametrize("merge", SCANS)
def test_launches_do_not_grow_with_the_chunks(merge):
    with stub.launching(code=False):
        few, many = counts(merge, 32 * 12), counts(merge, 32 * 40)
    for short, long, scan in zip(few, many, SCANS[merge], strict=True):
        assert long.triton == short.triton
        assert long.aten.total() <= short.aten.total()
        assert long.triton[scan] > 0
