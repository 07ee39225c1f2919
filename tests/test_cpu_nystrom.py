"""The C++ kernels of causal Nyström attention: what the operator's own tests do not look at."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import flashmark
import helpers
from flashmark import cpu
from nystrom_cases import Case

if not cpu.available():
    pytest.skip(cpu.why_not(), allow_module_level=True)

CASES = [  # with a core: the default one is solved by LAPACK, whose bits follow the threads
    Case(200, 16, group=2, batch=2, kv_heads=2, given_core=True),
    Case(200, 20, decay=0.3, state=True, normalize="mass", given_core=True),
    Case(495, 8, packed=True, state=True, group=2, given_core=True),
    Case(130, 8, spread=60.0, given_core=True),
]


def results(case: Case, dtype: torch.dtype = torch.float32, backend: str = "cpu") -> list:
    arguments = case.arguments(dtype)
    leaves = [t for t in _tensors(arguments) if t.is_floating_point() and t.requires_grad]
    out, (L, R) = flashmark.nystrom_attention(**arguments, return_state=True, backend=backend)
    weights = [helpers.randn(*t.shape, seed=70 + n) for n, t in enumerate((out, L, R))]
    held = L.isfinite()
    loss = (out.float() * weights[0]).sum() + (R * weights[2]).sum()
    loss = loss + (torch.where(held, L, 0.0) * weights[1]).sum()
    return [out.detach(), L.detach(), R.detach(), *torch.autograd.grad(loss, leaves)]


def _tensors(arguments: dict):
    for value in arguments.values():
        values = value if isinstance(value, tuple | list) else [value]
        yield from (v for v in values if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case):
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results(case))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for expected, actual in zip(runs[0], other, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_result_depends_on_uninitialised_memory(case):
    expected = results(case)
    torch.use_deterministic_algorithms(True)  # torch then fills what it allocates with NaN
    try:
        actual = results(case)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_half_precision_rounds_inputs_and_outputs_only(case, dtype):
    # Half-precision inputs are computed in float32: within a rounding of the same numbers there.
    actual = results(case, dtype)
    arguments = case.arguments(dtype)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    wide = _upcast(arguments)
    out = flashmark.nystrom_attention(**wide, backend="cpu")
    helpers.assert_close(actual[0].float(), out, rounding, "out")


def _upcast(arguments: dict) -> dict:
    def one(x):
        return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {
        name: tuple(one(v) for v in value) if isinstance(value, tuple) else one(value)
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("layout", ["bnhd", "gaps"])
def test_strides_change_nothing(layout):
    for case in CASES[:2]:
        strided = dataclasses.replace(case, layout=layout)
        for expected, actual in zip(results(case), results(strided), strict=True):
            assert torch.equal(actual, expected)


def test_no_samples():
    case = Case(20, 8, batch=2)
    arguments = case.arguments()
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name][:0]
    out = flashmark.nystrom_attention(**arguments, backend="cpu")
    assert out.shape == (0, 1, 20, 16)
