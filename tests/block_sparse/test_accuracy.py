"""block_sparse_attention against its float64 definition and against PyTorch's own attention."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import flashmark
from flashmark import masks
from tests import helpers

FORWARD, GRADIENT = 1e-5, 5e-5  # relative, float32


@pytest.fixture(params=helpers.BACKENDS)
def op(request):
    return functools.partial(flashmark.block_sparse_attention, backend=request.param)


def compare(op, tensors, rule=None, *, forward=FORWARD, gradient=GRADIENT, mask=None, **options):
    """Outputs and all gradients against the float64 reference on a mask written out by formula."""
    query, key = tensors["query"], tensors["key"]
    sizes = *query.shape[:2], query.shape[2], key.shape[2]
    if mask is None and rule is not None:
        mask = rule.mask
    expected = helpers.outputs_and_grads(
        flashmark.reference.block_sparse_attention,
        helpers.upcast(tensors),
        mask=rule.dense(*sizes) if rule else None,
        **options,
    )
    actual = helpers.outputs_and_grads(op, tensors, mask=mask, **options)
    for name, value in expected.items():
        helpers.assert_close(
            actual[name], value, gradient if name.startswith("d ") else forward, name
        )
    assert actual["out"].dtype == query.dtype
    assert actual["lse"].dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    return actual


def named(query, key, value):
    return {"query": query, "key": key, "value": value}


RULES = {
    "none": None,
    "causal": helpers.causal(),
    "window": helpers.causal() & helpers.window(20),
    "sink-window": helpers.causal() & (helpers.window(33) | helpers.prefix(4)),
    "pinned": helpers.pinned(3),
    "dilated": helpers.causal() & helpers.dilated(5),
    "anticausal": ~helpers.causal(),
    "head-wise": helpers.mask_mod("head", lambda b, h, q, kv: (q + h) % 3 != kv % 3),
}

# B, Hq, Hkv, Nq, Nk, D, Dv, layout, mask
SHAPES = [
    (2, 4, 4, 1, 1, 1, 1, "contiguous", "none"),
    (1, 2, 2, 17, 17, 24, 24, "bnhd", "causal"),
    (2, 4, 1, 127, 127, 64, 64, "bnhd", "causal"),
    (1, 4, 1, 129, 129, 80, 80, "gaps", "window"),
    (1, 2, 2, 300, 300, 128, 128, "bnhd", "sink-window"),
    (1, 8, 2, 300, 300, 64, 64, "contiguous", "causal"),
    (1, 4, 4, 129, 129, 1, 1, "bnhd", "causal"),
    (1, 4, 1, 17, 300, 64, 64, "bnhd", "causal"),
    (1, 4, 1, 300, 17, 64, 64, "bnhd", "causal"),
    (2, 4, 1, 1, 127, 24, 24, "contiguous", "window"),
    (1, 2, 1, 127, 1, 80, 80, "gaps", "none"),
    (1, 2, 1, 129, 127, 128, 24, "bnhd", "none"),
    (2, 3, 3, 127, 129, 24, 128, "gaps", "pinned"),
    (1, 8, 2, 129, 129, 24, 24, "bnhd", "dilated"),
    (1, 2, 2, 128, 256, 64, 64, "contiguous", "window"),
    (1, 4, 4, 127, 129, 64, 80, "bnhd", "anticausal"),
    (2, 4, 2, 129, 127, 64, 64, "bnhd", "head-wise"),
    (1, 1, 1, 64, 64, 256, 256, "contiguous", "causal"),
    (3, 1, 1, 31, 33, 16, 1, "gaps", "causal"),
]


def shape_id(shape):
    batch, heads, kv_heads, q_len, kv_len, dim, v_dim, layout, mask = shape
    lengths = f"N{q_len}" if q_len == kv_len else f"N{q_len}x{kv_len}"
    dims = f"D{dim}" if dim == v_dim else f"D{dim}x{v_dim}"
    return f"B{batch}-H{heads}-G{heads // kv_heads}-{lengths}-{dims}-{layout}-{mask}"


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_float32_is_close_to_float64(op, shape):
    batch, heads, kv_heads, q_len, kv_len, dim, v_dim, layout, name = shape
    tensors = named(
        *helpers.qkv(
            batch, heads, q_len, dim, kv_heads=kv_heads, kv_len=kv_len, v_dim=v_dim, layout=layout
        )
    )
    compare(op, tensors, RULES[name])


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, (16, 64), (64, 32), (128, 16)], ids=str)
@pytest.mark.parametrize("name", ["window", "head-wise", "causal"])
def test_any_block_size_gives_the_same_result(op, name, block_size):
    tensors = named(*helpers.qkv(2, 4, 150, 32, kv_heads=2, kv_len=170))
    rule = RULES[name]
    mask = masks.compile_mask(rule.mask, 2, 4, 150, 170, device="cpu", block_size=block_size)
    compare(op, tensors, rule, mask=mask)


PER_SAMPLE = {
    "prefix": helpers.prefix(torch.tensor([0, 7, 150])),
    "documents": helpers.causal()
    & helpers.documents((torch.arange(150) // torch.tensor([[150], [40], [20]])) - 1),
    "key-padding": helpers.key_padding(torch.tensor([150, 40, 0])) & helpers.causal(),
    "bool-padding": helpers.key_padding(torch.arange(450).view(3, 150) % 7 != 3),
    "dense": helpers.dense(
        torch.rand(3, 1, 100, 150, generator=torch.Generator().manual_seed(0)) < 0.3
    ),
    "sample-and-head": helpers.mask_mod(
        "both", lambda b, h, q, kv: (q - kv).abs() <= 9 * b + 4 * h
    ),
    "blocks": helpers.blocks(
        torch.rand(3, 4, 2, 3, generator=torch.Generator().manual_seed(1)) < 0.5, 64
    ),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_masks_per_sample_and_per_head(op, name):
    tensors = named(*helpers.qkv(3, 4, 100, 16, kv_heads=2, kv_len=150))
    rule = PER_SAMPLE[name]
    size = 64 if name == "blocks" else 32
    mask = masks.compile_mask(rule.mask, 3, 4, 100, 150, device="cpu", block_size=size)
    compare(op, tensors, rule, mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["none", "causal", "sink-window"])
@pytest.mark.parametrize(
    "shape", [(127, 127, 64), (129, 300, 24), (300, 300, 128)], ids=["N127", "N129x300", "N300"]
)
def test_half_precision_within_twice_the_error_of_pytorch(op, dtype, name, shape):
    q_len, kv_len, dim = shape
    rule = RULES[name]
    tensors = named(
        *helpers.qkv(1, 4, q_len, dim, kv_heads=1, kv_len=kv_len, dtype=dtype, layout="bnhd")
    )
    mask = rule.dense(1, 4, q_len, kv_len) if rule else None
    dense = flashmark.reference.block_sparse_attention
    exact = helpers.outputs_and_grads(dense, helpers.upcast(tensors), mask=mask)
    plain = helpers.outputs_and_grads(dense, tensors, mask=mask)
    actual = helpers.outputs_and_grads(op, tensors, mask=rule and rule.mask)
    unit = torch.finfo(dtype).eps
    for key, value in exact.items():
        budget = 2 * helpers.relative_error(plain[key], value) + 2 * unit
        helpers.assert_close(actual[key], value, budget, key)
    assert actual["out"].dtype == dtype and actual["lse"].dtype == torch.float32


def test_float64_is_exact_to_float64_rounding(op):
    if "eager" not in str(op.keywords):
        pytest.skip("float64 runs on the eager backend only")
    tensors = named(*helpers.qkv(2, 4, 129, 24, kv_heads=2, kv_len=150, dtype=torch.float64))
    compare(op, tensors, RULES["sink-window"], forward=1e-13, gradient=1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0, 2])
def test_scale(op, scale):
    compare(op, named(*helpers.qkv(1, 2, 70, 16)), RULES["causal"], scale=scale)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_scores_stay_finite_and_right(op, size):
    query, key, value = helpers.qkv(1, 2, 130, 16)
    with torch.no_grad():
        query.mul_(size)
    tensors = named(query, key, value)
    largest = (query.abs().amax() * key.abs().amax() * 16 / 4).item()
    slack = 2 * torch.finfo(torch.float32).eps * largest
    compare(op, tensors, RULES["causal"], forward=FORWARD + slack, gradient=GRADIENT + slack)


def test_scores_beyond_exp_are_shifted_by_a_constant(op):
    """Adding a constant to every logit of a row changes lse by it, and nothing else."""
    query, key, value = helpers.qkv(1, 1, 65, 4, grad=False)
    bias = torch.full((1, 1, 65, 65), 300.0)
    out, lse = op(query, key, value, masks.causal(), return_lse=True)
    shifted, shifted_lse = op(query, key, value, masks.causal(), bias=bias, return_lse=True)
    helpers.assert_close(shifted, out, 1e-4)
    helpers.assert_close(shifted_lse - 300, lse, 1e-4)


@pytest.mark.parametrize("name", ["none", "causal", "window", "head-wise"])
def test_agrees_with_scaled_dot_product_attention(op, name):
    tensors = named(*helpers.qkv(2, 4, 129, 32, kv_heads=4, kv_len=129))
    rule = RULES[name]
    visible = rule.dense(2, 4, 129, 129) if rule else None
    out = op(**tensors, mask=rule and rule.mask)
    theirs = scaled_dot_product_attention(*tensors.values(), attn_mask=visible)
    helpers.assert_close(out, theirs, 2 * FORWARD, "out")
    d_out = helpers.randn(*out.shape, seed=9)
    ours = torch.autograd.grad(out, tensors.values(), d_out)
    for name, a, b in zip(
        tensors, ours, torch.autograd.grad(theirs, tensors.values(), d_out), strict=True
    ):
        helpers.assert_close(a, b, 2 * GRADIENT, f"d {name}")


def test_grouped_heads_agree_with_repeated_ones(op):
    query, key, value = helpers.qkv(2, 8, 65, 16, kv_heads=2)
    mask = masks.causal()
    grouped = op(query, key, value, mask)
    repeated = op(query, key.repeat_interleave(4, 1), value.repeat_interleave(4, 1), mask)
    helpers.assert_close(grouped, repeated, FORWARD)
    theirs = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    helpers.assert_close(grouped, theirs, 2 * FORWARD)


def test_causal_is_aligned_to_the_bottom_right(op):
    """Key j is visible to query i when j <= i + (Nk - Nq), unlike SDPA's is_causal."""
    query, key, value = helpers.qkv(1, 1, 3, 4, kv_len=5, grad=False)
    out = op(query, key, value, masks.causal())
    for i in range(3):
        seen = slice(0, i + 3)
        row = scaled_dot_product_attention(
            query[:, :, i : i + 1], key[:, :, seen], value[:, :, seen]
        )
        helpers.assert_close(out[:, :, i : i + 1], row, 1e-6)


def test_the_default_scale_is_one_over_root_of_dim(op):
    query, key, value = helpers.qkv(1, 1, 20, 24, v_dim=7, grad=False)
    helpers.assert_identical(op(query, key, value), op(query, key, value, scale=1 / math.sqrt(24)))


def test_lse_is_the_natural_log_of_the_denominator(op):
    query, key, value = helpers.qkv(1, 2, 33, 8, grad=False)
    _, lse = op(query, key, value, return_lse=True)
    helpers.assert_close(lse, (query @ key.mT / math.sqrt(8)).logsumexp(-1), FORWARD)
