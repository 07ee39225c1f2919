"""The Nyström kernels let nothing of the future through, and carry their state exactly."""

from __future__ import annotations

import pytest
import torch

from flashmark.kernels.nystrom import configs
from flashmark.nystrom import NystromState, nystrom_attention
from tests import helpers
from tests.interpreter.nystrom_backend import op, shorten
from tests.nystrom.cases import LENGTHS, PACKED, Case

N = 75  # tokens: chunks of 16, stretches of 32
CASES = {
    "plain": Case(N, 8),
    "grouped-decay": Case(N, 13, group=2, decay=0.05),
    "mass": Case(N, 8, normalize="mass"),
    "padded": Case(N, 8, padding=(5, 0)),
    "state": Case(N, 8, state=True),
    "many-landmarks": Case(40, 70),
}
POISON = [float("nan"), float("inf"), -float("inf"), 1e4]


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    shorten(monkeypatch, 32)


@pytest.fixture(params=["one-pass", "three-launches"])
def launches(request, monkeypatch):
    monkeypatch.setattr(configs, "SERIAL_TOKENS", 512 if request.param == "one-pass" else 0)


def plain(case: Case) -> dict:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, case.arguments())


@pytest.mark.parametrize("poison", POISON, ids=["nan", "inf", "-inf", "1e4"])
@pytest.mark.parametrize("name", CASES)
def test_poisoned_future_queries_and_keys_change_no_bit(launches, name, poison):
    arguments = plain(CASES[name])
    clean = op(**arguments)
    for i in (5, 31, arguments["query"].shape[2] - 2):
        poisoned = {x: arguments[x].clone() for x in ("query", "key")}
        for x in poisoned.values():
            x[:, :, i + 1 :] = poison
        out = op(**(arguments | poisoned))
        helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"after {i}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_poison_changes_no_bit_in_half_precision(launches, dtype):
    arguments = Case(N, 8, decay=0.05).arguments(dtype)
    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    clean = op(**arguments)
    for i in (0, 31):
        poisoned = {x: arguments[x].clone() for x in ("query", "key")}
        for x in poisoned.values():
            x[:, :, i + 1 :] = torch.nan
        out = op(**(arguments | poisoned))
        helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"after {i}")


@pytest.mark.parametrize("poison", [1e30, -1e30])
def test_huge_future_values_change_no_bit(launches, poison):
    arguments = plain(CASES["plain"])
    clean = op(**arguments)
    for i in (0, 31, 32):
        value = arguments["value"].clone()
        value[:, :, i + 1 :] = poison
        out = op(**(arguments | {"value": value}))
        helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"after {i}")


@pytest.mark.parametrize("factor", [30.0, 1e4])
def test_a_future_rise_changes_no_bit(launches, factor):
    """A key that cuts its chunk leaves the rows before it as they are."""
    arguments = plain(Case(N, 8, group=2))
    clean = op(**arguments)
    for i in (0, 32):
        key = arguments["key"].clone()
        key[:, :, i + 1] *= factor
        out = op(**(arguments | {"key": key}))
        helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"after {i}")


@pytest.mark.parametrize("name", CASES)
def test_gradients_with_respect_to_the_future_are_exactly_zero(name):
    for i in (17, 32):
        arguments = CASES[name].arguments()
        op(**arguments)[:, :, i].sum().backward()
        for x in ("query", "key", "value"):
            assert not arguments[x].grad[:, :, i + 1 :].any(), f"{x} after {i}"
        assert not arguments["query"].grad[:, :, :i].any()


def test_gradients_of_steep_chunks_do_not_reach_the_future():
    for i in (3, 35):
        arguments = Case(40, 8, spread=300.0).arguments()
        op(**arguments)[:, :, i].sum().backward()
        for x in ("query", "key", "value"):
            assert not arguments[x].grad[:, :, i + 1 :].any(), f"{x} after {i}"


