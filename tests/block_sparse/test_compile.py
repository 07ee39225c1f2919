"""torch.compile of block_sparse_attention: one graph, the same numbers, and never a stale mask."""

from __future__ import annotations

import functools

import pytest
import torch

import flashmark
from flashmark import masks
from tests import helpers
from tests.block_sparse.features import FEATURES, WINDOW, block_mask

pytestmark = pytest.mark.plain_empty  # Dynamo would trace the filling


@pytest.fixture(params=helpers.BACKENDS)
def op(request):
    torch._dynamo.reset()
    return functools.partial(flashmark.block_sparse_attention, backend=request.param)


def check_compiled(call, *args, **options):
    """`call` compiled to one graph gives the outputs and gradients of `call`."""
    leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", **options)

    def run(call):
        out = call(*args)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for actual, wanted in zip(run(compiled), run(call), strict=True):
        helpers.assert_close(actual, wanted, 1e-6)


@pytest.mark.parametrize("op", helpers.BACKENDS[-1:], indirect=True)  # C++ where it is built
@pytest.mark.parametrize("feature", FEATURES)
def test_compile_without_graph_breaks(op, feature):
    query, key, value = helpers.qkv(1, 2, 40, 8, kv_len=50)
    options = FEATURES[feature](torch.float32)
    mask = options.pop("mask", None)
    if isinstance(mask, masks.Mask):
        mask = block_mask(mask, 40, 50)
    leaves = [
        t for t in (query, key, value, options.get("bias"), options.get("sinks")) if t is not None
    ]

    def call(query, key, value, mask, options):
        out, lse = op(query * 1.5, key, value, mask, **options, return_lse=True)
        return out.square(), lse.tanh()

    def run(call):
        out, lse = call(query, key, value, mask, options)
        return out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)

    expected = run(call)
    for actual, wanted in zip(
        run(torch.compile(call, fullgraph=True, backend="aot_eager")), expected, strict=True
    ):
        helpers.assert_close(actual, wanted, 1e-6)


@pytest.mark.parametrize("op", helpers.BACKENDS[-1:], indirect=True)  # C++ where it is built
def test_compile_with_inductor(op):
    query, key, value = helpers.qkv(1, 2, 40, 8)
    mask = block_mask(WINDOW, 40)

    def call(query, key, value, mask):
        return op(query * 2, key, value, mask).square()

    out = torch.compile(call, fullgraph=True)(query, key, value, mask)
    expected = call(query, key, value, mask)
    helpers.assert_close(out, expected, 1e-5)
    leaves = (query, key, value)
    for a, b in zip(
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        helpers.assert_close(a, b, 1e-5)


def test_a_new_mask_of_the_same_shape_does_not_recompile(op):
    compiles = []

    def backend(graph, inputs):
        compiles.append(1)
        return graph.forward

    compiled = torch.compile(lambda q, k, v, m: op(q, k, v, m), fullgraph=True, backend=backend)
    query, key, value = helpers.qkv(1, 2, 64, 8, grad=False)
    for shift in (0, 32):
        visible = torch.ones(64, 64, dtype=torch.bool).tril().roll(shift, 0)
        mask = block_mask(masks.dense(visible), 64)
        helpers.assert_close(compiled(query, key, value, mask), op(query, key, value, mask), 1e-6)
    assert len(compiles) == 1


EXPRESSIONS = {
    "causal": masks.causal,
    "window": lambda: masks.causal() & masks.sliding_window(9),
    "not": lambda: ~masks.dilated(3) | masks.diagonal(),
}


@pytest.mark.parametrize("op", helpers.BACKENDS[-1:], indirect=True)  # C++ where it is built
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_may_come_from_outside(op, name):
    mask = EXPRESSIONS[name]()
    check_compiled(lambda q, k, v: op(q, k, v, mask), *helpers.qkv(1, 2, 40, 8))
    check_compiled(op, *helpers.qkv(1, 2, 40, 8), mask)


def test_plain_causal_may_be_written_inside(op):
    check_compiled(lambda q, k, v: op(q, k, v, masks.causal()), *helpers.qkv(1, 2, 40, 8))


def test_another_expression_is_another_mask(op):
    query, key, value = helpers.qkv(1, 2, 40, 8, grad=False)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for mask in (
        masks.sliding_window(3),
        masks.sliding_window(5),
        masks.causal() & masks.sliding_window(5),
    ):
        helpers.assert_close(compiled(query, key, value, mask), op(query, key, value, mask), 1e-6)


def test_an_expression_whose_tensor_changed_is_never_stale(op):
    """The right result or a refusal; never the mask of the time of compilation."""
    query, key, value = helpers.qkv(1, 2, 40, 8, grad=False)
    ids = torch.zeros(40, dtype=torch.long)
    mask = masks.causal() & masks.documents(ids)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")

    def attempt():
        try:
            return compiled(query, key, value, mask)
        except (TypeError, ValueError, RuntimeError):
            return None

    for _ in range(2):
        actual = attempt()
        if actual is not None:
            helpers.assert_close(actual, op(query, key, value, mask), 1e-6)
        ids[20:] = 1


def test_dynamic_shapes(op):
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (40, 57, 64):
        tensors = helpers.qkv(1, 2, n, 8, grad=False)
        for mask in (None, block_mask(WINDOW, n)):
            helpers.assert_close(compiled(*tensors, mask), op(*tensors, mask), 1e-6)


def test_key_and_value_may_be_one_tensor(op):
    query, key, _ = helpers.qkv(1, 2, 40, 8)
    check_compiled(lambda q, k: op(q, k, k), query, key)


def test_dropout_without_a_seed(op):
    compiled = torch.compile(
        lambda q, k, v: op(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    query, key, value = helpers.qkv(1, 2, 40, 8, grad=False)
    assert not torch.equal(compiled(query, key, value), compiled(query, key, value))
