"""Bias, sinks, softcap, dropout, lse gradients, empty rows, against the float64 definition."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import flashmark
from flashmark import masks
from tests import helpers
from tests.block_sparse.test_accuracy import compare, named

RULES = {"none": None, "causal": helpers.causal(), "window": helpers.causal() & helpers.window(20)}


@pytest.fixture(params=helpers.BACKENDS)
def op(request):
    return functools.partial(flashmark.block_sparse_attention, backend=request.param)


def inputs(batch=2, heads=4, q_len=70, kv_len=90, dim=16, **options):
    return named(
        *helpers.qkv(
            batch, heads, q_len, dim, kv_heads=options.pop("kv_heads", 2), kv_len=kv_len, **options
        )
    )


@pytest.mark.parametrize(
    "deterministic", [None, True, False], ids=["default", "deterministic", "atomic"]
)
@pytest.mark.parametrize("rule", RULES)
def test_relative_bias(op, rule, deterministic):
    tensors = inputs() | {"bias": helpers.randn(4, 70 + 90 - 1, seed=7, grad=True)}
    compare(op, tensors, RULES[rule], deterministic=deterministic)


def test_relative_bias_is_indexed_by_distance(op):
    """Entry k is added where j - i == k - (Nq - 1)."""
    query, key, value = helpers.qkv(1, 2, 5, 4, kv_len=8, grad=False)
    bias = helpers.randn(2, 12, seed=7)
    spelled = torch.empty(1, 2, 5, 8)
    for h, i, j in itertools.product(range(2), range(5), range(8)):
        spelled[0, h, i, j] = bias[h, j - i + 4]
    helpers.assert_close(
        op(query, key, value, bias=bias), op(query, key, value, bias=spelled), 1e-6
    )


DENSE = [
    (2, 4, 70, 90),
    (1, 4, 70, 90),
    (2, 1, 70, 90),
    (1, 1, 70, 90),
    (1, 1, 1, 90),
    (2, 1, 1, 90),
    (1, 4, 70, 1),
    (2, 4, 1, 1),
]


@pytest.mark.parametrize("shape", DENSE, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("rule", ["none", "window"])
def test_dense_bias_of_any_broadcastable_shape(op, rule, shape):
    tensors = inputs() | {"bias": helpers.randn(*shape, seed=7, grad=True)}
    compare(op, tensors, RULES[rule])


def test_expanded_and_transposed_dense_bias(op):
    tensors = inputs()
    stored = helpers.randn(2, 1, 90, 70, seed=7, grad=True)
    bias = stored.transpose(2, 3).expand(2, 4, 70, 90)
    plain = op(**tensors, mask=masks.causal(), bias=bias.contiguous())
    out = op(**tensors, mask=masks.causal(), bias=bias)
    helpers.assert_close(out, plain, 1e-6)
    (grad,) = torch.autograd.grad(out.square().sum(), stored)
    (wanted,) = torch.autograd.grad(plain.square().sum(), stored)
    helpers.assert_close(grad, wanted, 5e-5)


def test_bias_of_minus_infinity_hides_a_key(op):
    query, key, value = helpers.qkv(1, 2, 40, 8)
    hidden = ~helpers.causal().dense(1, 2, 40, 40)
    bias = torch.zeros(1, 2, 40, 40).masked_fill(hidden, float("-inf"))
    bias[..., 3, :] = float("-inf")
    out, lse = op(query, key, value, bias=bias, return_lse=True)
    visible = ~hidden
    visible[..., 3, :] = False
    wanted, wanted_lse = op(query, key, value, masks.dense(visible), return_lse=True)
    helpers.assert_close(out, wanted, 1e-6)
    helpers.assert_close(lse, wanted_lse, 1e-6)
    for grad in torch.autograd.grad(out.sum() + lse[..., :3].sum(), (query, key, value)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 159), (2, 4, 70, 90)], ids=["relative", "dense"])
@pytest.mark.parametrize("extra", ["bias", "sinks"])
def test_float32_bias_and_sinks_with_bfloat16_inputs(op, shape, extra):
    tensors = inputs(dtype=torch.bfloat16)
    shape = shape if extra == "bias" else (4,)
    tensors[extra] = helpers.randn(*shape, seed=7, grad=True)
    actual = compare(op, tensors, RULES["causal"], forward=2e-2, gradient=4e-2)
    assert actual[f"d {extra}"].dtype == torch.float32


@pytest.mark.parametrize("rule", RULES)
def test_sinks(op, rule):
    tensors = inputs() | {"sinks": helpers.randn(4, seed=8, grad=True)}
    compare(op, tensors, RULES[rule])


def test_a_sink_is_one_more_key_without_a_value(op):
    query, key, value = helpers.qkv(1, 2, 30, 8, grad=False)
    sinks = torch.tensor([0.5, -1.0])
    out, lse = op(query, key, value, masks.causal(), sinks=sinks, return_lse=True)
    plain, plain_lse = op(query, key, value, masks.causal(), return_lse=True)
    total = torch.logaddexp(plain_lse, sinks.view(1, 2, 1))
    helpers.assert_close(lse, total, 1e-6)
    helpers.assert_close(out, plain * (plain_lse - total).exp().unsqueeze(-1), 1e-5)


@pytest.mark.parametrize("softcap", [0.5, 20.0])
@pytest.mark.parametrize("rule", ["none", "window"])
def test_softcap(op, rule, softcap):
    compare(op, inputs(), RULES[rule], softcap=softcap, scale=1.0)


def test_everything_together(op):
    tensors = inputs() | {
        "bias": helpers.randn(4, 159, seed=7, grad=True),
        "sinks": helpers.randn(4, seed=8, grad=True),
        "kv_lengths": torch.tensor([90, 33], dtype=torch.int32),
    }
    rule = RULES["window"]
    compare(op, tensors, rule, softcap=3.0, scale=0.7, dropout_p=0.3, dropout_seed=99)


def test_softcap_is_before_the_bias_and_after_the_scale(op):
    query, key, value = helpers.qkv(1, 1, 9, 4, grad=False)
    bias = helpers.randn(1, 1, 9, 9, seed=5)
    logits = 2.0 * torch.tanh(query @ key.mT * 0.5 / 2.0) + bias
    out = op(query, key, value, bias=bias, softcap=2.0, scale=0.5)
    helpers.assert_close(out, logits.softmax(-1) @ value, 1e-5)


# ---- dropout

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, words):
    """The published answers of Random123 for philox4x32-10."""
    from flashmark.reference import philox4x32

    result = philox4x32(key, tuple(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in result) == words


def philox_keep(seed, p, b, h, heads, i, j):
    """The definition of dropout in plain Python integers."""
    c = [j // 4, i, b * heads + h, 0]
    k0, k1 = seed & ONES, (seed >> 32) & ONES
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & ONES, (p0 >> 32) ^ c[3] ^ k1, p0 & ONES]
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c[j % 4] >= int(p * 2**32)


@pytest.mark.parametrize("seed", [0, 42, 2**40 + 5, 2**63 - 1, -3], ids=str)
def test_dropout_keeps_exactly_the_defined_elements(op, seed):
    batch, heads, q_len, kv_len, p = 2, 3, 9, 21, 0.4
    query, key, _ = helpers.qkv(batch, heads, q_len, 4, kv_len=kv_len, grad=False)
    value = torch.eye(kv_len).expand(
        batch, heads, kv_len, kv_len
    )  # the output is the probabilities themselves
    kept = op(query, key, value, dropout_p=p, dropout_seed=seed) != 0
    for b, h, i, j in itertools.product(range(batch), range(heads), range(q_len), range(kv_len)):
        assert kept[b, h, i, j].item() == philox_keep(seed, p, b, h, heads, i, j), (b, h, i, j)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", [5, torch.tensor([2**50 + 3])], ids=["int", "tensor"])
def test_dropout_gradients(op, rule, seed):
    compare(op, inputs(), RULES[rule], dropout_p=0.25, dropout_seed=seed)


def test_dropout_leaves_lse_alone_and_rescales(op):
    query, key, _ = helpers.qkv(1, 2, 64, 8, kv_len=256, grad=False)
    value = torch.ones(1, 2, 256, 1)
    out, lse = op(query, key, value, dropout_p=0.5, dropout_seed=3, return_lse=True)
    helpers.assert_identical(lse, op(query, key, value, return_lse=True)[1])
    assert abs(out.mean().item() - 1) < 0.03 and out.std() > 0.01
    helpers.assert_identical(
        op(query, key, value, dropout_p=0.0, dropout_seed=3), op(query, key, value)
    )


def test_dropout_without_a_seed_follows_torchs_generator(op):
    query, key, value = helpers.qkv(1, 2, 30, 8, grad=False)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws += [op(query, key, value, dropout_p=0.5), op(query, key, value, dropout_p=0.5)]
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[4])


def test_dropout_without_a_seed_has_the_gradient_of_what_it_drew(op):
    query, key, value = helpers.qkv(1, 1, 30, 8)
    out = op(query, key, value, dropout_p=0.5)
    (grad,) = torch.autograd.grad(out.sum(), value)
    # out is linear in value: <d, value> equals the sum
    helpers.assert_close((grad * value).sum(), out.sum(), 1e-4)


# ---- lse and empty rows


def test_gradient_of_lse_alone(op):
    query, key, value = helpers.qkv(1, 4, 50, 8, kv_heads=2)
    _, lse = op(query, key, value, masks.causal(), return_lse=True)
    d_query, d_key, d_value = torch.autograd.grad(
        lse.square().sum(), (query, key, value), allow_unused=True
    )
    wide = {
        name: t.detach().double().requires_grad_() for name, t in named(query, key, value).items()
    }
    wanted = flashmark.reference.block_sparse_attention(
        **wide, mask=masks.causal(), return_lse=True
    )[1]
    exact = torch.autograd.grad(wanted.square().sum(), (wide["query"], wide["key"]))
    helpers.assert_close(d_query, exact[0], 5e-5)
    helpers.assert_close(d_key, exact[1], 5e-5)
    assert d_value is None or not d_value.any()


EMPTY = {
    "everything-hidden": helpers.prefix(0),
    "first-rows": ~helpers.causal() & helpers.prefix(80),
    "more-queries-than-keys": helpers.causal(),
    "one-head": helpers.mask_mod("head 1", lambda b, h, q, kv: (h != 1) & (q >= kv)),
    "one-sample": helpers.key_padding(torch.tensor([0, 30])),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-softcap"])
def test_rows_without_a_key_are_zero(op, name, extras):
    q_len, kv_len = (90, 70) if name == "more-queries-than-keys" else (70, 90)
    tensors = inputs(q_len=q_len, kv_len=kv_len)
    options = {}
    if extras:
        tensors["bias"] = helpers.randn(4, q_len + kv_len - 1, seed=7, grad=True)
        options["softcap"] = 5.0
    rule = EMPTY[name]
    actual = compare(op, tensors, rule, **options)
    empty = ~rule.dense(2, 4, q_len, kv_len).any(-1)
    assert empty.any()
    assert (actual["out"][empty] == 0).all()
    assert (actual["lse"][empty] == float("-inf")).all()
    assert (actual["d query"][empty] == 0).all()


@pytest.mark.parametrize("name", EMPTY)
def test_a_sink_and_no_key(op, name):
    q_len, kv_len = (90, 70) if name == "more-queries-than-keys" else (70, 90)
    tensors = inputs(q_len=q_len, kv_len=kv_len) | {"sinks": helpers.randn(4, seed=8, grad=True)}
    rule = EMPTY[name]
    actual = compare(op, tensors, rule)
    empty = ~rule.dense(2, 4, q_len, kv_len).any(-1)
    assert (actual["out"][empty] == 0).all()
    sinks = tensors["sinks"].detach().view(1, 4, 1).expand(2, 4, q_len)
    assert torch.equal(actual["lse"][empty], sinks[empty])


def test_a_sink_of_minus_infinity_is_no_sink(op):
    query, key, value = helpers.qkv(1, 2, 20, 8, kv_len=10, grad=False)
    sinks = torch.full((2,), float("-inf"))
    for a, b in zip(
        op(query, key, value, masks.causal(), sinks=sinks, return_lse=True),
        op(query, key, value, masks.causal(), return_lse=True),
        strict=True,
    ):
        helpers.assert_close(a, b, 1e-6)


@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len"),
    [(0, 5, 5), (2, 0, 5), (2, 5, 0)],
    ids=["no-sample", "no-query", "no-key"],
)
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["none", "causal"])
def test_empty_tensors(op, batch, q_len, kv_len, mask):
    query = torch.randn(batch, 2, q_len, 4, requires_grad=True)
    key, value = (torch.randn(batch, 2, kv_len, 4, requires_grad=True) for _ in range(2))
    out, lse = op(query, key, value, mask, return_lse=True)
    assert out.shape == (batch, 2, q_len, 4) and lse.shape == (batch, 2, q_len)
    assert (out == 0).all() and (lse == float("-inf")).all()
    for leaf, grad in zip(
        (query, key, value), torch.autograd.grad(out.sum(), (query, key, value)), strict=True
    ):
        assert grad.shape == leaf.shape and not grad.any()
