"""RoutedAttention: the operator on projections, block summaries in its cache, learned landmarks."""

from __future__ import annotations

import pytest
import torch

import flashmark
from flashmark.nn import BlockSparseAttention, RoutedAttention, apply_rotary, rotary_angles
from flashmark.objectives import routing_loss
from flashmark.routed import RoutedState
from tests import helpers
from tests.nn.test_cache import WIDTH
from tests.nn.test_modules import heads

N, SIZE = 37, 4


def made(landmarks: int | None = 3, **options):
    return RoutedAttention(
        WIDTH, 4, landmarks, **{"num_kv_heads": 2, "block_size": SIZE, "top_k": 2} | options
    )


@pytest.mark.parametrize("landmarks", [None, 3])
def test_is_the_operator_on_the_projections(landmarks):
    module, x = made(landmarks, rotary=10_000.0), helpers.randn(2, N, WIDTH)
    query, key, value = (heads(x, module, part) for part in range(3))
    angles = rotary_angles(torch.arange(N)[None], module.head_dim)
    out = flashmark.routed_attention(
        apply_rotary(query, angles), apply_rotary(key, angles), value, module.landmarks,
        block_size=SIZE, top_k=2, near=1,
    )  # fmt: skip
    helpers.assert_close(module(x), module.merge_heads(out), 1e-5)


def test_is_exact_attention_where_all_blocks_are_chosen():
    module = made(top_k=N, rotary=10_000.0)
    exact = BlockSparseAttention(WIDTH, 4, num_kv_heads=2, rotary=10_000.0)
    exact.load_state_dict(module.state_dict(), strict=False)
    x = helpers.randn(2, N, WIDTH)
    helpers.assert_close(module(x), exact(x), 1e-5)


@pytest.mark.parametrize("landmarks", [None, 3])
def test_a_cut_at_every_position_gives_what_one_call_gives(landmarks):
    module, x = made(landmarks).requires_grad_(False), helpers.randn(2, N, WIDTH)
    whole = module(x)
    for cut in range(N + 1):
        cache = module.init_cache(2, N + 2)
        out = torch.cat([module(part, cache=cache) for part in x.split([cut, N - cut], 1)], 1)
        helpers.assert_close(out, whole, 1e-5)


def test_summaries_are_written_in_place_and_are_those_of_one_pass():
    module, x = made().requires_grad_(False), helpers.randn(2, N, WIDTH)
    cache = module.init_cache(2, N)
    places = [t.data_ptr() for t in cache.state]
    for part in x.split([6, 1, 1, 0, 20, 9], 1):
        module(part, cache=cache)
    assert [t.data_ptr() for t in cache.state] == places
    query, key, value = (heads(x, module, part) for part in range(3))
    _, state = flashmark.routed_attention(
        query, key, value, module.landmarks, block_size=SIZE, return_state=True
    )
    finished = N // SIZE
    for held, expected in zip(cache.state, state, strict=True):
        assert held.shape[2] == -(-N // SIZE)
        helpers.assert_close(held[:, :, :finished], expected, 1e-5)


def test_samples_of_different_lengths_are_summarised_each_at_its_own_place():
    module, x = made().requires_grad_(False), helpers.randn(2, N, WIDTH)
    key_mask = torch.ones(2, N, dtype=torch.bool)
    key_mask[0, :10] = key_mask[1, 3:6] = False
    cache = module.init_cache(2, N)
    for part, mask in zip(x.split([11, 1, 25], 1), key_mask.split([11, 1, 25], 1), strict=True):
        module(part, key_mask=mask, cache=cache)
    for row, mask in enumerate(key_mask):
        alone = module.init_cache(1, N)
        module(x[row : row + 1, mask], cache=alone)
        finished = int(mask.sum()) // SIZE
        for held, expected in zip(cache.state, alone.state, strict=True):
            helpers.assert_close(held[row, :, :finished], expected[0, :, :finished], 1e-5)


def test_an_empty_cache_holds_no_keys():
    cache = made().init_cache(2, 9)
    assert cache.max_length == 9 and cache.key.shape == (2, 2, 12, 8)
    expected = RoutedState.empty(2, 2, 3, 8, blocks=3)
    for held, empty in zip(cache.state, expected, strict=True):
        helpers.assert_identical(held, empty)


def test_routing_is_recorded_where_asked_for():
    module, x = made(), helpers.randn(2, N, WIDTH)
    module(x)
    assert module.routing is None
    module.record_routing = True
    expected = module(x)
    assert module.routing.indices.shape == (2, 2, N, 2)
    module.record_routing = False
    helpers.assert_identical(module(x), expected)


def test_the_routing_loss_trains_landmarks_alone():
    module, x = made(), helpers.randn(2, N, WIDTH)
    module.record_routing = True
    module(x)
    routing_loss(module.routing).backward()
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["landmarks"]
    assert module.landmarks.grad.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"landmarks": 0}, "landmarks: expected an int >= 1, got 0"),
        ({"block_size": 0}, "block_size: expected an int >= 1, got 0"),
        ({"block_size": 4.0}, "block_size: expected an int >= 1, got float"),
        ({"top_k": -1}, "top_k: expected an int >= 0, got -1"),
        ({"near": True}, "near: expected an int >= 0, got bool"),
        ({"rotary": True}, "rotary: expected False or the base"),
    ],
    ids=lambda x: None if isinstance(x, str) else str(x),
)
def test_bad_options(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        made(**options)
