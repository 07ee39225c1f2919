"""Properties of compiled masks, for random expressions, lengths and block sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings

import flashmark
from flashmark import masks
from tests import helpers
from tests.masks.strategies import RandomMask, random_masks


def decode(mask: masks.BlockMask, *, columns: bool = False) -> torch.Tensor:
    """Class of a tile, read by hand from the lists: -2 empty, -1 full, else its row of tile_bits.

    Returns (batch, heads, q_blocks, kv_blocks). Checks also that runs and partial tiles are in
    range, ascending and apart, and that counts and order are right.
    """
    lists = mask.cols if columns else mask.rows
    lines, width = (mask.kv_blocks, mask.q_blocks) if columns else (mask.q_blocks, mask.kv_blocks)
    assert all(tensor.dtype == torch.int32 for tensor in lists)
    run_offsets, partial_offsets = lists.run_offsets.tolist(), lists.partial_offsets.tolist()
    runs, partials = lists.runs.tolist(), lists.partials.tolist()
    total = mask.batch * mask.heads * lines
    assert len(run_offsets) == len(partial_offsets) == total + 1
    assert run_offsets[0] == partial_offsets[0] == 0
    assert lists.counts.shape == lists.order.shape == (mask.batch, mask.heads, lines)
    grid = torch.full((total, width), -2)
    for line in range(total):
        end = 0
        for first, length in runs[run_offsets[line] : run_offsets[line + 1]]:
            assert first >= end and length >= 1 and first + length <= width
            end = first + length
            grid[line, first:end] = -1
        last = -1
        for block, bits in partials[partial_offsets[line] : partial_offsets[line + 1]]:
            assert last < block < width and 0 <= bits < mask.tile_bits.shape[0]
            assert grid[line, block] == -2, "a tile is listed twice"
            grid[line, block] = bits
            last = block
    grid = grid.view(mask.batch, mask.heads, lines, width)
    counts = (grid != -2).sum(-1)
    assert torch.equal(lists.counts.long(), counts)
    order = lists.order.long()
    assert torch.equal(order.sort(-1).values, torch.arange(lines).expand_as(order)), (
        "order is no permutation"
    )
    assert (counts.gather(-1, order).diff(dim=-1) <= 0).all(), (
        "order does not put heavy lines first"
    )
    return grid.transpose(2, 3) if columns else grid


def elements_of_tiles(mask: masks.BlockMask) -> torch.Tensor:
    """tile_bits as bool (U, block_q, block_kv), one bit at a time."""
    words = mask.tile_bits
    assert words.dtype == torch.int32
    assert words.shape[1:] == (mask.block_q, -(-mask.block_kv // 32))
    bits = [(words[..., k // 32] >> (k % 32)) & 1 for k in range(words.shape[-1] * 32)]
    bits = (
        torch.stack(bits, -1).bool()
        if len(words)
        else torch.zeros(0, mask.block_q, words.shape[-1] * 32).bool()
    )
    assert not bits[..., mask.block_kv :].any(), "bits beyond the tile"
    return bits[..., : mask.block_kv]


def tiled(dense: torch.Tensor, block_q: int, block_kv: int) -> torch.Tensor:
    """(B, H, q_len, kv_len) -> (B, H, q_blocks, kv_blocks, block_q, block_kv), False outside."""
    q_len, kv_len = dense.shape[2:]
    padded = torch.nn.functional.pad(dense, (0, -kv_len % block_kv, 0, -q_len % block_q))
    return padded.unflatten(3, (-1, block_kv)).unflatten(2, (-1, block_q)).transpose(3, 4)


def causal_and_documents_of_one_sample() -> RandomMask:
    rule = helpers.causal() & helpers.documents(torch.tensor([0] * 40 + [1] * 60 + [-1] * 28))
    return RandomMask(2, 3, 128, 128, 32, rule)


@settings(max_examples=150)
@given(case=random_masks())
@example(case=causal_and_documents_of_one_sample())
@example(case=RandomMask(1, 1, 200, 1, 16, helpers.causal()))
@example(case=RandomMask(1, 1, 1, 200, 16, helpers.causal()))
@example(case=RandomMask(1, 1, 150, 70, 32, ~helpers.causal() | helpers.diagonal()))
def test_every_element_equals_its_definition(case):
    mask, expected = case.compile(), case.expected()
    assert (mask.q_len, mask.kv_len) == (case.q_len, case.kv_len)
    assert (mask.block_q, mask.block_kv) == case.blocks
    assert mask.batch in (1, case.batch) and mask.heads in (1, case.heads)
    actual = mask.to_dense()
    assert actual.dtype == torch.bool
    assert torch.equal(actual.expand_as(expected), expected)
    assert mask.density == pytest.approx(expected.double().mean().item(), abs=1e-12)
    definition = case.rule.mask.to_dense(case.batch, case.heads, case.q_len, case.kv_len)
    assert torch.equal(definition.expand_as(expected), expected)


@settings(max_examples=80)
@given(case=random_masks(max_leaves=3))
def test_row_and_column_lists_hold_the_same_tiles(case):
    mask, expected = case.compile(), case.expected()
    if mask.kind != "sparse":  # read by comparison: there is nothing in the lists
        return
    rows, columns = decode(mask), decode(mask, columns=True)
    assert torch.equal(rows, columns)
    assert torch.equal(mask.tile_grid().long(), rows)
    assert torch.equal(mask.tile_grid(transposed=True).long(), rows)
    full = torch.ones(1, mask.block_q, mask.block_kv, dtype=torch.bool)
    table = torch.cat([~full, full, elements_of_tiles(mask)])
    # no cropping: a bit outside the mask must be 0
    wanted = tiled(expected, mask.block_q, mask.block_kv)
    assert torch.equal(table[rows + 2].expand_as(wanted), wanted)


@settings(max_examples=80)
@given(case=random_masks(max_leaves=3))
def test_tiles_are_classified_exactly_and_stored_once(case):
    mask, expected = case.compile(), case.expected()
    if mask.kind != "sparse":
        return
    assert len(mask.tile_bits.flatten(1).unique(dim=0)) == len(mask.tile_bits), (
        "tile_bits has duplicates"
    )
    if "blocks" in case.rule.name:  # compiled without reading back: not reclassified
        return
    rows, wanted = decode(mask), tiled(expected, mask.block_q, mask.block_kv)
    visible = wanted.flatten(4).sum(-1)
    # a tile that sticks out of the mask is never FULL
    full, empty = visible == mask.block_q * mask.block_kv, visible == 0
    grid = rows.expand_as(visible)
    assert torch.equal(grid == -1, full)
    assert torch.equal(grid == -2, empty)
    used = rows[rows >= 0].unique()
    assert torch.equal(used, torch.arange(len(mask.tile_bits))), (
        "tile_bits has rows that nobody uses"
    )


@settings(max_examples=40)
@given(case=random_masks(max_leaves=2))
def test_a_mask_survives_pytree_and_tensor_round_trips(case):
    import torch.utils._pytree as pytree

    mask = case.compile()
    leaves, spec = pytree.tree_flatten(mask)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    rebuilt = masks.BlockMask.from_tensors(mask.tensors(), mask.layout, mask.kind)
    for other in (again, rebuilt, mask.to("cpu")):
        assert other.shape == mask.shape and other.kind == mask.kind
        assert (other.block_q, other.block_kv) == (mask.block_q, mask.block_kv)
        assert torch.equal(other.to_dense(), mask.to_dense())


def test_masks_of_tensors_compile_for_a_batch_of_no_samples():
    lengths = torch.zeros(0, dtype=torch.int64)
    query = torch.zeros(0, 2, 40, 16)
    mask = masks.causal() & masks.key_padding(lengths)
    assert flashmark.block_sparse_attention(query, query, query, mask).shape == query.shape
