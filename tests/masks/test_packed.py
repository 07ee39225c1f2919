"""Packed sequences: by ids of queries and keys, and by cumulative lengths."""

from __future__ import annotations

import itertools

import pytest
import torch

import flashmark
from flashmark import masks
from tests import helpers


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def one_by_one(q_lengths, k_lengths, mask, q_len, kv_len):
    """Each sequence's own mask, at its place."""
    visible = torch.zeros(q_len, kv_len, dtype=torch.bool)
    q = k = 0
    for m, n in zip(q_lengths, k_lengths, strict=True):
        visible[q : q + m, k : k + n] = mask.to_dense(1, 1, m, n)[0, 0]
        q, k = q + m, k + n
    return visible


INNER = {
    "everything": masks.sliding_window(-1),
    "causal": masks.causal(),
    "window": masks.causal() & masks.sliding_window(20),
    "two-sided": masks.sliding_window(7, 9),
    "dilated": masks.dilated(3) & masks.causal(),
    "prefix": masks.causal() | masks.prefix(5),
    "chunks": masks.local_chunks(16),
    "not": ~masks.causal() | masks.diagonal(),
}
LENGTHS = {
    "equal": ([50, 1, 130, 19], [50, 1, 130, 19]),
    "more-keys": ([10, 30, 64, 1], [40, 30, 100, 77]),
    "more-queries": ([100, 33, 67], [10, 32, 64]),
    "empty-sequences": ([0, 40, 0, 64, 5], [10, 0, 0, 128, 5]),
    "one": ([200], [150]),
    "many-short": ([3] * 50, [5] * 50),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", INNER)
def test_each_sequence_is_masked_by_itself(name, lengths):
    q_lengths, k_lengths = LENGTHS[lengths]
    q_len, kv_len = sum(q_lengths) + 6, sum(k_lengths)  # tokens behind the last see nothing
    wanted = one_by_one(q_lengths, k_lengths, INNER[name], q_len, kv_len)
    mask = masks.packed(cumulative(q_lengths), cumulative(k_lengths, torch.int64), INNER[name])
    assert torch.equal(mask.to_dense(1, 1, q_len, kv_len)[0, 0], wanted)
    for size in (16, (64, 32), 128):
        compiled = masks.compile_mask(mask, 3, 2, q_len, kv_len, device="cpu", block_size=size)
        assert compiled.shape[:2] == (1, 1)
        assert torch.equal(compiled.to_dense()[0, 0], wanted)


def test_default_is_self_attention_over_every_key():
    ends = cumulative([30, 70])
    mask = masks.packed(ends).to_dense(1, 1, 100, 100)
    ids = torch.arange(100) >= 30
    assert torch.equal(mask[0, 0], ids[:, None] == ids)
    nothing = masks.packed(torch.tensor([0])).to_dense(1, 1, 10, 10)
    assert not nothing.any()


def test_long_sequences_evaluate_their_borders_only():
    ends = cumulative([3000, 5000, 192])
    compiled = masks.compile_mask(
        masks.packed(ends, mask=masks.causal()), 1, 1, 8192, 8192, device="cpu"
    )
    assert len(compiled.tile_bits) < 3 * 64 + 64
    kept = sum(n * (n + 1) // 2 for n in (3000, 5000, 192))
    assert compiled.density == kept / 8192**2


def test_packed_beside_other_masks():
    q_lengths, k_lengths = LENGTHS["more-keys"]
    q_len, kv_len = sum(q_lengths), sum(k_lengths)
    mask = masks.packed(cumulative(q_lengths), cumulative(k_lengths), masks.causal())
    lengths = torch.tensor([200, 10])
    both = mask & masks.key_padding(lengths) | masks.prefix(2)
    wanted = one_by_one(q_lengths, k_lengths, masks.causal(), q_len, kv_len)
    keys = torch.arange(kv_len)
    wanted = wanted & (keys < lengths.view(2, 1, 1, 1)) | (keys < 2)
    compiled = masks.compile_mask(both, 2, 2, q_len, kv_len, device="cpu", block_size=32)
    assert torch.equal(compiled.to_dense(), wanted)


IDS = {
    "sorted": (torch.arange(90) // 20, torch.arange(120) // 25),
    "unsorted": (torch.arange(90) * 7 % 5, torch.arange(120) * 11 % 6),
    "negative": (torch.arange(90) // 20 - 1, torch.arange(120) // 25 - 1),
    "int32": ((torch.arange(90) // 20).int(), torch.arange(120) // 25),
    "per-sample": (
        torch.stack([torch.arange(90) // 20, torch.arange(90) // 50]),
        torch.stack([torch.arange(120) // 25, torch.arange(120) // 90]),
    ),
    "keys-per-sample": (
        torch.arange(90) // 20,
        torch.stack([torch.arange(120) // 25, torch.arange(120) // 90]),
    ),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_of_queries_and_of_keys(name):
    ids, key_ids = IDS[name]
    rows, columns = (torch.atleast_2d(x.long()) for x in (ids, key_ids))
    wanted = (rows[:, :, None] == columns[:, None]) & (rows[:, :, None] >= 0)
    wanted = wanted[:, None].expand(-1, 1, -1, -1)
    mask = masks.documents(ids, key_ids)
    assert torch.equal(mask.to_dense(2, 3, 90, 120).expand_as(wanted), wanted)
    for size in (16, 64):
        for form, extra in ((mask, True), (mask & masks.causal(), None)):
            compiled = masks.compile_mask(form, 2, 3, 90, 120, device="cpu", block_size=size)
            band = torch.ones(90, 120, dtype=torch.bool)
            band = band if extra else band.tril(30)
            assert torch.equal(compiled.to_dense().expand_as(wanted), wanted & band)


@pytest.mark.parametrize("lengths", [(200, 200), (40, 200), (200, 150)], ids=str)
@pytest.mark.parametrize("kind", ["sorted", "unsorted", "negative", "one-a-token"])
def test_ids_of_the_keys_alone(kind, lengths):
    """Queries have the ids of the keys at their position, aligned to the end."""
    q_len, kv_len = lengths
    place = torch.arange(kv_len)
    ids = {
        "sorted": place // 37,
        "unsorted": place * 13 % 4,
        "negative": place // 37 - 2,
        "one-a-token": place,
    }[kind]
    position = torch.arange(q_len)[:, None] + kv_len - q_len
    of_queries = torch.where(position < 0, -1, ids[position.clamp(min=0)])
    wanted = (of_queries == ids) & (of_queries >= 0)
    for size in (16, 32, 128):
        mask = masks.documents(ids) & masks.causal()
        compiled = masks.compile_mask(mask, 2, 1, q_len, kv_len, device="cpu", block_size=size)
        assert torch.equal(compiled.to_dense()[0, 0], wanted & (place <= position))


def test_cross_attention_between_packed_sequences_and_its_gradients():
    q_lengths, k_lengths = [9, 25, 6], [30, 12, 20]
    query, key, value = helpers.qkv(1, 2, 40, 8, kv_len=62)
    mask = masks.packed(cumulative(q_lengths), cumulative(k_lengths), masks.causal())
    out = flashmark.block_sparse_attention(query, key, value, mask)
    wanted, q, k = [], 0, 0
    for m, n in zip(q_lengths, k_lengths, strict=True):
        part = query[:, :, q : q + m], key[:, :, k : k + n], value[:, :, k : k + n]
        wanted.append(flashmark.reference.block_sparse_attention(*part, masks.causal()))
        q, k = q + m, k + n
    wanted = torch.cat(wanted, 2)
    helpers.assert_close(out, wanted.double(), 1e-5)
    leaves = query, key, value
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(wanted.square().sum(), leaves),
        strict=True,
    ):
        helpers.assert_close(a, b.double(), 5e-5)
