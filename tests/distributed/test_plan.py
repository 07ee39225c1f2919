"""Sharing out a sequence: everything is counted before anything is sent."""

from __future__ import annotations

import pytest
import torch

from flashmark import compile_mask
from flashmark.distributed import balance
from flashmark.masks import causal, documents, prefix, sliding_window

METHODS = ("contiguous", "zigzag", "lpt", "cut")


def compiled(mask, n=300, block_size=16):
    return compile_mask(mask, 2, 2, n, n, device="cpu", block_size=block_size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [1, 3, 4, 25])
@pytest.mark.parametrize("block_size", [16, (32, 16), (16, 64)], ids=str)
def test_local_masks_are_the_rows_and_columns_of_the_whole(method, ranks, block_size):
    ids = torch.arange(300).repeat(2, 1) // torch.tensor([[70], [33]])
    mask = compiled(causal() & documents(ids), block_size=block_size)
    dense = mask.to_dense()
    plan = balance(mask, ranks, method=method)
    seen = []
    for rank in range(ranks):
        rows, columns = plan.positions(rank), plan.gathered_positions(rank)
        local = plan.local_mask(rank)
        assert torch.equal(local.to_dense(), dense[:, :, rows][..., columns])
        assert torch.equal(local.tile_grid(), local.tile_grid(transposed=True))
        assert int(local.kept) == int(dense[:, :, rows].sum())
        assert int(local.rows.counts.sum()) == int(plan.tiles[rank])
        for other in range(ranks):
            there = plan.exchange(other)
            assert plan.exchange(rank).send_counts[other] == there.receive_counts[rank]
        seen += [p for start, stop in plan.segments(rank) for p in range(start, stop)]
        assert rows.tolist() == seen[len(seen) - len(rows) :]
    assert sorted(seen) == list(range(300))


@pytest.mark.parametrize("ranks", [2, 4, 16])
@pytest.mark.parametrize("method", ["zigzag", "lpt"])
def test_a_causal_mask_is_balanced_in_tiles_and_in_tokens(method, ranks):
    plan = balance(compiled(causal(), 4096), ranks, method=method)
    assert plan.tiles.max() - plan.tiles.min() <= ranks
    tokens = {plan.positions(rank).numel() for rank in range(ranks)}
    assert tokens == {4096 // ranks}


def test_segments_in_order_leave_a_causal_mask_unbalanced():
    tiles = balance(compiled(causal(), 4096), 4, method="contiguous").tiles
    assert tiles[3] > 6 * tiles[0]


def test_the_cut_balances_tiles_and_not_tokens():
    plan = balance(compiled(causal(), 4096), 4, method="cut")
    assert plan.tiles.max() < 1.1 * plan.tiles.double().mean()
    assert plan.positions(0).numel() > 3 * plan.positions(3).numel()


def test_auto_keeps_a_window_together_and_spreads_a_triangle():
    window = balance(compiled(causal() & sliding_window(64), 4096), 4)
    assert [len(window.segments(rank)) for rank in range(4)] == [1] * 4
    assert window.tokens_received.tolist() == [0, 64, 64, 64]
    triangle = balance(compiled(causal(), 4096), 4)
    assert triangle.tiles.max() == triangle.tiles.min()


def test_a_mask_that_sees_nothing_sends_nothing():
    plan = balance(compiled(prefix(0)), 4)
    assert not plan.tokens_sent.any() and not plan.tiles.any()


def test_planning_a_million_tokens_for_a_thousand_ranks():
    """Runs, not tiles: nothing of the size of the tile grid's ends is built."""
    plan = balance(compiled(causal(), 1 << 20, 128), 1024, method="zigzag")
    assert plan.tiles.max() == plan.tiles.min()
    assert plan.bytes_received(1023, 1) < 0.51 * plan.bytes_all_gather(1023, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((causal(), 2), TypeError, "mask: expected a BlockMask"),
        ((compile_mask(None, 1, 1, 16, 32, device="cpu"), 2), ValueError, "as many queries"),
        ((compiled(causal()), 0), ValueError, "ranks: expected an int >= 1"),
        ((compiled(causal()), True), TypeError, "ranks: expected an int"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        balance(*arguments)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="method: expected one of auto"):
        balance(compiled(causal()), 2, method="best")
