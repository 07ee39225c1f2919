"""The C++ kernels where queries are few and keys many: each tile's keys are shared out in parts of
2048, merged by their lse."""

from __future__ import annotations

import pytest
import torch

from flashmark import masks
from tests import helpers
from tests.block_sparse.test_cpu import MASKS, ROUNDING, WINDOW, Case, inputs, lengths, seed_of

CACHE = 5000
LONG_CACHE = {
    "causal": ({"heads": 2}, masks.causal(), {}),
    "window": ({"heads": 2}, WINDOW, {}),
    "sink-window": ({"heads": 2}, MASKS["sink-window"], {}),
    "grouped": ({"heads": 4, "kv_heads": 2, "dim": 33}, masks.causal(), {}),
    "every-feature": (
        {"heads": 4, "kv_heads": 2, "bias": (4, 2 * CACHE - 1), "sinks": True, "v_dim": 20},
        masks.causal(),
        {"softcap": 2.0, "dropout_p": 0.3, "dropout_seed": seed_of(4)},
    ),
}


def long_cache(name: str, q_len: int, **more) -> Case:
    extra, mask, options = LONG_CACHE[name]
    tensors = inputs(q_len=q_len, kv_len=CACHE, **extra, **more)
    at = {"query_offset": lengths(CACHE - q_len, 2047), "kv_lengths": lengths(CACHE, 4100)}
    return Case(tensors, mask, rows=CACHE, block_size=128, **at, **options)


@pytest.mark.parametrize("q_len", [1, 3, 8, 70])
@pytest.mark.parametrize("name", LONG_CACHE)
def test_few_queries_of_a_long_cache(name, q_len):
    long_cache(name, q_len).check()


@pytest.mark.parametrize("q_len", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("mask", ["causal", "head-wise"])
def test_heads_that_share_keys_differ_in_mask_bias_and_sink(mask, q_len):
    tensors = inputs(2, 8, q_len, 33, kv_len=300, v_dim=70, kv_heads=2, sinks=True)
    tensors["bias"] = helpers.randn(1, 8, q_len, 300, seed=8)
    Case(tensors, MASKS[mask], softcap=3.0, dropout_p=0.2, dropout_seed=seed_of(3)).check()


@pytest.mark.parametrize("kv_len", [2047, 2048, 2049, 4096])
@pytest.mark.parametrize("q_len", [1, 40])
def test_caches_that_end_beside_a_part(kv_len, q_len):
    Case(inputs(1, 1, q_len, 8, kv_len=kv_len, sinks=True), masks.causal()).check()


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("q_len", [1, 70])
def test_few_queries_of_a_long_cache_in_half_precision(dtype, q_len):
    case = long_cache("grouped", q_len, dtype=dtype)
    exact, plain, actual = case.define(), case.define(dtype), case.run()
    for name, expected in exact.items():
        allowed = 2 * helpers.relative_error(plain[name], expected) + 2 * ROUNDING[dtype]
        helpers.assert_close(actual[name], expected, allowed, name)


@pytest.mark.parametrize("seen", [1, 2000, 2048, 2049, 4500])
def test_rows_of_a_long_cache_beyond_the_lengths_may_hold_anything(seen):
    clean = inputs(1, 2, 1, kv_len=CACHE, kv_heads=1)
    spoilt = {name: t.clone() for name, t in clean.items()}
    for name in ("key", "value"):
        spoilt[name][:, :, seen:] = float("nan")
    at = {"query_offset": lengths(seen - 1), "kv_lengths": lengths(seen)}
    found = [Case(t, masks.causal(), rows=CACHE, **at).run() for t in (clean, spoilt)]
    for name, expected in found[0].items():
        helpers.assert_identical(found[1][name], expected, name)


def test_samples_without_keys_in_a_long_cache():
    at = {"query_offset": lengths(CACHE - 1, 0), "kv_lengths": lengths(0, 3000)}
    for extra in ({}, {"sinks": True}):
        Case(inputs(2, 2, 1, kv_len=CACHE, **extra), masks.causal(), rows=CACHE, **at).check()


@pytest.mark.parametrize("q_len", [1, 70])
@pytest.mark.parametrize("name", LONG_CACHE)
def test_any_number_of_threads_gives_the_same_bits(name, q_len):
    case = long_cache(name, q_len)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(case.run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, expected in results[0].items():
            helpers.assert_identical(other[key], expected, key)


@pytest.mark.parametrize("q_len", [1, 70])
def test_no_result_depends_on_uninitialised_memory(q_len):
    case = long_cache("sink-window", q_len, dtype=torch.bfloat16)
    expected = case.run()
    torch.use_deterministic_algorithms(True)  # torch then fills what it allocates with NaN
    try:
        actual = case.run()
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in expected.items():
        helpers.assert_identical(actual[key], value, key)


@pytest.mark.parametrize("seen", [2040, 2048, 2100, 4096])
def test_no_later_key_touches_a_bit(seen):
    tensors = inputs(1, 2, 60, kv_len=CACHE, kv_heads=1)
    changed = dict(tensors)
    for name in ("key", "value"):
        changed[name] = tensors[name].clone()
        changed[name][:, :, seen:] *= -37.0
    at = {"query_offset": lengths(seen - 60)}
    found = [Case(t, masks.causal(), rows=CACHE, **at).run() for t in (tensors, changed)]
    for name in ("out", "lse"):
        helpers.assert_identical(found[1][name], found[0][name], name)
