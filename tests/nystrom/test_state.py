"""The state: a sequence may be cut anywhere, decoded token by token, merged, packed."""

from __future__ import annotations

import functools

import pytest
import torch

from flashmark.nystrom import NystromState, nystrom_attention
from tests import helpers
from tests.nystrom.cases import BACKENDS, LENGTHS, Case

TOKENS = ("query", "key", "value")


@pytest.fixture(params=BACKENDS)
def op(request):
    return functools.partial(nystrom_attention, backend=request.param)


def cut(arguments: dict, start: int, stop: int) -> dict:
    part = arguments | {x: arguments[x][:, :, start:stop] for x in TOKENS}
    if "key_mask" in arguments:
        part["key_mask"] = arguments["key_mask"][:, start:stop]
    return part


@pytest.fixture(scope="module", params=["plain", "decay-state-padding", "mass"])
def whole(request):
    """A 300-token problem, its outputs and gradients in one piece."""
    case = {
        "plain": Case(300, 8, given_core=True),
        "decay-state-padding": Case(
            300, 8, decay=0.05, state=True, padding=(3, 4), given_core=True
        ),
        "mass": Case(300, 8, normalize="mass", decay=0.05),
    }[request.param]
    arguments = case.arguments()
    if case.normalize == "mass":
        marks = arguments["landmarks"].detach()
        eye = torch.eye(8) + 0.1  # positive: a mass away from zero
        arguments["core"] = eye.expand(*marks.shape[:-1], 8).clone().requires_grad_()
    weights = helpers.randn(1, 1, 300, 16, seed=20)
    out, state = nystrom_attention(**arguments, return_state=True, backend="eager")
    loss = (out * weights).sum() + state.R.sum() + state.L.sum()
    return arguments, weights, out.detach(), state, gradients(loss, arguments)


def gradients(loss, arguments: dict) -> list:
    leaves = [x for x in torch.utils._pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    leaves = [x for x in leaves if x.requires_grad]
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("step", [1, 7, 64], ids=["one-to-100", "every-7th", "every-64th"])
def test_splitting_anywhere_and_carrying_the_state(op, whole, step):
    arguments, weights, wanted, wanted_state, wanted_grads = whole
    positions = {1: range(1, 101), 7: range(101, 300, 7), 64: (64, 128, 192, 256, 299)}[step]
    for position in positions:
        first, state = op(**cut(arguments, 0, position), return_state=True)
        rest = cut(arguments, position, 300) | {"state": state}
        second, state = op(**rest, return_state=True)
        out = torch.cat([first, second], 2)
        helpers.assert_close(out, wanted, 1e-5, f"out cut at {position}")
        helpers.assert_close(state.L, wanted_state.L, 1e-5, f"L cut at {position}")
        helpers.assert_close(state.R, wanted_state.R, 1e-5, f"R cut at {position}")
        if position % 5 == 0 or step > 1:
            loss = (out * weights).sum() + state.R.sum() + state.L.sum()
            for found, expected in zip(gradients(loss, arguments), wanted_grads, strict=True):
                helpers.assert_close(found, expected, 5e-5, f"gradient cut at {position}")


@pytest.mark.parametrize("position", range(1, 300))
def test_every_position(op, position):
    """Outputs and gradients across every possible cut of 300 tokens."""
    arguments, wanted, wanted_grads = _short()
    first, state = op(**cut(arguments, 0, position), return_state=True)
    second = op(**cut(arguments, position, 300), state=state)
    out = torch.cat([first, second], 2)
    helpers.assert_close(out, wanted, 1e-5)
    for found, expected in zip(gradients(out.square().sum(), arguments), wanted_grads, strict=True):
        helpers.assert_close(found, expected, 5e-5)


@functools.cache
def _short():
    arguments = Case(300, 4, dim=8, v_dim=8, decay=0.1).arguments()
    out = nystrom_attention(**arguments, backend="eager")
    return arguments, out.detach(), gradients(out.square().sum(), arguments)


@pytest.mark.parametrize(
    "case",
    [
        Case(70, 8, group=4, batch=2),
        Case(70, 8, decay=0.1, state=True, padding=(3, 2)),
        Case(70, 8, normalize="mass", decay=0.1),
        Case(70, 8, spread=300.0),
    ],
    ids=str,
)
def test_token_by_token_equals_the_whole(op, case):
    arguments = torch.utils._pytree.tree_map_only(
        torch.Tensor, torch.Tensor.detach, case.arguments()
    )
    wanted, wanted_state = op(**arguments, return_state=True)
    state = NystromState(*arguments.pop("state")) if case.state else None
    if state is None:
        state = NystromState.empty(case.batch, 1, case.marks, case.v_dim)
    buffers = NystromState(*(x.clone() for x in state))
    rows = []
    for t in range(case.n):
        rows.append(op(**cut(arguments, t, t + 1), state=buffers, state_out=buffers))
    tolerance = 1e-5 + 2 * 1.2e-7 * case.spread * 20
    helpers.assert_close(torch.cat(rows, 2), wanted, tolerance, "out")
    helpers.assert_close(buffers.L, wanted_state.L, tolerance, "L")
    helpers.assert_close(buffers.R, wanted_state.R, tolerance, "R")


def test_state_out_is_written_in_place_and_returned(op):
    arguments = Case(20, 8).arguments()
    target = NystromState.empty(1, 1, 8, 16)
    with torch.no_grad():
        wanted = op(**arguments, return_state=True)[1]
        out, returned = op(**arguments, return_state=True, state_out=target)
    assert returned is target
    helpers.assert_identical(target.L, wanted.L)
    helpers.assert_identical(target.R, wanted.R)


@pytest.mark.parametrize("decayed", [False, True], ids=["no-decay", "decay"])
def test_states_merge(op, decayed):
    arguments = Case(100, 8, decay=0.1 if decayed else 0.0, padding=(2, 3)).arguments(torch.float64)
    op = functools.partial(nystrom_attention, backend="eager")
    decay = arguments.get("decay")
    ends = [
        op(**cut(arguments, a, b), return_state=True)[1] for a, b in ((0, 30), (30, 70), (70, 100))
    ]
    whole = op(**arguments, return_state=True)[1]
    left_first = ends[0].merge(ends[1], 40, decay).merge(ends[2], 30, decay)
    right_first = ends[0].merge(ends[1].merge(ends[2], 30, decay), 70, decay)
    for merged in (left_first, right_first):
        helpers.assert_close(merged.L, whole.L, 1e-12)
        helpers.assert_close(merged.R, whole.R, 1e-12)
    names = ("key", "value", "landmarks", *(["decay"] if decayed else []))
    leaves = [arguments[name] for name in names]
    found = torch.autograd.grad(left_first.L.sum() + left_first.R.square().sum(), leaves)
    wanted = torch.autograd.grad(whole.L.sum() + whole.R.square().sum(), leaves)
    for actual, expected in zip(found, wanted, strict=True):
        helpers.assert_close(actual, expected, 1e-11)


def test_merging_with_nothing_changes_nothing():
    nothing = NystromState.empty(1, 2, 3, 4)
    L = torch.tensor([[[0.3, -torch.inf, 2.0], [1.0, -4.0, 0.0]]]).requires_grad_()
    state = NystromState(L, helpers.randn(1, 2, 3, 4) * (L.detach() > -torch.inf)[..., None])
    for merged in (nothing.merge(state, 5), state.merge(nothing, 5)):
        helpers.assert_identical(merged.L, state.L)
        helpers.assert_identical(merged.R, state.R)
    (grad,) = torch.autograd.grad(merged.L[merged.L > -torch.inf].sum() + merged.R.sum(), L)
    assert grad.isfinite().all()
    empty = nothing.merge(nothing, 3)
    assert (empty.L == -torch.inf).all() and not empty.R.any()


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_packed_sequences_equal_separate_calls(op, is_causal):
    arguments = Case(
        sum(LENGTHS), 8, packed=True, state=True, group=2, is_causal=is_causal
    ).arguments()
    L, R = arguments.pop("state")
    cu_seqlens = arguments.pop("cu_seqlens")
    out, end = op(**arguments, cu_seqlens=cu_seqlens, state=(L, R), return_state=True)
    for s, (start, stop) in enumerate(
        zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)
    ):
        own = NystromState(L[s : s + 1], R[s : s + 1])
        wanted, wanted_end = op(**cut(arguments, start, stop), state=own, return_state=True)
        helpers.assert_close(out[:, :, start:stop], wanted, 1e-6, f"sequence {s}")
        helpers.assert_close(end.L[s : s + 1], wanted_end.L, 1e-6, f"L of sequence {s}")
        helpers.assert_close(end.R[s : s + 1], wanted_end.R, 1e-6, f"R of sequence {s}")


