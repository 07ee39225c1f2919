"""Masks from and to FlexAttention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

import flashmark
from flashmark import compile_mask, masks
from tests import helpers


def by_head_and_sample(b, h, q, kv):
    return (q >= kv + 11 * h) & (kv >= 9 * b)


@pytest.mark.parametrize("block_size", [32, 128, (32, 64)], ids=str)
@pytest.mark.parametrize(
    ("fn", "batch", "heads"),
    [
        pytest.param(lambda b, h, q, kv: q >= kv, None, None, id="causal"),
        pytest.param(lambda b, h, q, kv: (q - kv).abs() < 40, None, None, id="band"),
        pytest.param(by_head_and_sample, 2, 3, id="per-head-and-sample"),
        pytest.param(lambda b, h, q, kv: kv < 0, None, None, id="empty"),
    ],
)
@pytest.mark.parametrize("lengths", [(256, 256), (130, 200)], ids=["256x256", "130x200"])
def test_flex_masks_come_and_go(fn, batch, heads, lengths, block_size):
    flex = create_block_mask(fn, batch, heads, *lengths, device="cpu", BLOCK_SIZE=block_size)
    expected = masks.mask_mod(fn).to_dense(batch or 1, heads or 1, *lengths)
    ours = masks.from_flex(flex)
    assert ours.shape[2:] == lengths
    assert torch.equal(ours.to_dense().expand_as(expected), expected)
    back = masks.to_flex(ours)
    assert back.seq_lengths == lengths and back.BLOCK_SIZE == (ours.block_q, ours.block_kv)
    b, h, i, j = (
        torch.arange(n).view([-1 if d == axis else 1 for d in range(4)])
        for axis, n in enumerate(expected.shape)
    )
    assert torch.equal(back.mask_mod(b, h, i, j).expand_as(expected), expected)
    # FlexAttention visits the listed tiles only: everything visible must lie in one
    assert (back.to_dense().sum() <= flex.to_dense().sum()).item()
    again = masks.from_flex(back)
    assert torch.equal(again.to_dense().expand_as(expected), expected)


def test_to_flex_is_what_flex_attention_computes():
    mask = compile_mask(
        masks.causal() & masks.sliding_window(50), 1, 2, 130, 130, device="cpu", block_size=64
    )
    query, key, value = helpers.qkv(1, 2, 130, 16, grad=False)
    theirs = flex_attention(query, key, value, block_mask=masks.to_flex(mask))
    ours = flashmark.block_sparse_attention(query, key, value, mask, backend="eager")
    helpers.assert_close(theirs, ours, 1e-5)


def test_to_flex_refuses_index_lists_of_gigabytes():
    mask = compile_mask(masks.causal(), 1, 1, 4_194_304, 4_194_304, device="cpu")
    with pytest.raises(ValueError, match="to_flex|FlexAttention|block"):
        masks.to_flex(mask)


def test_from_flex_of_the_full_mask():
    assert (
        masks.from_flex(create_block_mask(noop_mask, None, None, 200, 200, device="cpu")).density
        == 1.0
    )
