"""Nothing of the future reaches an output: to the bit, whatever the future holds."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from flashmark import hybrid_attention
from tests import helpers
from tests.hybrid.cases import BACKENDS, MERGES, PACKED, Case, detached, tokens

CASES = [
    Case(80, 8, 5, "slots", group=2),
    Case(80, 8, 5, "mass"),
    Case(80, 8, 5, "gate"),
    Case(80, 5, 70, "slots", padding=(3, 0)),
]
POISON = [float("nan"), float("inf"), -float("inf"), 1e4]
AT = (0, 16, 39)


@pytest.fixture(params=BACKENDS)
def op(request):
    return functools.partial(hybrid_attention, backend=request.param)


def whole(op, arguments: dict) -> torch.Tensor:
    return op(**arguments)


def in_three_calls(op, arguments: dict) -> torch.Tensor:
    outs, state = [], None
    for part in (slice(0, 19), slice(19, 22), slice(22, None)):
        out, state = op(**tokens(arguments, part), state=state, return_state=True)
        outs.append(out)
    return torch.cat(outs, 2)


@pytest.mark.parametrize("run", [whole, in_three_calls])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_poisoned_future_queries_and_keys_change_no_bit(op, case, run):
    arguments = detached(case.arguments())
    clean = run(op, arguments)
    for i, poison in itertools.product(AT, POISON):
        poisoned = {x: arguments[x].clone() for x in ("query", "key")}
        for x in poisoned.values():
            x[:, :, i + 1 :] = poison
        out = run(op, arguments | poisoned)
        helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"{poison} after {i}")


@pytest.mark.parametrize("run", [whole, in_three_calls])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_huge_future_values_change_no_bit(op, case, run):
    arguments = detached(case.arguments())
    clean = run(op, arguments)
    for i in AT:
        for poison in (1e30, -1e30):
            value = arguments["value"].clone()
            value[:, :, i + 1 :] = poison
            out = run(op, arguments | {"value": value})
            helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"after {i}")


@pytest.mark.parametrize("run", [whole, in_three_calls])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_with_respect_to_the_future_are_exactly_zero(op, case, run):
    for i in (0, 16, 40):
        arguments = case.arguments()
        out = run(op, arguments)
        out[:, :, i].sum().backward()
        for x in ("query", "key", "value"):
            assert not arguments[x].grad[:, :, i + 1 :].any(), f"{x} after {i}"
        assert not arguments["query"].grad[:, :, :i].any()
        assert i == 0 or arguments["key"].grad[:, :, 3 : i + 1].any()


@pytest.mark.parametrize("merge", MERGES)
def test_every_key_of_the_past_counts(op, merge):
    arguments = Case(60, 8, 5, merge).arguments()
    op(**arguments)[:, :, -1].sum().backward()
    for x in ("key", "value"):
        assert arguments[x].grad.abs().amax(-1).all(), x


@pytest.mark.parametrize("merge", MERGES)
def test_packed_sequences_do_not_see_each_other(op, merge):
    arguments = detached(Case(PACKED, 8, 5, merge, packed=True).arguments())
    clean = op(**arguments)
    bounds = arguments["cu_seqlens"].tolist()
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        others = torch.ones(PACKED, dtype=torch.bool)
        others[start:stop] = False
        poisoned = {x: arguments[x].clone() for x in ("query", "key", "value")}
        for x in poisoned.values():
            x[:, :, others] = torch.nan
        out = op(**(arguments | poisoned))
        helpers.assert_identical(out[:, :, start:stop], clean[:, :, start:stop])
