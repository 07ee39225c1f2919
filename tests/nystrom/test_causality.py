"""Nothing of the future reaches an output: to the bit, whatever the future holds."""

from __future__ import annotations

import functools

import pytest
import torch

from flashmark.nystrom import nystrom_attention
from tests import helpers
from tests.nystrom.cases import BACKENDS, Case

CASES = {
    "plain": Case(150, 8),
    "grouped-decay": Case(150, 13, group=4, decay=0.05),
    "mass": Case(150, 8, normalize="mass"),
    "padded": Case(150, 8, padding=(5, 0)),
    "state": Case(150, 8, state=True),
    "many-landmarks": Case(150, 70),
}
POISON = [float("nan"), float("inf"), -float("inf"), 1e4]


@pytest.fixture(params=BACKENDS)
def op(request):
    return functools.partial(nystrom_attention, backend=request.param)


def plain(case: Case) -> dict:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, case.arguments())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("poison", POISON, ids=["nan", "inf", "-inf", "1e4"])
def test_poisoned_future_queries_and_keys_change_no_bit(op, name, poison):
    arguments = plain(CASES[name])
    clean = op(**arguments)
    for i in (0, 4, 5, 40, 62, 63, 64, 100, 127, 148):
        poisoned = {x: arguments[x].clone() for x in ("query", "key")}
        for x in poisoned.values():
            x[:, :, i + 1 :] = poison
        out = op(**(arguments | poisoned))
        helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"after {i}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("poison", [1e30, -1e30])
def test_huge_future_values_change_no_bit(op, name, poison):
    arguments = plain(CASES[name])
    clean = op(**arguments)
    for i in (0, 5, 63, 64, 100, 148):
        value = arguments["value"].clone()
        value[:, :, i + 1 :] = poison
        out = op(**(arguments | {"value": value}))
        helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"after {i}")


@pytest.mark.parametrize("factor", [30.0, 300.0, 1e4])
def test_a_future_rise_changes_no_bit(op, factor):
    """A key that forces the exact path leaves the rows before it on the fast one."""
    arguments = plain(Case(150, 8, group=2))
    clean = op(**arguments)
    for i in (0, 30, 64, 100):
        key = arguments["key"].clone()
        key[:, :, i + 1] *= factor
        out = op(**(arguments | {"key": key}))
        helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"after {i}")


@pytest.mark.parametrize("name", CASES)
def test_gradients_with_respect_to_the_future_are_exactly_zero(op, name):
    for i in (0, 17, 63, 64, 100):
        arguments = CASES[name].arguments()
        out = op(**arguments)
        out[:, :, i].sum().backward()
        for x in ("query", "key", "value"):
            assert not arguments[x].grad[:, :, i + 1 :].any(), f"{x} after {i}"
        assert not arguments["query"].grad[:, :, :i].any()
        assert arguments["query"].grad[:, :, i].any() or i == 0  # one key: nothing to choose from


@pytest.mark.parametrize("factor", [300.0, 1e4])
def test_gradients_of_steep_chunks_do_not_reach_the_future(op, factor):
    for i in (3, 30, 70):
        arguments = Case(100, 8, spread=factor).arguments()
        op(**arguments)[:, :, i].sum().backward()
        for x in ("query", "key", "value"):
            assert not arguments[x].grad[:, :, i + 1 :].any(), f"{x} after {i}"


def test_a_longer_sequence_starts_with_the_shorter_one(op):
    arguments = plain(Case(200, 8, decay=0.1))
    whole = op(**arguments)
    for n in (1, 2, 63, 64, 65, 130):
        part = {x: arguments[x][:, :, :n] for x in ("query", "key", "value")}
        helpers.assert_close(op(**(arguments | part)), whole[:, :, :n], 1e-5)


def test_packed_sequences_do_not_see_each_other(op):
    arguments = plain(Case(495, 8, packed=True))
    clean = op(**arguments)
    bounds = arguments["cu_seqlens"].tolist()
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        others = torch.ones(495, dtype=torch.bool)
        others[start:stop] = False
        poisoned = {x: arguments[x].clone() for x in ("query", "key")}
        for x in poisoned.values():
            x[:, :, others] = torch.nan
        out = op(**(arguments | poisoned))
        helpers.assert_identical(out[:, :, start:stop], clean[:, :, start:stop], f"sequence {s}")
