"""kv_lengths and query_offset: integers of any width, and memory that no query may read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashmark
from flashmark import masks
from tests import helpers

ALL_BACKENDS = [*helpers.BACKENDS, "reference"]
INT64 = torch.iinfo(torch.int64)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("garbage", [float("nan"), float("-inf"), 3e38], ids=str)
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.sliding_window(9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_memory_behind_a_length_reaches_no_result(backend, garbage, mask, dtype):
    """A cache made with `torch.empty` holds anything where no key is yet."""
    lengths = torch.tensor([0, 5, 33, 70])
    leaves = helpers.qkv(4, 4, 6, 16, kv_heads=2, kv_len=70, dtype=dtype)
    dirty = [x.detach().clone() for x in leaves]
    for sample, length in enumerate(lengths.tolist()):
        for x in dirty[1:]:
            x[sample, :, length:] = garbage
    dirty = [x.requires_grad_() for x in dirty]
    results = []
    for tensors in (leaves, dirty):
        out, lse = flashmark.block_sparse_attention(
            *tensors, mask, kv_lengths=lengths, return_lse=True, backend=backend
        )
        seen = lse.masked_fill(lse == -torch.inf, 0.0)
        grads = torch.autograd.grad((out * 3).sum() + seen.sum(), tensors)
        results.append((out, lse, *grads))
    for clean, got in zip(*results, strict=True):
        helpers.assert_identical(got, clean)


@pytest.mark.parametrize("length", [20, 2**31, 2**32 + 4, 2**33 + 5, INT64.max], ids=str)
def test_a_length_beyond_the_keys_means_all_of_them(length):
    query, key, value = helpers.qkv(2, 2, 20, 16, grad=False)
    whole = flashmark.block_sparse_attention(query, key, value)
    lengths = torch.full((2,), length, dtype=torch.int64)
    got = flashmark.block_sparse_attention(query, key, value, kv_lengths=lengths)
    helpers.assert_identical(got, whole)


@pytest.mark.parametrize("length", [0, -1, -(2**31) - 1, -(2**32) + 7, INT64.min], ids=str)
def test_a_length_below_one_means_no_key(length):
    query, key, value = helpers.qkv(2, 2, 20, 16, grad=False)
    out, lse = flashmark.block_sparse_attention(
        query, key, value, kv_lengths=torch.full((2,), length), return_lse=True
    )
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize(
    "offset",
    [18, 2**31, 2**32, 2**63, -1, -(2**32) + 3, np.int64(2**40), torch.tensor(2**32),
     torch.tensor([0, 2**32 + 4]), torch.tensor([INT64.min, 0]), torch.tensor([18, 0]).int()],
    ids=str,
)  # fmt: skip
def test_an_offset_outside_the_mask_is_refused(offset):
    query, key, value = helpers.qkv(2, 2, 3, 16, kv_len=20, grad=False)
    with pytest.raises(ValueError, match="query_offset: expected 0 to 17 for 3 queries of 20 rows"):
        flashmark.block_sparse_attention(query, key, value, masks.causal(), query_offset=offset)


@pytest.mark.parametrize(
    "offset",
    [np.int64(9), np.int32(9), torch.tensor(9), torch.tensor([9, 9]), torch.tensor([9]).int()],
    ids=lambda x: f"{type(x).__name__}-{x.dtype}-{tuple(getattr(x, 'shape', ()))}",
)
def test_offsets_of_every_integer_type_are_alike(offset):
    query, key, value = helpers.qkv(2, 2, 3, 16, kv_len=20, grad=False)
    got, wanted = (
        flashmark.block_sparse_attention(query, key, value, masks.causal(), query_offset=x)
        for x in (offset, 9)
    )
    helpers.assert_identical(got, wanted)


def test_a_softcap_of_zero_is_none():
    query, key, value = helpers.qkv(grad=False)
    plain, zero = (
        flashmark.block_sparse_attention(query, key, value, softcap=x) for x in (None, 0)
    )
    helpers.assert_identical(zero, plain)
