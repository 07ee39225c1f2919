"""The Triton kernels of hybrid attention: what slots hold, and the attention that reads them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._pytree import tree_map_only

import flashmark
from flashmark import hybrid_attention, landmark_core
from flashmark.hybrid import far_composed
from flashmark.kernels.block_sparse import configs as shared
from flashmark.kernels.hybrid import configs, mass
from tests import helpers
from tests.hybrid.cases import Case, detached, tokens
from tests.interpreter.running import DEVICE


@functools.wraps(hybrid_attention)
def op(*args, **kwargs):
    args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), (args, kwargs))
    results = hybrid_attention(*args, **kwargs, backend="triton")
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, results)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(configs, "PROGRAMS", 2)


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    report = flashmark.check(op, **case.arguments(dtype))
    assert report.ok, f"\n{report}"


CASES = [
    Case(1),
    Case(70, 20, 5, group=2, kv_heads=2, v_dim=24, layout="bnhd"),
    Case(60, 20, 17, batch=2, padding=(30, 13)),
    Case(30, 8, 5, batch=2, kv_heads=2, landmarks="batched"),
    Case(100, 40, 3, dim=1, v_dim=1),
    Case(20, 8, 130, dim=33, v_dim=150),
    Case(20, 8, 3, dim=200, v_dim=17),
    Case(96, 16, 5, packed=True, padding=(5, 30)),
    Case(40, 8, 8, spread=300.0),
    Case(30, 10, 5, "gate", group=2),
    Case(36, 10, 17, "mass", group=2, kv_heads=2, v_dim=24),
    Case(24, 8, 5, "mass", batch=2, landmarks="batched", padding=(9, 2)),
    Case(20, 8, 5, "mass", dim=70, v_dim=70),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_against_float64(case):
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(50, 16, 17, group=2),
        Case(50, 16, 8, padding=(5, 3), v_dim=24),
        Case(50, 16, 8, "mass", group=2),
    ],
    ids=str,
)
def test_half_precision_is_as_good_as_plain_pytorch(case, dtype):
    check(case, dtype)


@pytest.fixture
def little_memory(monkeypatch):
    """Configs of a GPU with 99 KiB of shared memory to a program."""
    monkeypatch.setattr(shared, "device_arch", lambda where: 86)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(20, 8, 70, dim=150, v_dim=17), torch.float32),
        (Case(24, 8, 70, "mass", group=2), torch.bfloat16),
        (Case(24, 8, 70, "mass", dim=40, v_dim=40), torch.float16),
        (Case(20, 8, 70, "mass"), torch.float32),
    ],
    ids=str,
)
def test_many_landmarks_in_little_shared_memory(case, dtype, little_memory):
    check(case, dtype)


def test_a_core_of_many_landmarks_whose_entries_cancel():
    """One product in bfloat16 loses two digits of the output's three."""
    torch.manual_seed(0)
    case = Case(24, 8, 70, "mass")
    arguments = case.arguments(torch.bfloat16)
    report = flashmark.check(op, **arguments)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("memory", [None, "little_memory"], ids=str)
def test_gradients_through_a_core_of_many_landmarks_whose_entries_cancel(memory, request):
    """The product with the core adds less than the rounding of what comes before it."""
    if memory:
        request.getfixturevalue(memory)
    torch.manual_seed(0)
    query = torch.randn(1, 1, 2, 16, 8).bfloat16()
    landmarks = (0.7 * torch.randn(1, 128, 8)).bfloat16().float()
    core = landmark_core(landmarks.double(), kind="kernel", scale=0.35).float()
    L, R = torch.randn(1, 1, 2, 128), torch.randn(1, 1, 2, 128, 16)
    grads = torch.randn(1, 1, 2, 16, 16), torch.randn(1, 1, 2, 16)

    def exact(grads, R):
        leaves = [x.double().requires_grad_() for x in (query, landmarks, core, L, R)]
        read = far_composed.mass(*leaves, 0.35)[:2]
        return torch.autograd.grad(read, leaves, [x.double() for x in grads])

    given = [x.to(DEVICE) for x in (*grads, query, landmarks, core, L, R)]
    found = mass.backward(*given, 0.35)
    rounded = exact((grads[0].bfloat16(), grads[1]), R.bfloat16())
    for actual, wanted, near in zip(found, exact(grads, R), rounded, strict=True):
        allowed = 1.5 * (near - wanted).abs().max() + 2**-8 * wanted.abs().max()
        assert (actual.cpu() - wanted).abs().max() <= allowed


def test_a_state_carries_from_call_to_call():
    arguments = detached(Case(30, 6, 5, padding=(5, 2)).arguments())
    outs, state, start = [], None, 0
    for stop in (17, 18, 30):
        part = tokens(arguments, slice(start, stop))
        out, state = op(**part, state=state, return_state=True)
        outs.append(out)
        start = stop
    helpers.assert_close(torch.cat(outs, 2), op(**arguments), 1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e4], ids=str)
def test_the_future_changes_no_bit(poison):
    arguments = detached(Case(44, 8, 5).arguments())
    clean = op(**arguments)
    for i in (16, 37):
        poisoned = {x: arguments[x].clone() for x in ("query", "key")}
        for x in poisoned.values():
            x[:, :, i + 1 :] = poison
        value = arguments["value"].clone()
        value[:, :, i + 1 :] = 1e30
        out = op(**(arguments | poisoned | {"value": value}))
        helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"after {i}")


def test_hidden_keys_and_values_may_hold_anything():
    def run(poison):
        arguments = Case(40, 8, 5, padding=(9, 12)).arguments()
        hidden = ~arguments["key_mask"][:, None, :, None]
        for name in ("key", "value"):
            x = arguments[name].detach().masked_fill(hidden, poison)
            arguments[name] = x.requires_grad_()
        out = op(**arguments)
        leaves = [arguments[x] for x in ("query", "key", "value", "landmarks")]
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    for actual, wanted in zip(run(torch.nan), run(0.0), strict=True):
        helpers.assert_close(actual, wanted, 1e-6)


def test_gradients_of_landmarks_repeat_to_the_bit():
    def gradient():
        arguments = Case(48, 8, 5).arguments()
        return torch.autograd.grad(op(**arguments).square().sum(), arguments["landmarks"])[0]

    helpers.assert_identical(gradient(), gradient())
