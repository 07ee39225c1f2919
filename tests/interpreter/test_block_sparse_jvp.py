"""Forward mode through the Triton kernels: outputs and tangents against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashmark import masks
from tests.helpers import assert_identical, relative_error
from tests.interpreter.attention_cases import NAMES, Call, Case
from tests.interpreter.test_block_sparse_features import FEATURES, WINDOW
from tests.interpreter.test_block_sparse_masks import MASKS


def check(case: Case, device: torch.device, only: tuple[str, ...] = NAMES) -> None:
    """Outputs and tangents are as close to the reference as they should be."""
    call = Call(case, device)
    tangents = call.directions(only)
    expected = call.reference_jvp(tangents)
    plain = None if case.dtype == torch.float32 else call.reference_jvp(tangents, case.dtype)
    budget = call.budget(expected, plain)
    found = call.jvp(tangents)
    assert found["out"].dtype == found["d out"].dtype == case.dtype
    for name, x in found.items():
        error = relative_error(x, expected[name])
        assert error <= budget[name], f"{name}: error {error:.2e}, allowed {budget[name]:.2e}"


@pytest.mark.parametrize("name", MASKS)
def test_mask(name, device):
    check(Case(mask=MASKS[name], kv_heads=1), device)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("mask", [masks.causal(), WINDOW], ids=["causal", "window"])
def test_feature(name, mask, device):
    case = FEATURES[name]
    kv_len = case.kv_len or 70
    mask = mask if case.mask is None else case.mask
    check(dataclasses.replace(case, mask=mask, kv_len=kv_len), device)


@pytest.mark.parametrize("only", NAMES)
def test_a_tangent_alone(only, device):
    check(Case(mask=WINDOW, bias=(2, 139), sinks=True), device, (only,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["softcap", "sinks", "relative-bias", "dropout"])
def test_half_precision(name, dtype, device):
    check(dataclasses.replace(FEATURES[name], mask=WINDOW, kv_len=70, dtype=dtype), device)


@pytest.mark.parametrize("block", [16, 128, (16, 64), (128, 32)], ids=str)
def test_block_sizes(block, device):
    check(Case(mask=masks.sliding_window(50), block=block, q_len=90, heads=1), device)


@pytest.mark.parametrize("dims", [(1, 1), (17, 5), (72, 40), (64, 200)], ids=str)
@pytest.mark.parametrize("q_len", [1, 33, 64])
def test_sizes(dims, q_len, device):
    check(Case(mask=WINDOW, heads=1, q_len=q_len, dim=dims[0], v_dim=dims[1]), device)


@pytest.mark.parametrize("layout", ["bnhd", "gaps"])
def test_strides(layout, device):
    check(Case(mask=WINDOW, batch=2, heads=4, kv_heads=2, q_len=40, layout=layout), device)


def test_rows_that_see_no_key_have_no_tangent(device):
    call = Call(Case(mask=masks.causal(), q_len=70, kv_len=40), device)
    found = call.jvp(call.directions())
    assert not found["d out"][:, :, :30].any() and not found["d lse"][:, :, :30].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e4])
def test_the_future_reaches_no_tangent(poison, device):
    call = Call(Case(mask=masks.causal(), dtype=torch.float32), device)
    tangents = call.directions()
    before = call.jvp(tangents)
    for x in (call.key, tangents.dkey):
        x[:, :, 40:] = poison
    for x in (call.value, tangents.dvalue):
        x[:, :, 40:] = 1e30
    for name, found in call.jvp(tangents).items():
        assert_identical(found[:, :, :40], before[name][:, :, :40])


def test_the_values_are_those_of_the_forward(device):
    call = Call(Case(mask=WINDOW, softcap=2.0), device)
    found = call.jvp(call.directions())
    for name, plain in zip(("out", "lse"), call.forward(), strict=True):
        assert relative_error(found[name], plain) < 1e-6
