"""Lengths in any integer type, and memory that no token has written."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from flashmark.nystrom import nystrom_attention
from tests import helpers
from tests.nystrom.cases import BACKENDS, Case


@pytest.fixture(params=BACKENDS)
def op(request):
    return functools.partial(nystrom_attention, backend=request.param)


def results(op, arguments: dict) -> list[torch.Tensor]:
    """Outputs, states and gradients of tokens and landmarks."""
    leaves = [arguments[x] for x in ("query", "key", "value", "landmarks")]
    out, (L, R) = op(**arguments, return_state=True)
    loss = out.square().sum() + R.square().sum() + L.where(L.isfinite(), 0.0).sum()
    return [out, L, R, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_bounds_in_int64_are_those_in_int32(op, is_causal):
    arguments = Case(495, 8, packed=True, is_causal=is_causal).arguments()
    wide = arguments | {"cu_seqlens": arguments["cu_seqlens"].long()}
    for actual, expected in zip(results(op, wide), results(op, arguments), strict=True):
        assert torch.equal(actual, expected)


HIDDEN = {
    "plain": Case(70, 8, group=2, padding=(3, 2)),
    "decay-mass": Case(70, 8, padding=(5, 0), decay=0.1, normalize="mass"),
    "one-token": Case(1, 8, padding=(1, 0)),
    "packed": Case(495, 8, packed=True, padding=(70, 3)),
    "bidirectional": Case(40, 8, padding=(2, 3), is_causal=False, kv_len=70),
}


@pytest.mark.parametrize("rest", [math.nan, math.inf, -math.inf, 3e38], ids=str)
@pytest.mark.parametrize("case", HIDDEN)
def test_hidden_memory_reaches_no_result(op, case, rest):
    arguments = HIDDEN[case].arguments()
    hidden = ~arguments["key_mask"][:, None, :, None]
    assert hidden.any()
    clean, dirty = dict(arguments), dict(arguments)
    for name in ("key", "value"):
        x = arguments[name].detach()
        clean[name] = x.masked_fill(hidden, 0.0).requires_grad_()
        dirty[name] = x.masked_fill(hidden, rest).requires_grad_()
    for actual, expected in zip(results(op, dirty), results(op, clean), strict=True):
        helpers.assert_identical(actual, expected)


@pytest.mark.parametrize("rest", [math.nan, math.inf], ids=str)
def test_the_mean_of_a_landmark_that_holds_nothing_is_not_read(op, rest):
    arguments = Case(20, 8, state=True).arguments()
    L, R = (x.detach().clone() for x in arguments["state"])
    L[..., :3] = -math.inf
    runs = []
    for fill in (0.0, rest):
        R[..., :3, :] = fill
        runs.append(results(op, arguments | {"state": (L.clone(), R.clone())}))
    for actual, expected in zip(*runs, strict=True):
        helpers.assert_identical(actual, expected)


@pytest.mark.parametrize("shape", [(1, 2, 0, 4), (0, 2, 5, 4), (1, 2, 6, 1)], ids=str)
def test_any_stride_of_tensors_that_are_empty_or_one_wide(op, shape):
    """Such tensors count as contiguous, whatever the stride of their last dimension."""
    query, key, value = (
        helpers.randn(*shape[:-1], 2 * shape[-1])[..., ::2].requires_grad_() for _ in range(3)
    )
    marks = helpers.randn(2, 3, shape[-1], grad=True)
    out, (L, R) = op(query, key, value, marks, return_state=True)
    assert out.shape == shape and R.shape == (shape[0], 2, 3, shape[-1])
    seen = shape[2] > 0
    assert (L > -math.inf).all() if seen else (L == -math.inf).all()
    grads = torch.autograd.grad(out.sum() + R.sum(), (query, key, value))
    assert [x.shape for x in grads] == [shape] * 3
