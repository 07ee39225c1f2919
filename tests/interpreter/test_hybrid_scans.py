"""Running totals of chunks by Triton kernels, against those in PyTorch."""

from __future__ import annotations

import pytest
import torch

from flashmark.hybrid import eager
from flashmark.kernels import hybrid
from tests import helpers
from tests.interpreter.running import DEVICE

SHAPES = [(2, 2, 7, 5, 6), (1, 1, 1, 17, 1), (1, 3, 12, 4, 130)]


def on_device(*tensors):
    return [x.to(DEVICE) for x in tensors]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 9, 300)], ids=str)
def test_sums(shape, reverse):
    x = helpers.randn(*shape)
    got = hybrid.running_sums(*on_device(x), reverse).cpu()
    helpers.assert_close(got, eager.running_sums(x.double(), reverse), 1e-6)


def states(shape):
    l, r = helpers.randn(*shape[:4], seed=1) * 30, helpers.randn(*shape, seed=2)  # noqa: E741
    l[:, :, :2, 0] = l[:, :, -1, 1:3] = -torch.inf  # chunks without a key
    return l, r.masked_fill((l == -torch.inf).unsqueeze(-1), 0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_states(shape):
    l, r = states(shape)  # noqa: E741
    got = hybrid.running_states(*on_device(l, r))
    wanted = eager.running_states(l.double(), r.double())
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine.cpu() == -torch.inf, theirs == -torch.inf)
        helpers.assert_close(*(x.nan_to_num(neginf=0.0) for x in (mine.cpu(), theirs)), 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_states(shape):
    l, r = states(shape)  # noqa: E741
    dL, dR = helpers.randn(*shape[:4], seed=3), helpers.randn(*shape, seed=4)
    wide = [x.double() for x in (dL, dR, l, r)]
    wanted = eager.running_states_backward(*wide, *eager.running_states(*wide[2:]))
    given = on_device(dL, dR, l, r)
    got = hybrid.running_states_backward(*given, *hybrid.running_states(*given[2:]))
    for mine, theirs in zip(got, wanted, strict=True):
        helpers.assert_close(mine.cpu(), theirs, 1e-5)