def test_empty_packed_sequences_keep_their_state(op):
    arguments = Case(10, 4, state=True).arguments()
    L, R = (helpers.randn(4, 1, 4, *rest, seed=3) for rest in ((), (16,)))
    cu_seqlens = torch.tensor([0, 0, 6, 6, 10], dtype=torch.int32)
    out, end = op(**(arguments | {"state": (L, R)}), cu_seqlens=cu_seqlens, return_state=True)
    assert out.isfinite().all()
    for s in (0, 2):
        helpers.assert_identical(end.L[s], L[s])
        helpers.assert_identical(end.R[s], R[s])


def test_no_tokens_at_all(op):
    arguments = Case(5, 4, state=True).arguments()
    arguments |= {x: arguments[x][:, :, :0] for x in TOKENS}
    out, end = op(**arguments, return_state=True)
    assert out.shape == (1, 1, 0, 16)
    helpers.assert_identical(end.L, arguments["state"][0])
    (end.R.sum() + end.L.sum() + out.sum()).backward()
    assert (arguments["state"][1].grad == 1).all()


@pytest.mark.parametrize("case", [
    Case(300, 8),
    Case(300, 64, dim=64, decay=0.1, group=4),
    Case(300, 8, normalize="mass", padding=(5, 0)),
    Case(300, 8, is_causal=False, kv_len=70),
    Case(300, 8, landmarks="pair"),
], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore:untied landmarks")
def test_a_constant_value_comes_back(op, case):
    arguments = case.arguments()
    constant = helpers.randn(1, 1, 1, 16, seed=30)
    value = constant.expand_as(arguments["value"]).contiguous()
    out = op(**(arguments | {"value": value}))
    first = 5 if case.padding else 0
    tolerance = 1e-5 if case.landmarks == "pair" or case.normalize == "mass" else 1e-6
    helpers.assert_close(out[:, :, first:], constant.expand_as(out)[:, :, first:], tolerance)


@pytest.mark.parametrize("first", [0, 1, 17, 64, 100])
@pytest.mark.parametrize("normalize", ["landmark", "mass"])
def test_the_first_visible_key_s_row_returns_its_value(op, first, normalize):
    arguments = Case(130, 8, padding=(first, 0), normalize=normalize, group=2).arguments()
    out = op(**arguments)
    wanted = arguments["value"][:, :, first].expand(1, 2, 16)
    helpers.assert_close(out[:, :, first], wanted, 1e-5)
    assert not out[:, :, :first].any()
