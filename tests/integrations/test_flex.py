"""flashmark.integrations.flex.flex_attention takes FlexAttention's calls."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as flex

import flashmark
from flashmark import masks
from flashmark.integrations.flex import flex_attention
from tests import helpers

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def sliding(b, h, q, kv):
    return (q >= kv) & (q - kv < 40 + 30 * h)


def block_mask(fn=sliding, heads=4, size=128):
    return flex.create_block_mask(fn, None, heads, 200, 200, device="cpu", BLOCK_SIZE=size)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_same_call_gives_the_same_result(size):
    query, key, value = helpers.qkv(2, 4, 200, 16, kv_heads=2, v_dim=24, grad=False)
    given = {"block_mask": block_mask(size=size), "scale": 0.3, "enable_gqa": True}
    aux = flex.AuxRequest(lse=True)
    wanted, wanted_aux = flex.flex_attention(query, key, value, **given, return_aux=aux)
    out, found = flex_attention(query, key, value, **given, return_aux=aux)
    helpers.assert_close(out, wanted.double(), 1e-5)
    helpers.assert_close(found.lse, wanted_aux.lse.double(), 1e-5)
    out, lse = flex_attention(query, key, value, **given, return_lse=True)
    assert torch.equal(lse, found.lse)
    helpers.assert_identical(flex_attention(query, key, value, **given), out)


def test_gradients():
    query, key, value = leaves = helpers.qkv(1, 4, 200, 16)
    mask = block_mask()
    out = flex_attention(query, key, value, block_mask=mask)
    wanted = flashmark.reference.block_sparse_attention(query, key, value, masks.mask_mod(sliding))
    grads = torch.autograd.grad(out.square().sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        helpers.assert_close(a, b.double(), 5e-5)


def test_without_a_mask_and_with_masks_of_ours():
    query, key, value = helpers.qkv(1, 2, 200, 16, grad=False)
    helpers.assert_close(
        flex_attention(query, key, value), flex.flex_attention(query, key, value).double(), 1e-5
    )
    wanted = flashmark.block_sparse_attention(query, key, value, masks.causal())
    helpers.assert_identical(flex_attention(query, key, value, block_mask=masks.causal()), wanted)


@pytest.mark.plain_empty
def test_compiled():
    torch._dynamo.reset()
    query, key, value = helpers.qkv(1, 4, 200, 16, grad=False)
    mask = block_mask()
    wanted = flex_attention(query, key, value, block_mask=mask)
    broken = torch.compile(flex_attention, backend="aot_eager")
    helpers.assert_close(broken(query, key, value, block_mask=mask), wanted, 1e-6)
    whole = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)
    outside = masks.from_flex(mask)
    helpers.assert_close(whole(query, key, value, block_mask=outside), wanted, 1e-6)


def test_what_has_no_counterpart_is_refused():
    query, key, value = helpers.qkv(1, 4, 20, 16, kv_heads=2, grad=False)
    with pytest.raises(NotImplementedError, match="score_mod: expected None.*`bias`.*`softcap`"):
        flex_attention(query, key, value, lambda score, b, h, q, kv: score * 2)
    with pytest.raises(NotImplementedError, match="return_aux: expected max_scores=False"):
        flex_attention(query, key, value, return_aux=flex.AuxRequest(max_scores=True))
    with pytest.raises(ValueError, match="key: expected 4 heads like query without enable_gqa"):
        flex_attention(query, key, value)
    with pytest.raises(ValueError, match="mask: expected one compiled for"):
        flex_attention(query, key, value, block_mask=block_mask(), enable_gqa=True)
    with pytest.raises(TypeError, match="mask: expected"):
        flex_attention(query, key, value, block_mask=torch.ones(20, 20), enable_gqa=True)
