"""The operator as a citizen of PyTorch: autograd, opcheck, autocast, checkpoints, FLOPs, memory."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flashmark
from flashmark import masks
from tests import helpers
from tests.block_sparse.features import FEATURES, WINDOW, block_mask


@pytest.fixture(params=helpers.BACKENDS)
def op(request):
    return functools.partial(flashmark.block_sparse_attention, backend=request.param)


@pytest.mark.parametrize("op", helpers.BACKENDS[-1:], indirect=True)  # C++ where it is built
@pytest.mark.parametrize("feature", FEATURES)
def test_opcheck(op, feature):
    """Schema, fake implementation and tracing of every registered operator that a call reaches."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "flashmark":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    query, key, value = helpers.qkv(1, 2, 40, 8, kv_len=50)
    options = FEATURES[feature](torch.float32)
    with Recorder():
        out, lse = op(query, key, value, **options, return_lse=True)
        (out.sum() + lse.sum()).backward()
    assert len(calls) >= 2
    for func, args, kwargs in calls:
        args, kwargs = torch.utils._pytree.tree_map_only(
            torch.Tensor, torch.Tensor.detach, (args, kwargs)
        )
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("feature", FEATURES)
def test_gradcheck(feature):
    query, key, value = (
        t.detach()[..., :3].clone().requires_grad_() for t in helpers.qkv(1, 2, 40, 8, kv_len=50)
    )
    leaves = [t.detach().double().requires_grad_() for t in (query, key, value)]
    options = FEATURES[feature](torch.float64)
    extra = [name for name in ("bias", "sinks") if name in options]

    def call(query, key, value, *more):
        return flashmark.block_sparse_attention(
            query,
            key,
            value,
            **options | dict(zip(extra, more, strict=True)),
            return_lse=True,
            backend="eager",
        )

    assert torch.autograd.gradcheck(
        call, (*leaves, *(options[name] for name in extra)), fast_mode=True
    )


