"""The counted cost model: what the operators themselves count, and what the plan sends."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.communication import block_sparse_cost, hybrid_cost, nystrom_cost, routed_cost
from flashmark import block_sparse_attention, compile_mask, nystrom_attention
from flashmark.distributed import balance
from flashmark.masks import causal, sliding_window
from tests import helpers

SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 8, "v_dim": 16, "batch": 2}


def counted(call) -> tuple[int, int]:
    """FLOP of a call, and of its backward pass."""
    call()  # formulas are registered by a call, and a counter copies those that are
    with FlopCounterMode(display=False) as forward:
        loss = call()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def sequence(n: int):
    shapes = ((4, 8), (2, 8), (2, 16))
    return [helpers.randn(2, h, n, d, grad=True) for h, d in shapes]


def test_block_sparse_flops_are_those_of_the_operator():
    mask = compile_mask(causal() & sliding_window(50), 2, 4, 200, 200, device="cpu", block_size=16)
    cost = block_sparse_cost(balance(mask, 1), **SHAPE)
    leaves = sequence(200)
    found = counted(lambda: block_sparse_attention(*leaves, mask).sum())
    assert found == (cost.flops, cost.backward_flops)
    assert cost.bytes_sent == cost.bytes_received == 0


def test_nystrom_flops_are_those_of_the_two_passes():
    query, key, value = sequence(200)
    marks, core = helpers.randn(2, 6, 8), torch.eye(6).expand(2, 6, 6)

    def passes():
        _, end = nystrom_attention(
            query[:, :, :0], key, value, marks, core=core, is_causal=False, return_state=True
        )
        out = nystrom_attention(query, key, value, marks, core=core, state=end)
        return out.sum()

    cost = nystrom_cost(200, 1, 6, **SHAPE)
    assert counted(passes) == (cost.flops, cost.backward_flops)


@pytest.mark.parametrize(("ranks", "states"), [(2, 2), (8, 4), (9, 5), (1024, 11)])
def test_a_scan_moves_as_many_states_as_it_has_rounds(ranks, states):
    one = 2 * 2 * 64 * (16 + 1) * 4  # batch, key heads, M (Dv + 1) numbers of 4 bytes
    gathered, scanned = (
        nystrom_cost(1 << 20, ranks, 64, exchange=exchange, **SHAPE)
        for exchange in ("all-gather", "scan")
    )
    assert gathered.flops == scanned.flops
    assert (gathered.bytes_sent, scanned.bytes_sent) == ((ranks - 1) * one, states * one)


def test_a_hybrid_also_moves_one_window_of_keys():
    near, far = (hybrid_cost(1 << 20, 8, 64, window=w, **SHAPE).bytes_sent for w in (0, 128))
    assert far - near == 128 * 2 * 2 * (8 + 16) * 2


def test_time_is_flops_over_rate_and_bytes_over_bandwidth():
    mask = compile_mask(causal(), 1, 1, 1024, 1024, device="cpu")
    cost = block_sparse_cost(balance(mask, 4), **SHAPE)
    compute, moving = cost.seconds(1e9, 1e6)
    assert compute == (cost.flops + cost.backward_flops) / 1e9
    assert moving == 2 * max(cost.bytes_received, cost.bytes_sent) / 1e6
    assert cost.bytes_received <= cost.bytes_all_gather


def test_routed_attention_moves_at_most_all_keys_and_the_summaries():
    one = routed_cost(4096, 1, 4, block_size=64, top_k=2, **SHAPE)
    assert one.bytes_sent == one.bytes_received == one.bytes_all_gather == 0
    four = routed_cost(4096, 4, 4, block_size=64, top_k=2, **SHAPE)
    summaries = 2 * 2 * 48 * 4 * (8 + 1) * 4  # batch, key heads, blocks of others, M (D + 1) floats
    assert four.bytes_received == four.bytes_all_gather + summaries
