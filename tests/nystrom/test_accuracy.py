"""Nyström attention computes its definition: outputs, states, every gradient, against float64."""

from __future__ import annotations

import functools

import pytest
import torch

import flashmark
from flashmark import reference
from flashmark.nystrom import nystrom_attention
from tests import helpers
from tests.nystrom.cases import BACKENDS, COVERING, PACKED, Case


@pytest.fixture(params=BACKENDS)
def op(request):
    return functools.wraps(nystrom_attention)(
        functools.partial(nystrom_attention, backend=request.param)
    )


def check(op, case: Case, dtype: torch.dtype = torch.float32) -> None:
    report = flashmark.check(op, **case.arguments(dtype), return_state=True)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_float32_against_float64(op, case):
    check(op, case)


@pytest.mark.parametrize("case", [c for c in COVERING if c.n <= 300], ids=str)
def test_float64_is_exact(case):
    arguments = case.arguments(torch.float64)
    found = nystrom_attention(**arguments, return_state=True, backend="eager")
    truth = reference.nystrom_attention(**arguments, return_state=True)
    for actual, wanted in zip((found[0], *found[1]), (truth[0], *truth[1]), strict=True):
        helpers.assert_close(actual, wanted, 1e-13)


HALF = [
    Case(65, 13, group=4, decay=0.1),
    Case(300, 8, state=True),
    Case(100, 64, v_dim=24, padding=(3, 5)),
    Case(65, 8, normalize="mass"),
    Case(60, 8, is_causal=False, kv_len=90),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision_is_as_good_as_plain_pytorch(op, case, dtype):
    check(op, case, dtype)


STEEP = [
    Case(70, 8, spread=30.0),
    Case(130, 8, spread=300.0, group=4, state=True),
    Case(200, 8, spread=2000.0, decay=0.1, padding=(3, 3)),
    Case(130, 8, spread=100.0, normalize="mass"),
    Case(PACKED, 4, spread=300.0, packed=True),
    Case(90, 8, decay=8.0),
    Case(60, 8, spread=2000.0, is_causal=False, state=True),
]


@pytest.mark.parametrize("case", STEEP, ids=str)
def test_scores_up_to_ten_thousand(op, case):
    """Within 2 eps max|score|: an exponent is no better than its rounding."""
    check(op, case)


def test_a_rise_inside_a_chunk_and_back(op):
    """Chunks that need the exact path alternate with chunks that do not, within one head only."""
    arguments = Case(400, 8, group=2, kv_heads=2, batch=2).arguments()
    key = arguments["key"].detach().clone()
    key[0, 1, 100:103] *= 200.0
    key[1, 0, 399] *= 1000.0
    report = flashmark.check(op, **(arguments | {"key": key.requires_grad_()}), return_state=True)
    assert report.ok, f"\n{report}"


def test_very_low_scores_after_high_ones(op):
    """Keys that no landmark minds any more leave the state as it is."""
    arguments = Case(128, 8).arguments()
    key = arguments["key"].detach().clone()
    key[:, :, 64:] = -1e4 * arguments["landmarks"].detach().mean(1, keepdim=True)
    for n in range(8):  # every landmark scores them far below
        key[:, :, 64:] -= 1e3 * arguments["landmarks"].detach()[:, n : n + 1]
    report = flashmark.check(op, **(arguments | {"key": key.requires_grad_()}))
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(op, scale):
    arguments = Case(80, 8, given_core=scale <= 0).arguments() | {"scale": scale}
    report = flashmark.check(op, **arguments)
    assert report.ok, f"\n{report}"


def test_head_dimension_one_and_256(op):
    check(op, Case(40, 4, dim=1, v_dim=1, given_core=True))
    check(op, Case(40, 256, dim=256, v_dim=256))


def test_parameters_may_have_their_own_precision(op):
    arguments = Case(65, 8, decay=0.1, state=True, given_core=True).arguments(torch.bfloat16)
    out, state = op(**arguments, return_state=True)
    (out.float().sum() + state.L.sum() + state.R.sum()).backward()
    assert out.dtype == torch.bfloat16 and state.L.dtype == state.R.dtype == torch.float32
    for name in ("landmarks", "core", "decay"):
        assert arguments[name].grad.dtype == torch.float32
    assert arguments["query"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("given_core", [False, True], ids=["own-core", "given-core"])
@pytest.mark.parametrize("normalize", ["landmark", "mass"])
def test_gradients_of_half_landmarks_are_rounded_once(op, normalize, given_core, dtype):
    arguments = Case(40, 16, dim=1, normalize=normalize, given_core=given_core).arguments(dtype)
    del arguments["landmarks"]
    helpers.check_half_landmarks(lambda x: op(landmarks=x, **arguments), (1, 16, 1), dtype)


@pytest.mark.parametrize("normalize", ["landmark", "mass"])
def test_rows_that_see_no_key_are_zero_and_have_no_gradient(op, normalize):
    arguments = Case(90, 8, padding=(70, 0), normalize=normalize).arguments()
    out, state = op(**arguments, return_state=True)
    assert not out[:, :, :70].any()
    out.sum().backward()
    assert not arguments["query"].grad[:, :, :70].any()
    assert not arguments["key"].grad[:, :, :70].any()
    assert not arguments["value"].grad[:, :, :70].any()


def test_all_keys_hidden(op):
    arguments = Case(70, 8, padding=(70, 0)).arguments()
    out, state = op(**arguments, return_state=True)
    assert not out.any() and not state.R.any() and (state.L == -torch.inf).all()
    out.sum().backward()
    for name in ("query", "key", "value", "landmarks"):
        assert not arguments[name].grad.any(), name


def test_hidden_keys_and_values_may_hold_anything(op):
    arguments = Case(100, 8, padding=(9, 40), state=True, decay=0.1).arguments()
    clean, _ = op(**arguments, return_state=True)
    wanted = torch.autograd.grad(clean.sum(), list(tensors(arguments).values()))
    hidden = ~arguments["key_mask"][:, None, :, None]
    for name in ("key", "value"):
        arguments[name] = arguments[name].detach().masked_fill(hidden, torch.nan).requires_grad_()
    out, _ = op(**arguments, return_state=True)
    helpers.assert_identical(out, clean)
    found = torch.autograd.grad(out.sum(), list(tensors(arguments).values()))
    for name, actual, expected in zip(tensors(arguments), found, wanted, strict=True):
        helpers.assert_identical(actual, expected, name)


def tensors(arguments: dict) -> dict:
    flat = {}
    for name, value in arguments.items():
        parts = value if isinstance(value, tuple) else (value,)
        flat |= {
            f"{name}{n}": x
            for n, x in enumerate(parts)
            if isinstance(x, torch.Tensor) and x.requires_grad
        }
    return flat
