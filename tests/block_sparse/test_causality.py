"""Nothing later than a query reaches it: outputs keep their bits, gradients are exactly zero."""

from __future__ import annotations

import functools

import pytest
import torch

import flashmark
from flashmark import masks
from tests import helpers

MASKS = {
    "causal": masks.causal(),
    "window": masks.causal() & masks.sliding_window(40),
    "sink-window": masks.causal() & (masks.sliding_window(40) | masks.prefix(4)),
    "documents": masks.causal() & masks.documents(torch.arange(150) // 37),
    "dilated": masks.causal() & masks.dilated(7),
    "head-wise": masks.mask_mod(lambda b, h, q, kv: kv <= q - 3 * h),
}
N = 150


@pytest.fixture(params=helpers.BACKENDS)
def op(request):
    return functools.partial(flashmark.block_sparse_attention, backend=request.param)


@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("last", [0, 31, 64, 100])
def test_outputs_ignore_the_future_bitwise(op, name, last, block_size):
    query, key, value = helpers.qkv(1, 4, N, 16, kv_heads=2, grad=False)
    mask = masks.compile_mask(MASKS[name], 1, 4, N, N, device="cpu", block_size=block_size)
    out, lse = op(query, key, value, mask, return_lse=True)
    later = slice(last + 1, None)
    for poison in (float("nan"), float("inf"), float("-inf"), 1e4, -1e4):
        changed = [t.clone() for t in (query, key, value)]
        changed[0][:, :, later] = changed[1][:, :, later] = poison
        changed[2][:, :, later] = torch.randn_like(changed[2][:, :, later]).sign() * 1e30
        new_out, new_lse = op(*changed, mask, return_lse=True)
        helpers.assert_identical(
            new_out[:, :, : last + 1], out[:, :, : last + 1], f"out with {poison}"
        )
        assert torch.equal(new_lse[:, :, : last + 1], lse[:, :, : last + 1]), f"lse with {poison}"


@pytest.mark.parametrize(
    "feature", ["relative-bias", "dense-bias", "sinks", "softcap", "dropout", "bfloat16"]
)
def test_outputs_ignore_the_future_bitwise_with(op, feature):
    last, later = 70, slice(71, None)
    dtype = torch.bfloat16 if feature == "bfloat16" else torch.float32
    query, key, value = helpers.qkv(1, 2, N, 16, dtype=dtype, grad=False)
    options = {
        "relative-bias": {"bias": helpers.randn(2, 2 * N - 1, seed=7)},
        "dense-bias": {"bias": helpers.randn(1, 2, N, N, seed=7)},
        "sinks": {"sinks": helpers.randn(2, seed=7)},
        "softcap": {"softcap": 5.0},
        "dropout": {"dropout_p": 0.5, "dropout_seed": 3},
        "bfloat16": {},
    }[feature]
    out = op(query, key, value, masks.causal(), **options)
    for poison in (float("nan"), float("inf"), 1e4):
        changed = [t.clone() for t in (query, key, value)]
        changed[0][:, :, later] = changed[1][:, :, later] = poison
        changed[2][:, :, later] = 1e30
        if feature == "dense-bias":
            options = {"bias": options["bias"].clone()}
            options["bias"][:, :, later] = options["bias"][:, :, :, later] = float("nan")
        helpers.assert_identical(
            op(*changed, masks.causal(), **options)[:, :, : last + 1], out[:, :, : last + 1]
        )


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomic"])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_of_the_future_are_exactly_zero(op, name, deterministic):
    query, key, value = helpers.qkv(1, 2, N, 16)
    for row in (0, 40, 90):
        out, lse = op(query, key, value, MASKS[name], return_lse=True, deterministic=deterministic)
        chosen = out[:, :, : row + 1].sum() + lse[:, 0, row].sum()
        for leaf, grad in zip("qkv", torch.autograd.grad(chosen, (query, key, value)), strict=True):
            assert grad.isfinite().all()
            assert not grad[:, :, row + 1 :].any(), f"d{leaf} reaches past {row}"
            assert grad[:, :, : row + 1].any()


def test_hidden_keys_in_the_past_do_not_matter_either(op):
    """A window forgets: what left it may hold anything but a NaN value."""
    query, key, value = helpers.qkv(1, 2, N, 16, grad=False)
    mask = MASKS["window"]
    out = op(query, key, value, mask)
    key, value = key.clone(), value.clone()
    key[:, :, :50], value[:, :, :50] = float("nan"), 1e30
    # query 89 is the first that sees keys 50 and later only
    helpers.assert_identical(op(query, key, value, mask)[:, :, 89:], out[:, :, 89:])


def test_rows_depend_on_the_prefix_only(op):
    """Causal attention over a prefix of the sequence is the prefix of attention over it all."""
    query, key, value = helpers.qkv(1, 2, N, 16, grad=False)
    whole = op(query, key, value, masks.causal())
    for n in (1, 33, 128):
        part = op(*(t[:, :, :n] for t in (query, key, value)), masks.causal())
        helpers.assert_close(part, whole[:, :, :n], 1e-5)
