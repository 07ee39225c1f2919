"""Routed attention in PyTorch: opcheck, compile, autocast, checkpoints, FLOPs, memory."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flashmark
from flashmark import BackendUnavailable
from tests import helpers
from tests.routed.test_eager import SIZE, call, cu, inputs, landmarks

NAMES = ["plain", "mean", "sinks", "packed", "offsets and lengths", "padding", "softcap"]


@pytest.fixture(params=helpers.BACKENDS)
def op(request):
    return functools.partial(flashmark.routed_attention, block_size=SIZE, backend=request.param)


def run(op, tensors: dict, options: dict) -> list[torch.Tensor]:
    out = op(**tensors, **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), list(tensors.values()))]


@pytest.mark.parametrize("op", helpers.BACKENDS[-1:], indirect=True)  # C++ where it is built
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(op, name):
    """Schema, fake implementation and tracing of the three operators."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "flashmark":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        run(op, *call(name, torch.float32))
    backend = op.keywords["backend"]
    parts = "choose_blocks", "block_topk_forward", "block_topk_backward"
    assert [func.__name__ for func, *_ in calls] == [f"{part}.{backend}" for part in parts]
    for func, args, kwargs in calls:
        args, kwargs = torch.utils._pytree.tree_map_only(
            torch.Tensor, torch.Tensor.detach, (args, kwargs)
        )
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("op", helpers.BACKENDS[-1:], indirect=True)  # C++ where it is built
@pytest.mark.plain_empty
@pytest.mark.parametrize("name", NAMES)
def test_compiled_as_one_graph_equals_eager(op, name):
    torch._dynamo.reset()
    tensors, options = call(name, torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for n, (actual, expected) in enumerate(
        zip(run(compiled, tensors, options), run(op, tensors, options), strict=True)
    ):
        helpers.assert_close(actual, expected, 1e-5, f"tensor {n}")


@pytest.mark.plain_empty
def test_routing_and_state_compile(op):
    torch._dynamo.reset()
    tensors, options = call("plain", torch.float32)
    options |= {"return_routing": True, "return_state": True}
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(**tensors, **options), op(**tensors, **options)
    assert torch.equal(found[2].indices, wanted[2].indices)
    leaves = (torch.utils._pytree.tree_leaves(x) for x in (found, wanted))
    for actual, expected in zip(*leaves, strict=True):
        helpers.assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(op, dtype):
    tensors, options = call("plain", torch.float32)
    low = {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
    options["landmarks"] = landmarks()
    with torch.autocast("cpu", dtype):
        found = run(op, tensors, options)
    assert found[0].dtype == dtype and all(x.dtype == torch.float32 for x in found[1:])
    for actual, expected in zip(found, run(op, low, options), strict=True):
        helpers.assert_close(actual, expected, 1e-2)


def test_a_checkpoint_changes_nothing(op):
    tensors, options = call("plain", torch.float32)

    def checkpointed(**given):
        return checkpoint(op, use_reentrant=False, **given)

    for actual, expected in zip(
        run(checkpointed, tensors, options), run(op, tensors, options), strict=True
    ):
        helpers.assert_identical(actual, expected)


def test_flops_are_those_of_the_blocks_that_are_read(op):
    batch, heads, tokens, dim, v_dim, size, top_k = 2, 4, 256, 8, 6, 16, 2
    tensors = inputs(batch, heads, q_len=tokens, kv_len=tokens)
    indices = torch.full((batch, 2, tokens, top_k), -1, dtype=torch.int32)
    pairs = batch * heads * tokens * ((top_k + 1) * size + size // 2)
    with FlopCounterMode(display=False) as counter:
        out = flashmark.block_topk_attention(
            **tensors, indices=indices, near=1, **op.keywords | {"block_size": size}
        )
    assert counter.get_total_flops() == 2 * pairs * (dim + v_dim)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * dim + 2 * v_dim)


def test_a_named_backend_that_cannot_run_says_so():
    tensors, options = call("plain", torch.float32)
    with pytest.raises(BackendUnavailable, match="triton"):
        flashmark.routed_attention(**tensors, **options, block_size=SIZE, backend="triton")


def test_meta_tensors_have_shapes():
    tensors = {name: x.detach().to("meta") for name, x in inputs().items()}
    out, lse = flashmark.block_topk_attention(
        **tensors, indices=torch.empty(2, 2, 37, 3, dtype=torch.int32, device="meta"),
        block_size=SIZE, return_lse=True, backend="eager",
    )  # fmt: skip
    assert out.shape == (2, 4, 37, 6) and lse.shape == (2, 4, 37)
    assert lse.dtype == torch.float32


def test_only_the_choice_depends_on_landmarks(op):
    tensors, options = call("plain", torch.float32)
    marks = landmarks(grad=True)
    out = op(**tensors, **options | {"landmarks": marks})
    (grad,) = torch.autograd.grad(out.sum(), marks, allow_unused=True)
    assert grad is None


def test_a_packed_call_reads_no_length_from_the_device(op):
    """Bounds are tensors: one graph serves all lengths of the sequences."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    tensors = {name: x.detach() for name, x in inputs(batch=1, q_len=40, kv_len=40).items()}
    for bounds in (cu(0, 7, 29, 40), cu(0, 20, 21, 40)):
        found = compiled(**tensors, top_k=2, cu_seqlens=bounds)
        helpers.assert_close(found, op(**tensors, top_k=2, cu_seqlens=bounds), 1e-5)
    assert counter.frame_count == 1