def test_packed_sequences_do_not_see_each_other():
    arguments = plain(Case(PACKED, 8, packed=True, decay=0.1))
    clean, state = op(**arguments, return_state=True)
    assert state.L.shape[0] == len(LENGTHS)
    bounds = arguments.pop("cu_seqlens").tolist()
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = {x: arguments[x][:, :, start:stop] for x in ("query", "key", "value")}
        out, end = op(**(arguments | own), return_state=True)
        helpers.assert_close(clean[:, :, start:stop], out, 1e-5, f"sequence {s}")
        helpers.assert_close(state.R[s : s + 1], end.R, 1e-5, f"state of sequence {s}")


def test_packed_sequences_may_be_empty():
    arguments = plain(Case(70, 8))
    bounds = torch.tensor([0, 0, 3, 3, 70, 70], dtype=torch.int32)
    out, state = op(**arguments, cu_seqlens=bounds, return_state=True)
    wanted, wanted_state = nystrom_attention(
        **arguments, cu_seqlens=bounds, return_state=True, backend="eager"
    )
    helpers.assert_close(out, wanted, 1e-5)
    for actual, expected in zip(state, wanted_state, strict=True):
        helpers.assert_close(actual, expected, 1e-5)


SPLIT = {
    "plain": Case(N, 8),
    "decay-groups": Case(N, 13, group=2, decay=0.1),
    "mass-padded": Case(N, 8, normalize="mass", padding=(20, 9)),
}


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_sequence_carries_its_state_and_its_gradients(name):
    def run(*cuts):
        arguments = SPLIT[name].arguments()
        mask = arguments.pop("key_mask", None)
        bounds, state, outs = [0, *cuts, N], None, []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            tokens = {x: arguments[x][:, :, start:stop] for x in ("query", "key", "value")}
            own = None if mask is None else mask[:, start:stop]
            out, state = op(**(arguments | tokens), key_mask=own, state=state, return_state=True)
            outs.append(out)
        out = torch.cat(outs, 2)
        leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
        loss = (out * helpers.randn(*out.shape, seed=7)).sum() + state.R.square().sum()
        return out.detach(), *state, *torch.autograd.grad(loss, leaves)

    whole = run()
    for cuts in ((1,), (32, 41), (10, 50, 74)):
        for actual, wanted in zip(run(*cuts), whole, strict=True):
            helpers.assert_close(actual, wanted, 2e-5, f"split at {cuts}")


@pytest.mark.parametrize("step", [1, 3, 16])
@pytest.mark.parametrize("case", [Case(48, 8, group=2, decay=0.1), Case(48, 13, normalize="mass")],
                         ids=str)  # fmt: skip
def test_decoding_equals_prefill(case, step):
    arguments = plain(case)
    wanted, end = op(**arguments, return_state=True)
    state = NystromState.empty(1, 1, case.marks, case.v_dim)
    outs = []
    for t in range(0, case.n, step):
        tokens = {x: arguments[x][:, :, t : t + step] for x in ("query", "key", "value")}
        out, state = op(**(arguments | tokens), state=state, return_state=True)
        outs.append(out)
    helpers.assert_close(torch.cat(outs, 2), wanted, 1e-5)
    for actual, expected in zip(state, end, strict=True):
        helpers.assert_close(actual, expected, 1e-5)


def test_merging_states_is_consuming_one_after_the_other():
    arguments = plain(Case(N, 8, decay=0.1))
    _, whole = op(**arguments, return_state=True)
    halves = []
    for part in (slice(0, 35), slice(35, N)):
        tokens = {x: arguments[x][:, :, part] for x in ("query", "key", "value")}
        halves.append(op(**(arguments | tokens), return_state=True)[1])
    merged = halves[0].merge(halves[1], N - 35, arguments["decay"])
    for actual, wanted in zip(merged, whole, strict=True):
        helpers.assert_close(actual, wanted, 1e-5)
