"""Decoding into a preallocated cache: query_offset, kv_lengths, one mask at the cache's size."""

from __future__ import annotations

import functools

import pytest
import torch

import flashmark
from flashmark import masks
from tests import helpers

RULES = {
    "causal": helpers.causal(),
    "window": helpers.causal() & helpers.window(20),
    "sink-window": helpers.causal() & (helpers.window(20) | helpers.prefix(4)),
    "documents": helpers.causal() & helpers.documents(torch.arange(96) // 40),
}
CACHE = 96


@pytest.fixture(params=helpers.BACKENDS)
def op(request):
    return functools.partial(flashmark.block_sparse_attention, backend=request.param)


def at_full_size(rule, batch=2, heads=4):
    return masks.compile_mask(rule.mask, batch, heads, CACHE, CACHE, device="cpu", block_size=32)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_step_by_step_equals_all_at_once(op, name, bias):
    query, key, value = helpers.qkv(2, 4, CACHE, 16, kv_heads=2, grad=False)
    mask = at_full_size(RULES[name])
    options = {"bias": helpers.randn(4, 2 * CACHE - 1, seed=7)} if bias else {}
    whole, whole_lse = op(query, key, value, mask, return_lse=True, **options)
    cache_k, cache_v = torch.full_like(key, float("nan")), torch.zeros_like(value)
    for t in range(0, CACHE, 5):
        cache_k[:, :, : t + 1], cache_v[:, :, : t + 1] = key[:, :, : t + 1], value[:, :, : t + 1]
        lengths = torch.full((2,), t + 1, dtype=torch.int32)
        for offset in (
            t,
            torch.tensor([t, t], dtype=torch.int32),
            torch.tensor([t], dtype=torch.int32),
        ):
            out, lse = op(
                query[:, :, t : t + 1], cache_k, cache_v, mask,
                query_offset=offset, kv_lengths=lengths, return_lse=True, **options,
            )  # fmt: skip
            helpers.assert_close(out, whole[:, :, t : t + 1], 1e-5)
            helpers.assert_close(lse, whole_lse[:, :, t : t + 1], 1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_chunk_of_prefill_equals_its_rows(op, name):
    query, key, value = helpers.qkv(2, 4, CACHE, 16, kv_heads=2, grad=False)
    mask = at_full_size(RULES[name])
    whole = op(query, key, value, mask)
    for start, stop in ((0, 17), (30, 71), (CACHE - 3, CACHE)):
        out = op(query[:, :, start:stop], key, value, mask, query_offset=start)
        helpers.assert_close(out, whole[:, :, start:stop], 1e-5)


def test_an_uncompiled_mask_is_taken_at_the_caches_size(op):
    query, key, value = helpers.qkv(2, 4, CACHE, 16, kv_heads=2, grad=False)
    mask = RULES["window"].mask
    whole = op(query, key, value, mask)
    out = op(query[:, :, 50:60], key, value, mask, query_offset=50)
    helpers.assert_close(out, whole[:, :, 50:60], 1e-5)


@pytest.mark.parametrize("offsets", [[0, 60], [75, 3]], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_an_offset_per_sample_with_gradients(op, name, offsets):
    q_len = 20
    tensors = dict(
        zip(
            ("query", "key", "value"),
            helpers.qkv(2, 4, q_len, 16, kv_heads=2, kv_len=CACHE),
            strict=True,
        )
    )
    tensors["bias"] = helpers.randn(4, 2 * CACHE - 1, seed=7, grad=True)
    tensors["kv_lengths"] = torch.tensor([90, 40], dtype=torch.int32)
    options = {"query_offset": torch.tensor(offsets, dtype=torch.int32), "softcap": 4.0}
    rule = RULES[name]
    visible = rule.dense(2, 4, CACHE, CACHE)  # rows of the cache
    reference = flashmark.reference.block_sparse_attention
    expected = helpers.outputs_and_grads(
        reference, helpers.upcast(tensors), mask=visible, **options
    )
    actual = helpers.outputs_and_grads(op, tensors, mask=at_full_size(rule), **options)
    for key, value in expected.items():
        helpers.assert_close(actual[key], value, 5e-5 if key.startswith("d ") else 1e-5, key)


@pytest.mark.parametrize(
    "rule", [None, helpers.causal(), helpers.window(30)], ids=["none", "causal", "window"]
)
@pytest.mark.parametrize("lengths", [[64, 64, 64], [1, 33, 64], [0, 0, 5]], ids=str)
def test_kv_lengths_bound_the_keys(op, rule, lengths):
    tensors = dict(zip(("query", "key", "value"), helpers.qkv(3, 2, 64, 16), strict=True))
    bounded = helpers.key_padding(torch.tensor(lengths))
    visible = (rule & bounded if rule else bounded).dense(3, 2, 64, 64)
    reference = flashmark.reference.block_sparse_attention
    expected = helpers.outputs_and_grads(reference, helpers.upcast(tensors), mask=visible)
    actual = helpers.outputs_and_grads(
        op, tensors, mask=rule and rule.mask, kv_lengths=torch.tensor(lengths, dtype=torch.int32)
    )
    for key, value in expected.items():
        helpers.assert_close(actual[key], value, 5e-5 if key.startswith("d ") else 1e-5, key)


@pytest.mark.parametrize(
    "mask", [None, masks.causal(), masks.sliding_window(9)], ids=["none", "causal", "window"]
)
def test_kv_lengths_out_of_range_mean_all_keys_or_none(op, mask):
    """j < kv_lengths[b] as written: beyond Nk nothing is hidden, below 0 everything."""
    query, key, value = leaves = helpers.qkv(3, 2, 40, 16)
    out, lse = op(
        query, key, value, mask, kv_lengths=torch.tensor([41, 1000, -1]).int(), return_lse=True
    )
    wanted = op(query, key, value, mask)
    helpers.assert_close(out[:2], wanted[:2], 1e-6)
    assert not out[2].any() and (lse[2] == float("-inf")).all()
    for actual, expected in zip(
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(wanted[:2].sum(), leaves),
        strict=True,
    ):
        helpers.assert_close(actual[:2], expected[:2], 1e-5)
        assert not actual[2].any()


def test_keys_beyond_kv_lengths_may_hold_anything(op):
    query, key, value = helpers.qkv(2, 2, 40, 16, kv_len=80, grad=False)
    lengths = torch.tensor([50, 13], dtype=torch.int32)
    out = op(query, key, value, kv_lengths=lengths)
    key, value = key.clone(), value.clone()
    for b, n in enumerate(lengths.tolist()):
        key[b, :, n:], value[b, :, n:] = float("nan"), 1e30
    helpers.assert_identical(op(query, key, value, kv_lengths=lengths), out)


def test_dense_bias_is_indexed_by_the_query_not_the_row(op):
    query, key, value = helpers.qkv(1, 2, 7, 16, kv_len=CACHE, grad=False)
    bias = helpers.randn(1, 2, 7, CACHE, seed=7)
    mask = at_full_size(RULES["causal"], 1, 2)
    out = op(query, key, value, mask, bias=bias, query_offset=50)
    visible = RULES["causal"].dense(1, 2, CACHE, CACHE)[:, :, 50:57]
    helpers.assert_close(out, op(query, key, value, masks.dense(visible), bias=bias), 1e-5)


def test_dropout_counts_queries_from_the_call(op):
    """i of the dropout counter is the query's own index, whatever the offset."""
    query, key, value = helpers.qkv(1, 2, 9, 16, kv_len=CACHE, grad=False)
    mask = at_full_size(RULES["causal"], 1, 2)
    options = {"dropout_p": 0.4, "dropout_seed": 11}
    out = op(query, key, value, mask, query_offset=40, **options)
    visible = RULES["causal"].dense(1, 2, CACHE, CACHE)[:, :, 40:49]
    helpers.assert_close(out, op(query, key, value, masks.dense(visible), **options), 1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_lengths_and_offsets_of_either_integer_dtype(op, dtype):
    query, key, value = helpers.qkv(2, 2, 5, 8, kv_len=CACHE, grad=False)
    mask = at_full_size(RULES["causal"], 2, 2)
    out = op(
        query,
        key,
        value,
        mask,
        query_offset=torch.tensor([20, 60], dtype=dtype),
        kv_lengths=torch.tensor([23, 90], dtype=dtype),
    )
    for b, (start, length) in enumerate([(20, 23), (60, 90)]):
        one = slice(b, b + 1)
        row = op(
            query[one],
            key[one],
            value[one],
            mask,
            query_offset=start,
            kv_lengths=torch.tensor([length]).int(),
        )
        helpers.assert_close(out[one], row, 1e-6)


def test_no_mask_is_compiled_per_step(op):
    calls = []

    def fn(b, h, q, kv):
        calls.append(1)
        return q >= kv

    mask = masks.compile_mask(masks.mask_mod(fn), 1, 2, CACHE, CACHE, device="cpu", block_size=32)
    query, key, value = helpers.qkv(1, 2, 1, 8, kv_len=CACHE, grad=False)
    calls.clear()
    for t in range(3):
        op(query, key, value, mask, query_offset=t)
    assert not calls
