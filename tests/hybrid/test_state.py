"""A state carries a stream from call to call: any split gives the outputs of one call."""

from __future__ import annotations

import functools

import pytest
import torch

from flashmark import HybridState, hybrid_attention
from tests import helpers
from tests.hybrid.cases import BACKENDS, LENGTHS, MERGES, PACKED, Case, detached, tokens


@pytest.fixture(params=BACKENDS)
def op(request):
    return functools.partial(hybrid_attention, backend=request.param)


def split(op, arguments: dict, cuts: tuple[int, ...], state=None):
    """Outputs and last state of calls that end at `cuts`."""
    outs, start = [], 0
    for stop in cuts:
        part = tokens(arguments, slice(start, stop))
        out, state = op(**part, state=state, return_state=True)
        outs.append(out)
        start = stop
    return torch.cat(outs, 2), state


def leaves(arguments: dict) -> list[torch.Tensor]:
    names = ("query", "key", "value", "landmarks", "gate")
    return [arguments[x] for x in names if x in arguments]


CUTS = {
    "one-call": (26,),
    "at-chunks": (6, 12, 24, 26),
    "beside-chunks": (1, 5, 7, 17, 26),
    "with-an-empty-call": (15, 15, 26),
    "tokens": tuple(range(1, 27)),
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_any_split_gives_the_same_outputs_and_gradients(op, merge, cuts):
    arguments = Case(26, 6, 5, merge, group=2, batch=2, v_dim=5, padding=(7, 4)).arguments()
    whole = op(**arguments)
    out, state = split(op, arguments, cuts)
    assert state.position.tolist() == [26, 26]
    helpers.assert_close(out, whole, 1e-6)
    weights = helpers.randn(*whole.shape, seed=3)
    wanted = torch.autograd.grad(whole, leaves(arguments), weights)
    found = torch.autograd.grad(out, leaves(arguments), weights)
    for actual, expected in zip(found, wanted, strict=True):
        helpers.assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("window", [1, 3, 64])
def test_windows_of_one_token_and_longer_than_the_stream(op, merge, window):
    arguments = detached(Case(20, window, 5, merge).arguments())
    for cuts in ((7, 20), tuple(range(1, 21))):
        helpers.assert_close(split(op, arguments, cuts)[0], op(**arguments), 1e-6)


@pytest.mark.parametrize("merge", MERGES)
def test_the_state_does_not_grow_and_does_not_depend_on_the_split(merge):
    arguments = detached(Case(26, 6, 5, merge).arguments())
    empty = Case(26, 6, 5, merge).empty_state()
    states = [split(hybrid_attention, arguments, cuts, empty)[1] for cuts in CUTS.values()]
    flat = [torch.utils._pytree.tree_leaves(state) for state in states]
    shapes = [x.shape for x in torch.utils._pytree.tree_leaves(empty)]
    live = 6 + 26 % 6  # what lies behind is not a token yet
    for parts in flat:
        assert [x.shape for x in parts] == shapes
        for actual, wanted in zip(parts[4:], flat[0][4:], strict=True):
            helpers.assert_close(actual, wanted, 1e-5)
        for n in (2, 3):
            assert torch.equal(parts[n][:, :, :live], flat[0][n][:, :, :live])


@pytest.mark.parametrize("merge", MERGES)
def test_packed_prompts_then_one_token_for_each(op, merge):
    """States of packed sequences lead with their number, each at a position of its own."""
    case = Case(PACKED, 8, 5, merge, packed=True, group=2)
    arguments = detached(case.arguments())
    rows = len(LENGTHS)
    out, state = op(**arguments, return_state=True)
    helpers.assert_close(out, op(**arguments), 1e-6)
    assert state.position.tolist() == list(LENGTHS)
    again = detached(Case(2, 8, 5, merge, batch=rows, group=2).arguments())
    next_out, next_state = split(op, again | {"landmarks": arguments["landmarks"]}, (1, 2), state)
    start = 0
    for s, length in enumerate(LENGTHS):
        own = tokens(arguments, slice(start, start + length))
        del own["cu_seqlens"]
        one = {
            x: torch.cat([own[x], again[x][s : s + 1]], 2)
            for x in ("query", "key", "value", "gate")
            if x in own
        }
        wanted = op(**(own | one))
        helpers.assert_close(next_out[s : s + 1], wanted[:, :, length:], 1e-6)
        assert int(next_state.position[s]) == length + 2
        start += length


@pytest.mark.parametrize("merge", MERGES)
def test_packed_sequences_go_on_from_states(op, merge):
    arguments = Case(PACKED, 8, 5, merge, packed=True, padding=(5, 30)).arguments()
    _, state = op(**arguments, return_state=True)
    out, _ = op(**arguments, state=state, return_state=True)
    helpers.assert_close(op(**arguments, state=state), out, 1e-6)
    bounds = arguments.pop("cu_seqlens").tolist()
    outs = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        part = tokens(arguments, slice(start, stop))
        _, own = op(**part, return_state=True)
        outs.append(op(**part, state=own))
    wanted = torch.cat(outs, 2)
    helpers.assert_close(out, wanted, 1e-6)
    weights = helpers.randn(*out.shape, seed=3)
    found = torch.autograd.grad(out, leaves(arguments), weights)
    expected = torch.autograd.grad(wanted, leaves(arguments), weights)
    for actual, want in zip(found, expected, strict=True):
        helpers.assert_close(actual, want, 1e-5)


def test_a_state_in_half_precision_keeps_its_sums_in_float32(op):
    arguments = detached(Case(50, 8, 5).arguments(torch.bfloat16))
    out, state = split(op, arguments, (30, *range(31, 51)))
    assert state.key.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in state.far)
    exact = hybrid_attention(**{x: y.double() if torch.is_tensor(y) else y
                                for x, y in arguments.items()})  # fmt: skip
    helpers.assert_close(out, exact, 2e-2)


def test_an_empty_state_is_no_state(op):
    case = Case(20, 8, 5)
    arguments = detached(case.arguments())
    helpers.assert_close(op(**arguments, state=case.empty_state()), op(**arguments), 1e-6)
    assert HybridState.empty(1, 1, 5, 16, window=8).value.shape == (1, 1, 16, 16)
