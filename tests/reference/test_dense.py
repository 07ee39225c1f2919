"""The dense definition against loops over numbers and scaled_dot_product_attention."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flashmark import masks
from flashmark.reference import block_sparse_attention, dropout_keep
from tests import helpers

B, H, KV_HEADS, NQ, NK, D, DV = 2, 4, 2, 5, 7, 3, 2


def by_loops(
    query,
    key,
    value,
    visible,
    *,
    rows=None,
    mask_rows=NQ,
    bias=None,
    scale=None,
    softcap=None,
    sinks=None,
    keep=None,
    p=0.0,
):
    """out and lse with math.exp and Python sums, row by row; visible is indexed by query."""
    scale = 1 / math.sqrt(D) if scale is None else scale
    out, lse = torch.zeros(B, H, NQ, DV).double(), torch.full((B, H, NQ), -math.inf).double()
    for b, h, i in itertools.product(range(B), range(H), range(NQ)):
        g = h // (H // KV_HEADS)
        logits = {}
        for j in range(NK):
            if not visible[b, h, i, j]:
                continue
            s = sum(query[b, h, i, d].item() * key[b, g, j, d].item() for d in range(D)) * scale
            s = softcap * math.tanh(s / softcap) if softcap else s
            if bias is not None and bias.dim() == 2:
                row = i if rows is None else rows[b] + i
                s += bias[h, j - row + mask_rows - 1].item()
            elif bias is not None:
                s += bias.expand(B, H, NQ, NK)[b, h, i, j].item()
            logits[j] = s
        every = [*logits.values(), *([sinks[h].item()] if sinks is not None else [])]
        if not every:
            continue
        total = sum(math.exp(s) for s in every)
        lse[b, h, i] = math.log(total)
        for j, s in logits.items():
            weight = math.exp(s) / total
            if keep is not None:
                weight = weight / (1 - p) if keep[b, h, i, j] else 0.0
            out[b, h, i] += weight * value[b, g, j]
    return out, lse


def inputs():
    return helpers.qkv(
        B, H, NQ, D, kv_heads=KV_HEADS, kv_len=NK, v_dim=DV, dtype=torch.float64, grad=False
    )


def check(actual, wanted):
    for a, w in zip(actual, wanted, strict=True):
        helpers.assert_close(a, w, 1e-12)


RULES = {
    "dense": helpers.prefix(NK),
    "causal": helpers.causal(),
    "empty-rows": ~helpers.causal() & helpers.prefix(5),
    "per-sample-and-head": helpers.mask_mod("both", lambda b, h, q, kv: (q + kv + b + h) % 3 > 0),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "feature", ["plain", "scale", "softcap", "relative-bias", "dense-bias", "sinks", "everything"]
)
def test_against_loops(feature, rule):
    visible = RULES[rule].dense(B, H, NQ, NK)
    relative = helpers.randn(H, NQ + NK - 1, dtype=torch.float64, seed=7)
    options = {
        "plain": {},
        "scale": {"scale": 0.3},
        "softcap": {"softcap": 0.8},
        "relative-bias": {"bias": relative},
        "dense-bias": {"bias": helpers.randn(B, 1, NQ, NK, dtype=torch.float64, seed=7)},
        "sinks": {"sinks": helpers.randn(H, dtype=torch.float64, seed=8)},
    }
    options["everything"] = (
        options["scale"] | options["softcap"] | options["relative-bias"] | options["sinks"]
    )
    options = options[feature]
    wanted = by_loops(*inputs(), visible, **options)
    check(block_sparse_attention(*inputs(), RULES[rule].mask, **options, return_lse=True), wanted)
    check(block_sparse_attention(*inputs(), visible, **options, return_lse=True), wanted)


@pytest.mark.parametrize(
    "offset", [1, torch.tensor([0, 2], dtype=torch.int32)], ids=["int", "per-sample"]
)
def test_query_offset_against_loops(offset):
    starts = [offset] * B if isinstance(offset, int) else offset.tolist()
    square = (helpers.causal() & helpers.window(3)).dense(B, H, NK, NK)
    visible = torch.stack([square[b, :, start : start + NQ] for b, start in enumerate(starts)])
    bias = helpers.randn(H, 2 * NK - 1, dtype=torch.float64, seed=7)
    wanted = by_loops(*inputs(), visible, rows=starts, mask_rows=NK, bias=bias)
    expression = masks.causal() & masks.sliding_window(3)
    for mask in (
        expression,
        masks.compile_mask(expression, B, H, NK, NK, device="cpu", block_size=16),
    ):
        check(
            block_sparse_attention(
                *inputs(), mask, query_offset=offset, bias=bias, return_lse=True
            ),
            wanted,
        )


def test_kv_lengths_against_loops():
    lengths = torch.tensor([0, 4], dtype=torch.int32)
    visible = (torch.arange(NK) < lengths.view(B, 1, 1, 1)).expand(B, H, NQ, NK)
    check(
        block_sparse_attention(*inputs(), kv_lengths=lengths, return_lse=True),
        by_loops(*inputs(), visible),
    )


def test_dropout_against_loops():
    keep = dropout_keep(123, 0.4, B, H, NQ, NK)
    assert keep.shape == (B, H, NQ, NK) and 0.4 < keep.double().mean() < 0.8
    wanted = by_loops(*inputs(), RULES["causal"].dense(B, H, NQ, NK), keep=keep, p=0.4)
    check(
        block_sparse_attention(
            *inputs(), masks.causal(), dropout_p=0.4, dropout_seed=123, return_lse=True
        ),
        wanted,
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_one_minus_p(p):
    kept = dropout_keep(5, p, 2, 2, 100, 203).double().mean().item()
    assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / (4 * 100 * 203))


def test_dropout_differs_by_sample_head_and_row():
    keep = dropout_keep(5, 0.5, 2, 2, 20, 64)
    rows = keep.reshape(-1, 64)
    assert len(rows.unique(dim=0)) == len(rows)
    assert not torch.equal(keep, dropout_keep(6, 0.5, 2, 2, 20, 64))


@pytest.mark.parametrize("rule", ["dense", "causal", "per-sample-and-head"])
def test_against_scaled_dot_product_attention(rule):
    query, key, value = (t.requires_grad_() for t in inputs())
    visible = RULES[rule].dense(B, H, NQ, NK)
    out = block_sparse_attention(query, key, value, RULES[rule].mask)
    theirs = scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    helpers.assert_close(out, theirs, 1e-12)
    d_out = helpers.randn(*out.shape, dtype=torch.float64, seed=9)
    leaves = (query, key, value)
    for a, b in zip(
        torch.autograd.grad(out, leaves, d_out),
        torch.autograd.grad(theirs, leaves, d_out),
        strict=True,
    ):
        helpers.assert_close(a, b, 1e-12)


def test_gradients_of_every_input_by_finite_differences():
    query, key, value = (t.requires_grad_() for t in inputs())
    bias = helpers.randn(H, NQ + NK - 1, dtype=torch.float64, seed=7, grad=True)
    sinks = helpers.randn(H, dtype=torch.float64, seed=8, grad=True)

    def call(query, key, value, bias, sinks):
        rule = RULES["empty-rows"]
        return block_sparse_attention(
            query,
            key,
            value,
            rule.mask,
            bias=bias,
            sinks=sinks,
            softcap=2.0,
            dropout_p=0.3,
            dropout_seed=1,
            return_lse=True,
        )

    assert torch.autograd.gradcheck(call, (query, key, value, bias, sinks))


def test_an_empty_row_has_zero_output_and_zero_gradients():
    query, key, value = (t.requires_grad_() for t in inputs())
    out, lse = block_sparse_attention(query, key, value, masks.prefix(0), return_lse=True)
    assert not out.any() and (lse == -math.inf).all()
    for grad in torch.autograd.grad(
        (out, lse), (query, key, value), (torch.ones_like(out), torch.ones_like(lse))
    ):
        assert not grad.any()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_dtypes(dtype):
    query, key, value = helpers.qkv(1, 2, 9, 4, dtype=dtype, grad=False)
    out, lse = block_sparse_attention(query, key, value, masks.causal(), return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = block_sparse_attention(query.double(), key.double(), value.double(), masks.causal())
    helpers.assert_close(out, exact, 16 * torch.finfo(dtype).eps)
