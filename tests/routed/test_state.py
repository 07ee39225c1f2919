"""Summaries of blocks carried from call to call: any cut gives what one call gives."""

from __future__ import annotations

import functools
import io

import pytest
import torch

import flashmark
from flashmark import RoutedState
from flashmark.routed.summaries import update_summaries
from tests import helpers
from tests.routed.test_eager import SIZE, inputs, landmarks

N = 37
attention = functools.partial(flashmark.routed_attention, block_size=SIZE, top_k=2, backend="eager")


def tensors(**options):
    return [x.detach() for x in inputs(**options).values()]


@pytest.mark.parametrize("marks", [None, 3], ids=["mean", "landmarks"])
def test_a_cut_at_every_position(marks):
    query, key, value = tensors()
    marks = None if marks is None else landmarks()
    whole, last = attention(query, key, value, marks, return_state=True)
    for cut in range(N + 1):
        before = key[:, :, :cut], value[:, :, :cut]
        first, state = attention(query[:, :, :cut], *before, marks, return_state=True)
        assert state.keys.shape[2] == cut // SIZE
        second, found = attention(
            query[:, :, cut:], key, value, marks, state=state, return_state=True
        )
        helpers.assert_close(torch.cat([first, second], 2), whole, 1e-6)
        for a, b in zip(found, last, strict=True):
            helpers.assert_close(a, b, 1e-6)


def test_token_by_token_with_the_state_of_the_call_before():
    query, key, value = tensors()
    whole = attention(query, key, value, landmarks())
    state, parts = None, []
    for n in range(1, N + 1):
        seen = (x[:, :, :n] for x in (key, value))
        out, state = attention(
            query[:, :, n - 1 : n], *seen, landmarks(), state=state, return_state=True
        )
        parts.append(out)
    helpers.assert_close(torch.cat(parts, 2), whole, 1e-6)


def test_what_the_state_holds_is_not_read_again():
    query, key, value = tensors()
    _, state = attention(query, key, value, return_state=True)
    moved = RoutedState(state.keys * 2.0, state.log_counts)
    _, found = attention(query, key, value, state=moved, return_state=True)
    helpers.assert_identical(found.keys, moved.keys)


@pytest.mark.parametrize("cut", [0, 8, 36])
def test_merge_joins_parts_that_begin_with_a_block(cut):
    query, key, value = tensors()
    _, whole = attention(query, key, value, landmarks(), return_state=True)
    parts = [
        attention(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], landmarks(),
                  return_state=True)[1]
        for a, b in ((0, cut), (cut, N))
    ]  # fmt: skip
    for a, b in zip(parts[0].merge(parts[1]), whole, strict=True):
        helpers.assert_close(a, b, 1e-6)


def test_an_empty_state_is_where_a_stream_begins():
    query, key, value = tensors()
    empty = RoutedState.empty(2, 2, 3, 8)
    helpers.assert_identical(
        attention(query, key, value, landmarks(), state=empty),
        attention(query, key, value, landmarks()),
    )
    held = RoutedState.empty(2, 2, 3, 8, blocks=5, dtype=torch.float64)
    assert held.keys.shape == (2, 2, 5, 3, 8) and held.keys.dtype == torch.float64
    assert not held.keys.any() and (held.log_counts == float("-inf")).all()


def test_a_state_is_wide_and_without_gradient():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        _, state = attention(*inputs(dtype=dtype).values(), return_state=True)
        assert all(x.dtype == wide and not x.requires_grad for x in state)


def test_a_state_is_saved_and_loaded():
    _, state = attention(*tensors(), landmarks(), return_state=True)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    assert isinstance(loaded, RoutedState)
    for a, b in zip(loaded, state, strict=True):
        helpers.assert_identical(a, b)


def test_a_state_with_lengths_and_offsets_of_a_preallocated_cache():
    """All blocks that fit are in the state; those that are not finished are not chosen."""
    query, key, value = tensors(q_len=1, kv_len=40)
    lengths = torch.tensor([22, 33])
    options = {"query_offset": lengths - 1, "kv_lengths": lengths}
    state = RoutedState.empty(2, 2, 3, 8, blocks=10)
    state.keys.fill_(1e4)  # of cropped tokens, say
    state.log_counts.fill_(1.0)
    update_summaries(
        state, key, landmarks(), 8**-0.5, torch.zeros(2).int(), lengths.int(), 33, SIZE
    )
    helpers.assert_close(
        attention(query, key, value, landmarks(), state=state, **options),
        attention(query, key, value, landmarks(), **options),
        1e-6,
    )


@pytest.mark.parametrize("marks", [None, 3], ids=["mean", "landmarks"])
def test_updates_in_place_give_what_one_pass_gives(marks):
    _, key, value = tensors(kv_len=40)
    marks = None if marks is None else landmarks()
    query = torch.randn(2, 4, 40, 8)
    _, whole = attention(query, key, value, marks, return_state=True)
    state = RoutedState.empty(2, 2, 1 if marks is None else 3, 8, blocks=10)
    held = torch.zeros(2, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    while bool((held < 40).any()):
        new = torch.randint(0, 7, (2,), generator=generator, dtype=torch.int32)
        end = (held + new).clamp(max=40)
        update_summaries(state, key, marks, 8**-0.5, held, end, 6, SIZE)
        held = end
    for a, b in zip(state, whole, strict=True):
        helpers.assert_close(a, b, 1e-6)


def test_an_update_of_no_token_changes_nothing():
    _, key, _ = tensors(kv_len=40)
    state = RoutedState.empty(2, 2, 3, 8, blocks=10)
    state.keys.fill_(3.0)
    for begin in ([0, 40], [7, 39], [40, 40]):
        at = torch.tensor(begin, dtype=torch.int32)
        update_summaries(state, key, landmarks(), 1.0, at, at, 5, SIZE)
        update_summaries(state, key, landmarks(), 1.0, at, at, 0, SIZE)
    # a block that tokens stand in is summarised anew where some of its keys are held
    untouched = torch.tensor([n for n in range(10) if n not in (1, 9)])
    assert (state.keys[:, :, untouched] == 3.0).all()
