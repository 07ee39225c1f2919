"""Outputs and tangents of block-sparse attention in one pass, on every backend of this machine,
against float64."""

from __future__ import annotations

import pytest
import torch

import flashmark
from flashmark import masks
from tests import helpers
from tests.block_sparse.features import block_mask

NAMES = ("query", "key", "value", "bias", "sinks")
WINDOW = masks.causal() & masks.sliding_window(33)
INT = torch.int32


def case(q_len=90, kv_len=150, mask=None, *, dim=24, v_dim=17, bias=None, sinks=False,
         only=None, batch=2, **options):  # fmt: skip
    shapes = {
        "query": (batch, 4, q_len, dim), "key": (batch, 2, kv_len, dim),
        "value": (batch, 2, kv_len, v_dim),
    }  # fmt: skip
    shapes |= {"bias": bias} if bias else {}
    shapes |= {"sinks": (4,)} if sinks else {}
    return shapes, only or list(shapes), {"mask": mask, **options}


CASES = {
    "dense": case(),
    "causal": case(mask=masks.causal()),
    "window": case(mask=WINDOW),
    "long": case(200, 1100, WINDOW),
    "small-blocks": case(mask=block_mask(WINDOW, 90, 150, block_size=32)),
    "documents": case(mask=masks.documents(torch.arange(150) // 37)),
    "empty-rows": case(90, 40, masks.causal()),
    "empty-rows-sinks": case(90, 40, masks.causal(), sinks=True),
    "relative-bias": case(mask=masks.causal(), bias=(4, 239), sinks=True, softcap=3.0),
    "dense-bias": case(bias=(2, 1, 90, 150)),
    "bias-of-keys": case(bias=(1, 4, 1, 150), sinks=True),
    "bias-of-queries": case(bias=(2, 4, 90, 1)),
    "dropout": case(dropout_p=0.3, dropout_seed=5, sinks=True),
    "decode": case(
        3, 150, masks.causal(), query_offset=torch.tensor([5, 100], dtype=INT),
        kv_lengths=torch.tensor([60, 150], dtype=INT), bias=(4, 299),
    ),
    "no-keys-of-one": case(kv_lengths=torch.tensor([0, 150], dtype=INT)),
    "negative-scale": case(scale=-0.3),
    "of-query": case(mask=WINDOW, only=["query"]),
    "of-key": case(mask=WINDOW, only=["key"]),
    "of-value": case(mask=WINDOW, only=["value"]),
    "of-sinks": case(sinks=True, only=["sinks"]),
    "of-bias": case(bias=(4, 239), only=["bias"]),
    "one-token": case(1, 1, sinks=True),
    "no-queries": case(0, 5),
    "no-keys": case(5, 0, sinks=True),
}  # fmt: skip


def tangents_of(given, backend, dtype, wide):
    """Outputs and tangents of inputs that were rounded to `dtype`."""
    shapes, only, options = given

    def tensors(seed):
        found = {
            name: helpers.randn(*shape, dtype=dtype, seed=seed + n)
            for n, (name, shape) in enumerate(shapes.items())
        }
        return {n: x.double() for n, x in found.items()} if wide else found

    given, along = tensors(1), tensors(11)

    def attend(*some):
        named = given | dict(zip(only, some, strict=True))
        return flashmark.block_sparse_attention(
            **named, **options, return_lse=True, backend=backend
        )

    return torch.func.jvp(
        attend, tuple(given[n] for n in only), tuple(along[n] for n in only)
    )  # fmt: skip


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_tangents_match_float64(name, backend):
    found = tangents_of(CASES[name], backend, torch.float32, False)
    wanted = tangents_of(CASES[name], "reference", torch.float32, True)
    for part, part64, budget in zip(found, wanted, (1e-5, 5e-5), strict=True):
        for x, y in zip(part, part64, strict=True):
            helpers.assert_close(x, y, budget)


HALF_CASES = [
    "window",
    "documents",
    "relative-bias",
    "dense-bias",
    "dropout",
    "of-value",
    "of-sinks",
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("name", [*HALF_CASES, "odd"])
def test_half_precision_is_as_exact_as_the_definition_in_it(name, backend, dtype):
    given = case(31, 45, WINDOW, dim=17, v_dim=5) if name == "odd" else CASES[name]
    found = tangents_of(given, backend, dtype, False)
    wanted = tangents_of(given, "reference", dtype, True)
    plain = tangents_of(given, "reference", dtype, False)
    for part, part64, same in zip(found, wanted, plain, strict=True):
        error = helpers.relative_error(same[0], part64[0])
        helpers.assert_close(part[0], part64[0], 2 * error + torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_memory_beyond_the_keys_of_a_sample_reaches_nothing(backend, dtype):
    """An odd number of keys: products in bfloat16 take two at a time."""
    x = helpers.randn(2, 1, 70, 16, dtype=dtype)
    lengths = torch.tensor([33, 70])
    held, along = x.clone(), x.cos()
    for memory in (held, along):
        memory[0, :, 33:] = float("nan")

    def attend(k, v):
        return flashmark.block_sparse_attention(x, k, v, kv_lengths=lengths, backend=backend)

    for found in torch.func.jvp(attend, (held, held), (along, along)):
        assert found.isfinite().all()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_tangents_of_empty_rows_are_zero(backend):
    _, (out, lse) = tangents_of(CASES["empty-rows"], backend, torch.float32, False)
    assert not out[:, :, :50].any() and not lse[:, :, :50].any()


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e4])
def test_the_future_reaches_no_tangent(backend, poison):
    tensors = [x.detach().clone() for x in helpers.qkv(1, 2, 150, 16, grad=False)]

    def run():
        def attend(q, k, v):
            return flashmark.block_sparse_attention(q, k, v, masks.causal(), backend=backend)

        along = tuple(x.cos().nan_to_num_(2.0) for x in tensors)
        return torch.func.jvp(attend, tuple(tensors), along)

    before = run()
    tensors[1][:, :, 70:] = poison
    tensors[2][:, :, 70:] = 1e30
    for x, y in zip(before, run(), strict=True):
        helpers.assert_identical(y[:, :, :70], x[:, :, :70])


def test_the_value_has_the_gradient_of_a_plain_call():
    """And the tangent, which the composition differentiates, has one as well."""
    query, key, value = helpers.qkv(1, 2, 70, 8)
    along = tuple(x.detach().cos() for x in (query, key, value))

    def attend(q, k, v, backend="auto"):
        return flashmark.block_sparse_attention(q, k, v, WINDOW, backend=backend)

    def gradients(part, backend):
        outs = torch.func.jvp(lambda *x: attend(*x, backend=backend), (query, key, value), along)
        return torch.autograd.grad(outs[part].square().sum(), [query, key, value])

    plain = torch.autograd.grad(attend(query, key, value).square().sum(), [query, key, value])
    for found, wanted in zip(gradients(0, "auto"), plain, strict=True):
        helpers.assert_close(found, wanted, 1e-6)
    for found, wanted in zip(gradients(1, "auto"), gradients(1, "reference"), strict=True):
        helpers.assert_close(found, wanted, 1e-4)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
def test_autocast_takes_tangents_along(backend):
    """As if query, key and value, and their tangents, had been cast before."""
    given = tuple(x.detach() for x in helpers.qkv(1, 2, 40, 16))
    along = tuple(x.cos() for x in given)

    def attend(*some):
        return flashmark.block_sparse_attention(*some, WINDOW, backend=backend)

    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.jvp(attend, given, along)
    half = [[x.bfloat16() for x in some] for some in (given, along)]
    for x, y in zip(found, torch.func.jvp(attend, *map(tuple, half)), strict=True):
        helpers.assert_identical(x, y)
