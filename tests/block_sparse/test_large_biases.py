"""A bias of any size means what it means in PyTorch: scores and bias are added in float32.

Where the bias of a whole row is so low that float32 holds no score beside it, as additive masks
write padding, the row is the mean of the values, its lse is finite and its gradients are those of
that mean. Only -inf hides a key.
"""

from __future__ import annotations

import math

import pytest
import torch

import flashmark
from flashmark import masks
from tests import helpers

ALL_BACKENDS = [*helpers.BACKENDS, "reference"]
LOWEST = torch.finfo(torch.float32).min


def definition(query, key, value, bias, *, visible=None, sinks=None, softcap=None):
    """out and lse in float64, of logits that were rounded to float32; differentiable."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    exact = scores + bias.double()
    held = (scores.float() + bias.float()).double()
    logits = exact + torch.where(held.isinf(), exact, held - exact).detach()
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    top = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    out = (weights / total)[..., : key.shape[2]] @ value
    return out, (top + total.log()).squeeze(-1)


def check(call, leaves, expected, tolerance, rows=()):
    """Outputs and gradients; `rows` by themselves as well, for they may be far smaller."""
    out, lse = call(*leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted_out, wanted_lse = expected(*wide)
    assert lse.isfinite().all()
    helpers.assert_close(out, wanted_out, tolerance)
    assert ((lse - wanted_lse).abs() <= 1e-6 * wanted_lse.abs() + 1e-3).all()
    d_out = helpers.randn(*out.shape, dtype=torch.bfloat16, seed=3)
    grads = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
    wanted = torch.autograd.grad(wanted_out, wide, d_out.double())
    for name, got, want in zip(("dq", "dk", "dv"), grads, wanted, strict=False):
        helpers.assert_close(got, want, 5 * tolerance, name)
    for row in rows:
        helpers.assert_close(out[:, :, row], wanted_out[:, :, row], tolerance, f"row {row}")
        helpers.assert_close(grads[0][:, :, row], wanted[0][:, :, row], 5 * tolerance, f"dq {row}")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("low", [-1e4, -65504.0, -1e9, -3e38, LOWEST], ids="{:.0e}".format)
@pytest.mark.parametrize("lengths", [(70, 70), (3, 130), (1, 40)], ids=str)
def test_rows_under_one_low_bias_are_means(backend, low, lengths):
    q_len, kv_len = lengths
    leaves = helpers.qkv(1, 4, q_len, 16, kv_heads=2, kv_len=kv_len)
    bias = torch.zeros(1, 1, q_len, kv_len)
    bias[:, :, -1] = low
    check(
        lambda *x: flashmark.block_sparse_attention(
            *x, bias=bias, return_lse=True, backend=backend
        ),
        leaves, lambda *x: definition(*x, bias), 2e-3, rows=[q_len - 1],
    )  # fmt: skip


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
    ],
    ids=["bf16", "bf16-bias-f32", "f16-bias-f32", "f16"],
)
def test_half_precision(backend, dtypes):
    dtype, bias_dtype = dtypes
    leaves = helpers.qkv(1, 2, 140, 24, dtype=dtype)
    bias = torch.zeros(1, 1, 140, 140, dtype=bias_dtype)
    bias[:, :, 99:] = torch.finfo(bias_dtype).min
    check(
        lambda *x: flashmark.block_sparse_attention(
            *x, bias=bias, return_lse=True, backend=backend
        ),
        leaves, lambda *x: definition(*x, bias), 1.5e-2, rows=[99, 139],
    )  # fmt: skip


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("size", [1e3, -1e3, 1e5, -1e6], ids="{:.0e}".format)
@pytest.mark.parametrize("kind", ["dense", "relative"])
def test_a_constant_bias_changes_nothing_but_what_float32_rounds(backend, size, kind):
    leaves = helpers.qkv(2, 2, 90, 16)
    shape = (2, 179) if kind == "relative" else (1, 2, 90, 90)
    bias = torch.full(shape, size)
    check(
        lambda *x: flashmark.block_sparse_attention(
            *x, masks.causal(), bias=bias, return_lse=True, backend=backend
        ),
        leaves,
        lambda *x: definition(*x, torch.tensor(size), visible=helpers.causal().dense(2, 2, 90, 90)),
        2e-5 if abs(size) == 1e3 else 2e-3 if size > 0 else 2e-2,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_low_bias_beside_sinks_softcap_and_hidden_keys(backend):
    leaves = helpers.qkv(1, 2, 50, 16)
    sinks = torch.tensor([-1e9, 0.5])
    bias = torch.zeros(1, 2, 50, 50)
    bias[:, :, 20:30] = -1e9
    bias[:, :, :, 7] = -math.inf
    options = {"sinks": sinks, "softcap": 5.0}
    check(
        lambda *x: flashmark.block_sparse_attention(
            *x, masks.sliding_window(30, 30), bias=bias, return_lse=True, backend=backend, **options
        ),
        leaves,
        lambda *x: definition(
            *x, bias, visible=helpers.window(30, 30).dense(1, 2, 50, 50), sinks=sinks.double(),
            softcap=5.0,
        ),
        2e-3, rows=[25],
    )  # fmt: skip


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_gradients_of_a_low_bias_and_of_sinks_beside_it(backend):
    query, key, value = helpers.qkv(1, 2, 40, 16)
    bias = torch.zeros(1, 2, 40, 40)
    bias[:, :, 11] = LOWEST
    sinks = torch.tensor([LOWEST, 0.25], requires_grad=True)
    bias.requires_grad_()
    out = flashmark.block_sparse_attention(
        query, key, value, bias=bias, sinks=sinks, backend=backend
    )
    wide = [x.detach().double() for x in (query, key, value)]
    wide_bias = torch.zeros(1, 2, 40, 40, dtype=torch.float64)
    wide_bias[:, :, 11] = LOWEST
    wide_sinks = sinks.detach().double().requires_grad_()
    wide_bias.requires_grad_()
    wanted, _ = definition_of_leaves(wide, wide_bias, wide_sinks)
    d_out = helpers.randn(*out.shape, seed=5)
    got = torch.autograd.grad(out, [bias, sinks], d_out)
    want = torch.autograd.grad(wanted, [wide_bias, wide_sinks], d_out.double())
    helpers.assert_close(got[0], want[0], 1e-4, "dbias")
    helpers.assert_close(got[0][:, :, 11], want[0][:, :, 11], 1e-3, "dbias of the low row")
    helpers.assert_close(got[1], want[1], 1e-4, "dsinks")


def definition_of_leaves(tensors, bias, sinks):
    """As `definition`, but bias and sinks get gradients; the row of LOWEST is a plain mean."""
    query, key, value = tensors
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = torch.where(bias.detach() < -1e30, 0.0, scores)  # nothing of them is left
    logits = torch.cat([scores + bias, sinks.view(1, -1, 1, 1).expand(1, 2, 40, 1)], -1)
    return logits.softmax(-1)[..., :40] @ value, None


def test_the_budget_of_check_counts_the_bias_as_a_score():
    leaves = helpers.qkv(1, 2, 40, 16)
    bias = torch.zeros(1, 1, 40, 40)
    bias[:, :, 9] = -1e4
    report = flashmark.check(flashmark.block_sparse_attention, *leaves, bias=bias)
    assert report, report
