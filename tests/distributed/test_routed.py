"""Routed attention over processes: the outputs and gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from flashmark import routed_attention
from flashmark.distributed import collectives, context_parallel_routed_attention
from tests import helpers
from tests.distributed.test_context_parallel import sequence, summed

BLOCK = 8
LENGTHS = {2: [48, 35], 4: [16, 32, 8, 27]}  # consecutive segments, whole blocks but for the last
CASES = {
    "landmarks": {"landmarks": helpers.randn(2, 3, 8, seed=3), "top_k": 2},
    "mean": {"top_k": 3, "near": 2},
    "own block": {"top_k": 0, "near": 0},
    "all blocks": {"top_k": 40},
    "softcap and sinks": {"softcap": 4.0, "sinks": helpers.randn(4, seed=4, grad=True), "top_k": 2},
    "padding": {"key_mask": helpers.randn(2, 83, seed=5) > -0.5, "top_k": 2},
}


def part(x, lengths, rank, dim):
    return x.split(lengths, dim)[rank]


def equal_case(name: str) -> None:
    options = {"block_size": BLOCK} | CASES[name]
    rank, lengths = dist.get_rank(), LENGTHS[dist.get_world_size()]
    leaves = list(sequence(sum(lengths)))
    weights = helpers.randn(2, 4, sum(lengths), 4, seed=8)
    if "sinks" in options:
        leaves.append(options["sinks"])
    out = routed_attention(*leaves[:3], **options)
    wanted = torch.autograd.grad((out * weights).sum(), leaves)
    if "key_mask" in options:
        options["key_mask"] = part(options["key_mask"], lengths, rank, 1)
    mine = [part(x, lengths, rank, 2) for x in leaves[:3]]
    found = context_parallel_routed_attention(*mine, **options)
    gradients = torch.autograd.grad((found * part(weights, lengths, rank, 2)).sum(), leaves)
    helpers.assert_close(found, part(out, lengths, rank, 2), 1e-5, "out")
    for actual, expected in zip(summed(gradients), wanted, strict=True):
        helpers.assert_close(actual, expected, 5e-5, "gradient")


@pytest.mark.parametrize("ranks", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(started, ranks, name):
    started(ranks).run(equal_case, name)


def traffic_case() -> None:
    """Keys that all queries look for lie in one block: nothing else travels but near blocks."""
    rank, ranks, n = dist.get_rank(), dist.get_world_size(), 64
    key = torch.zeros(1, 1, ranks * n, 4)
    key[:, :, BLOCK : 2 * BLOCK] = 1.0
    mine = [part(x, [n] * ranks, rank, 2) for x in (torch.ones_like(key), key, key)]
    sent = []
    original = collectives._all_to_all

    def counting(send, send_counts, receive_counts, group):
        sent.append(receive_counts)
        return original(send, send_counts, receive_counts, group)

    collectives._all_to_all = counting
    try:
        context_parallel_routed_attention(*mine, block_size=BLOCK, top_k=1, near=1)
    finally:
        collectives._all_to_all = original
    wanted = [0] * ranks
    if rank > 0:
        wanted[rank - 1] += BLOCK  # the near block
        wanted[0] += BLOCK
    assert sent == [wanted]


def test_only_chosen_blocks_travel(started):
    started(4).run(traffic_case)


def ragged_case() -> None:
    query, key, value = (x[:, :, :12] for x in sequence(12, grad=False))
    with pytest.raises(ValueError, match=r"block_size: expected every segment but the last"):
        context_parallel_routed_attention(query, key, value, block_size=BLOCK)


def test_segments_are_whole_blocks(started):
    started(2).run(ragged_case)
