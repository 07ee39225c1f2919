"""Promises of routed attention, on every backend that runs here."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashmark
from tests import helpers
from tests.routed.cases import CASES, integers


@pytest.fixture(params=helpers.BACKENDS)
def op(request):
    return functools.partial(flashmark.routed_attention, backend=request.param, block_size=16)


def inputs(n=150, *, dtype=torch.float32, grad=False, **shape):
    query, key, value = helpers.qkv(2, 4, n, 16, kv_heads=2, dtype=dtype, grad=grad, **shape)
    return query, key, value, helpers.randn(2, 3, 16, dtype=dtype, seed=7)


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_chosen_blocks_agree_with_the_definition(backend, name):
    case = CASES[name]
    results = []
    for where, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        tensors = {
            x: t.to(dtype).requires_grad_() for x, t in case.tensors().items()
        }  # fmt: skip
        call = functools.partial(
            flashmark.block_topk_attention, indices=case.indices(), backend=where,
            **case.arguments(),
        )  # fmt: skip
        results.append(helpers.outputs_and_grads(call, tensors) if where == backend else None)
        if where == "reference":
            out, lse = call(**tensors, return_lse=True)
            results[-1] = {"out": out.detach(), "lse": lse.detach()}
    for key, expected in results[1].items():
        helpers.assert_close(results[0][key], expected, 1e-5, key)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 150])
@pytest.mark.parametrize("top_k", [10, 1000])
def test_as_many_choices_as_blocks_are_exact_causal_attention(op, n, top_k):
    query, key, value, marks = inputs(n)
    out = op(query, key, value, marks, top_k=top_k)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (query, key, value)), is_causal=True, enable_gqa=True
    )
    helpers.assert_close(out, exact, 1e-5)


@pytest.mark.parametrize("marks", [True, False], ids=["landmarks", "means"])
@pytest.mark.parametrize("last", [0, 15, 16, 70])
def test_outputs_ignore_the_future_bitwise(op, last, marks):
    query, key, value, landmarks = inputs()
    op = functools.partial(op, landmarks=landmarks if marks else None, top_k=2)
    out, later = op(query, key, value), slice(last + 1, None)
    for poison in (float("nan"), float("inf"), -1e4):
        changed = [t.clone() for t in (query, key, value)]
        changed[0][:, :, later] = changed[1][:, :, later] = poison
        changed[2][:, :, later] = 1e30
        new = op(*changed)
        helpers.assert_identical(new[:, :, : last + 1], out[:, :, : last + 1], f"with {poison}")


@pytest.mark.parametrize("last", [60, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_the_past_ignore_the_future_bitwise(op, dtype, last):
    """Gradients of a loss of the past, whichever blocks later queries choose."""
    n, past = 257, slice(0, last)
    d_out = helpers.randn(1, 4, last, 16, dtype=dtype, seed=9)

    def grads(seed):
        first = helpers.qkv(1, 4, n, 16, kv_heads=2, dtype=dtype)
        later = helpers.qkv(1, 4, n, 16, kv_heads=2, dtype=dtype, seed=seed)
        leaves = [
            torch.cat([x[:, :, past], y[:, :, last:]], 2).detach().requires_grad_()
            for x, y in zip(first, later, strict=True)
        ]
        out = op(*leaves, block_size=16, top_k=2)[:, :, past]
        return [x[:, :, past] for x in torch.autograd.grad(out, leaves, d_out)]

    wanted = grads(0)
    for seed in (1, 2, 3):
        for found, expected in zip(grads(seed), wanted, strict=True):
            helpers.assert_identical(found, expected)


@pytest.mark.parametrize("at", [1, 15, 16, 17, 64, 149])
def test_split_anywhere_gives_the_whole(op, at):
    query, key, value, marks = inputs()
    op = functools.partial(op, landmarks=marks, top_k=2)
    whole, state = op(query, key, value, return_state=True)
    left, before = op(*(x[:, :, :at] for x in (query, key, value)), return_state=True)
    right, after = op(query[:, :, at:], key, value, state=before, return_state=True)
    helpers.assert_close(torch.cat([left, right], 2), whole, 1e-6)
    for a, b in zip(after, state, strict=True):
        helpers.assert_close(a, b, 1e-6)


def test_step_whose_state_holds_all_finished_blocks_returns_it(op):
    query, key, value, marks = inputs(n=150)
    _, state = op(query, key, value, marks, return_state=True)
    assert state.keys.shape[2] == 9
    whole = op(query, key, value, marks, top_k=3)
    step, same = op(
        query[:, :, -1:], key, value, marks, top_k=3, state=state, return_state=True
    )  # fmt: skip
    helpers.assert_close(step, whole[:, :, -1:], 1e-6)
    for a, b in zip(same, state, strict=True):
        helpers.assert_identical(a, b)


def test_gradients_are_those_of_the_attention_over_the_choice(op):
    query, key, value, marks = inputs(grad=True)
    out, routing = op(query, key, value, marks, top_k=2, return_routing=True)
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = flashmark.block_topk_attention(
        *leaves, routing.indices, block_size=16, near=1, backend="reference"
    )
    dout = helpers.randn(*out.shape, seed=5)
    grads = torch.autograd.grad(out, (query, key, value), dout)
    for name, a, b in zip(
        "qkv", grads, torch.autograd.grad(expected, leaves, dout.double()), strict=True
    ):
        helpers.assert_close(a, b, 5e-5, f"d {name}")


def test_packed_sequences_are_sequences_of_their_own(op):
    query, key, value = helpers.qkv(1, 4, 150, 16, kv_heads=2, grad=False)
    marks, bounds = helpers.randn(2, 3, 16, seed=7), integers(0, 40, 40, 93, 150)
    op = functools.partial(op, landmarks=marks, top_k=2)
    packed = op(query, key, value, cu_seqlens=bounds)
    for a, b in ((0, 40), (40, 93), (93, 150)):
        alone = op(*(x[:, :, a:b] for x in (query, key, value)))
        helpers.assert_close(packed[:, :, a:b], alone, 1e-6)


@pytest.mark.parametrize("backend", helpers.BACKENDS[-1:])  # C++ where it is built
@pytest.mark.parametrize("name", ["plain", "packed", "all-features", "decode"])
def test_opcheck(backend, name):
    """Schema, fake implementation and tracing of every registered operator that a call reaches."""
    case, calls = CASES[name], []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "flashmark":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    tensors = {x: t.clone().requires_grad_() for x, t in case.tensors().items()}
    with Recorder():
        out, lse = flashmark.block_topk_attention(
            **tensors, indices=case.indices(), **case.arguments(), return_lse=True, backend=backend
        )
        (out.sum() + lse.masked_fill(lse.isinf(), 0.0).sum()).backward()
    assert len(calls) >= 2
    for func, args, kwargs in calls:
        args, kwargs = torch.utils._pytree.tree_map_only(
            torch.Tensor, torch.Tensor.detach, (args, kwargs)
        )
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("name", ["query", "key", "value", "landmarks", "scores"])
def test_any_stride_of_the_last_dimension(op, name):
    query, key, value, landmarks = inputs(100)
    scores = helpers.randn(2, 2, 100, 7, seed=8)
    tensors = {"query": query, "key": key, "value": value}
    tensors |= {"scores": scores} if name == "scores" else {"landmarks": landmarks}
    wanted = op(**tensors, top_k=2)
    x = tensors[name].detach()
    spread = helpers.randn(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    assert torch.equal(op(**tensors | {name: spread}, top_k=2), wanted)


@pytest.mark.parametrize("backend", [*helpers.BACKENDS, "reference"])
def test_packed_sequences_without_a_token(backend):
    query, key, value, landmarks = inputs(0, grad=True)
    query, key, value = (x[:1].detach().requires_grad_() for x in (query, key, value))
    call = {"cu_seqlens": integers(0, 0, 0), "backend": backend}
    out = flashmark.routed_attention(query, key, value, landmarks, top_k=2, **call)
    assert out.shape == query.shape
    assert [x.shape for x in torch.autograd.grad(out.sum(), (query, key, value))] == [
        x.shape for x in (query, key, value)
    ]
    assert flashmark.block_scores(query, key, landmarks, **call).shape == (1, 2, 0, 0)


@pytest.mark.parametrize("backend", [*helpers.BACKENDS, "reference"])
def test_scores_where_there_is_no_block(backend):
    query, key, _, landmarks = inputs(0)
    scores = flashmark.block_scores(query, key, landmarks, backend=backend)
    assert scores.shape == (2, 2, 0, 0)
    scores = flashmark.block_scores(query.new_ones(2, 4, 3, 16), key, landmarks, backend=backend)
    assert scores.shape == (2, 2, 3, 0)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_shapes_on_the_meta_device(backend, packed):
    query, key, value = (x[:1].detach().to("meta") for x in inputs(40)[:3])
    landmarks = torch.empty(2, 3, 16, device="meta")
    lengths = torch.empty(3, dtype=torch.int32, device="meta") if packed else None
    call = {"block_size": 16, "cu_seqlens": lengths, "backend": backend}
    out = flashmark.routed_attention(query, key, value, landmarks, top_k=2, **call)
    assert out.shape == query.shape and out.device.type == "meta"
    assert flashmark.block_scores(query, key, landmarks, **call).shape == (1, 2, 40, 3)