def test_a_block_mask_passes_through_tree_map(op):
    query, key, value = helpers.qkv(1, 2, 64, 8, grad=False)
    mask = block_mask(WINDOW, 64)
    copied = torch.utils._pytree.tree_map(torch.clone, mask)
    helpers.assert_identical(op(query, key, value, copied), op(query, key, value, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_as_scaled_dot_product_attention(op, dtype):
    query, key, value = helpers.qkv(1, 2, 40, 8)
    with torch.autocast("cpu", dtype=dtype):
        out = op(query, key.to(dtype), value, masks.causal())
        theirs = scaled_dot_product_attention(query, key.to(dtype), value, is_causal=True)
    assert out.dtype == theirs.dtype == dtype
    grads = torch.autograd.grad(out.float().sum(), (query, key, value))
    assert all(grad.dtype == torch.float32 for grad in grads)
    halves = [t.detach().to(dtype).requires_grad_() for t in (query, key, value)]
    plain = op(*halves, masks.causal())
    helpers.assert_identical(out, plain)
    for actual, wanted in zip(grads, torch.autograd.grad(plain.float().sum(), halves), strict=True):
        helpers.assert_close(actual, wanted, 0.0)


def test_autocast_does_not_reach_inside_the_operator(op):
    """Products accumulate in float32 and lse keeps its precision, whatever autocast does."""
    query, key, value = helpers.qkv(1, 2, 130, 16, grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, lse = op(query, key, value, masks.causal(), return_lse=True)
    halves = [t.bfloat16() for t in (query, key, value)]
    exact = flashmark.reference.block_sparse_attention(
        *(t.double() for t in halves), masks.causal(), return_lse=True
    )[1]
    helpers.assert_close(lse, exact, 1e-5)
    wide = [t.double() for t in (query, key, value)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flashmark.block_sparse_attention(*wide, masks.causal(), backend="eager")
    helpers.assert_close(
        out, flashmark.reference.block_sparse_attention(*wide, masks.causal()), 1e-13
    )


def test_autocast_leaves_float64_and_float32_parameters_alone(op):
    query, key, value = helpers.qkv(1, 2, 40, 8)
    sinks = helpers.randn(2, seed=7, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = op(query, key, value, sinks=sinks, return_lse=True)
        wide = flashmark.block_sparse_attention(
            query.double(), key.double(), value.double(), backend="eager"
        )
    assert (
        wide.dtype == torch.float64 and out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    )
    (grad,) = torch.autograd.grad(out.float().sum(), sinks)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-hooks", "reentrant"])
@pytest.mark.parametrize("feature", ["window", "dropout"])
def test_checkpointing(op, feature, reentrant):
    query, key, value = leaves = helpers.qkv(1, 2, 40, 8, kv_len=50)
    options = {"dropout_p": 0.4} if feature == "dropout" else {}
    mask = block_mask(WINDOW, 40, 50)

    def call(query, key, value, mask):
        return op(query * 1.0, key, value, mask, **options)

    torch.manual_seed(3)
    wanted = torch.autograd.grad(call(query, key, value, mask).square().sum(), leaves)
    torch.manual_seed(3)
    checkpoint(call, query, key, value, mask, use_reentrant=reentrant).square().sum().backward()
    for leaf, grad in zip(leaves, wanted, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("feature", FEATURES)
def test_results_repeat_bitwise(op, feature):
    query, key, value = helpers.qkv(1, 2, 40, 8, kv_len=50)
    options = FEATURES[feature](torch.float32)
    mask = options.pop("mask", None)
    tensors = {"query": query, "key": key, "value": value}
    tensors |= {name: options.pop(name) for name in ("bias", "sinks") if name in options}
    run = functools.partial(helpers.outputs_and_grads, op, tensors, mask=mask, **options)
    first, second = run(deterministic=True), run(deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        third = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        helpers.assert_identical(second[name], value, name)
        helpers.assert_identical(third[name], value, name)


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_flops_of_dense_attention_are_those_of_the_products(op):
    query, key, value = helpers.qkv(2, 4, 96, 16, kv_heads=2, kv_len=64, v_dim=24)
    pairs = 2 * 4 * 96 * 64
    assert flops(lambda: op(query, key, value)) == 2 * pairs * (16 + 24)
    out = op(query, key, value)
    assert flops(lambda: out.sum().backward()) == 2 * pairs * (3 * 16 + 2 * 24)


def test_a_counter_made_before_the_first_call_counts_it(op):
    query = torch.zeros(1, 1, 8, 16)
    counter = FlopCounterMode(display=False)
    for name in ("block_sparse_forward", "block_sparse_backward"):  # as if none had been made yet
        counter.flop_registry.pop(getattr(torch.ops.flashmark, name), None)
    with counter:
        op(query, query, query)
    assert counter.get_total_flops() == 2 * 64 * 32


def test_flops_follow_the_mask(op):
    query, key, value = helpers.qkv(1, 2, 512, 16, grad=False)
    whole = flops(lambda: op(query, key, value))
    causal = flops(lambda: op(query, key, value, masks.causal()))
    assert 0.5 <= causal / whole <= 0.7
    mask = block_mask(masks.causal() & masks.sliding_window(64), 512)
    window = flops(lambda: op(query, key, value, mask))
    assert mask.density <= window / whole <= 2 * mask.density


def test_meta_tensors_have_shapes_and_flops():
    query = torch.empty(1, 2, 64, 16, device="meta")
    out = flashmark.block_sparse_attention(query, query, query, masks.causal(), backend="eager")
    assert out.shape == query.shape and out.device.type == "meta"
    assert (
        flops(lambda: flashmark.block_sparse_attention(query, query, query, backend="eager"))
        == 4 * 2 * 64 * 64 * 16
    )


def test_meta_tensors_with_a_mask_of_positions():
    query = torch.empty(1, 2, 70, 16, device="meta", requires_grad=True)
    mask = masks.causal() & masks.sliding_window(9)
    out = flashmark.block_sparse_attention(query, query, query, mask)
    out.sum().backward()
    assert out.shape == query.grad.shape and query.grad.device.type == "meta"
    ids = torch.zeros(70, dtype=torch.long)
    for other in (masks.documents(ids), masks.mask_mod(lambda b, h, i, j: i >= j)):
        with pytest.raises(NotImplementedError, match="mask: expected an expression of positions "):
            flashmark.block_sparse_attention(query, query, query, other)


@pytest.mark.parametrize("name", ["causal", "window", "relative-bias"])
def test_no_allocation_is_quadratic(op, name):
    n = 2048
    query, key, value = helpers.qkv(1, 1, n, 16)
    options = (
        {"bias": helpers.randn(1, 2 * n - 1, seed=7, grad=True)} if name == "relative-bias" else {}
    )
    mask = masks.causal() & masks.sliding_window(256) if name == "window" else masks.causal()
    op(query, key, value, mask, **options)  # compiles the mask
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        op(query, key, value, mask, **options).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name == "[memory]")
    assert largest <= n * n * 4 // 8, f"{largest} bytes at once"


def test_tiles_that_nobody_sees_are_not_read(op):
    query, key, value = helpers.qkv(1, 2, 128, 16, kv_len=256)
    tiles = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    tiles[:, [2, 5, 6]] = False
    mask = block_mask(masks.blocks(tiles, 32), 128, 256)
    out = op(query, key, value, mask)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    unseen = ~tiles.any(0).repeat_interleave(32)
    poisoned = [query, *(t.detach().clone() for t in (key, value))]
    for tensor in poisoned[1:]:
        tensor[:, :, unseen] = float("nan")
        tensor.requires_grad_()
    again = op(*poisoned, mask)
    helpers.assert_identical(again, out)
    for actual, wanted in zip(torch.autograd.grad(again.sum(), poisoned), grads, strict=True):
        helpers.assert_identical(actual, wanted)


def test_only_what_needs_a_gradient_gets_one(op):
    query, key, value = helpers.qkv(1, 2, 30, 8, grad=False)
    sinks = helpers.randn(2, seed=5, grad=True)
    out, lse = op(query, key, value, masks.causal(), sinks=sinks, return_lse=True)
    assert out.requires_grad and lse.requires_grad
    (out.sum() + lse.sum()).backward()
    assert sinks.grad is not None and query.grad is None
    assert not op(query, key, value).requires_grad


def test_no_grad_and_inference_mode_change_nothing(op):
    query, key, value = helpers.qkv(1, 2, 30, 8)
    out = op(query, key, value, WINDOW)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = op(query, key, value, WINDOW)
        assert not again.requires_grad and torch.equal(again, out)


def test_inputs_changed_between_forward_and_backward_are_noticed(op):
    query, key, value = helpers.qkv(1, 1, 10, 4)
    out = op(query * 1.0, changed := key * 1.0, value)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inputs_are_left_as_they_were(op):
    query, key, value = helpers.qkv(1, 2, 40, 8)
    before = [t.detach().clone() for t in (query, key, value)]
    op(query, key, value, WINDOW).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((query, key, value), before, strict=True))


@pytest.mark.parametrize(
    "kind", ["stride-2", "expanded-batch", "expanded-heads", "last-dim-expanded", "sliced"]
)
def test_unusual_strides(op, kind):
    make = {
        "stride-2": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "expanded-batch": lambda t: t[:1].expand(2, -1, -1, -1),
        "expanded-heads": lambda t: t[:, :1].expand(-1, 2, -1, -1),
        "last-dim-expanded": lambda t: t[..., :1].expand(-1, -1, -1, 8),
        "sliced": lambda t: torch.cat([t, t], 2)[:, :, 7:47],
    }[kind]
    stored = helpers.qkv(2, 2, 40, 8)
    query, key, value = views = [make(t) for t in stored]
    copies = [
        t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in views
    ]
    out, wanted = op(query, key, value, WINDOW), op(*copies, WINDOW)
    helpers.assert_close(out, wanted, 1e-6)
    d_out = helpers.randn(*out.shape, seed=4)
    grads = torch.autograd.grad(out, views, d_out)
    for actual, expected in zip(grads, torch.autograd.grad(wanted, copies, d_out), strict=True):
        helpers.assert_close(actual, expected, 1e-5)


def test_an_expanded_output_gradient(op):
    query, key, value = helpers.qkv(1, 2, 40, 8)
    out = op(query, key, value, WINDOW)
    grads = torch.autograd.grad(
        out.sum(), (query, key, value), retain_graph=True
    )  # stride 0 everywhere
    for a, b in zip(
        grads, torch.autograd.grad(out, (query, key, value), torch.ones_like(out)), strict=True
    ):
        helpers.assert_identical(a, b)


def test_auto_runs_on_this_machine():
    query, key, value = helpers.qkv(1, 2, 40, 8, grad=False)
    out = flashmark.block_sparse_attention(query, key, value, WINDOW)
    helpers.assert_close(
        out, flashmark.block_sparse_attention(query, key, value, WINDOW, backend="reference"), 1e-5
    )
