"""hybrid_attention in PyTorch: autograd, opcheck, compile, autocast, memory; its mask."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flashmark
from flashmark import BackendUnavailable, hybrid_attention, masks
from flashmark.masks.positions import LocalChunks
from tests import helpers
from tests.hybrid.cases import BACKENDS, MERGES, Case, detached


@pytest.fixture(params=BACKENDS)
def op(request):
    return functools.partial(hybrid_attention, backend=request.param)


def leaves_of(arguments: dict) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]


def run(op, arguments: dict) -> list[torch.Tensor]:
    out = op(**arguments)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves_of(arguments))]


@pytest.mark.parametrize("merge", ["slots", "mass"])
def test_opcheck(merge):
    """Schema, fake implementation and tracing of the far field's operators."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "flashmark" and func.__name__.startswith("hybrid"):
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        run(hybrid_attention, Case(40, 8, 5, merge, group=2, padding=(3, 2)).arguments())
    both = {"sums"} if merge == "slots" else {"scan", "mass"}
    names = {f"hybrid_{name}_{way}" for name in both for way in ("forward", "backward")}
    names |= {"hybrid_running_sums"} if merge == "slots" else set()
    assert {func.__name__.removesuffix(".default") for func, *_ in calls} == names
    for func, args, kwargs in calls:
        args, kwargs = torch.utils._pytree.tree_map_only(
            torch.Tensor, torch.Tensor.detach, (args, kwargs)
        )
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("merge", MERGES)
def test_gradcheck(merge):
    arguments = Case(9, 2, 3, merge, dim=3, v_dim=2, padding=(1, 1)).arguments(torch.float64)
    names = [name for name, x in arguments.items() if torch.is_tensor(x) and x.requires_grad]

    def call(*tensors):
        given = dict(zip(names, tensors, strict=True))
        out, state = hybrid_attention(**(arguments | given), return_state=True, backend="eager")
        far = [x.masked_fill(x == -torch.inf, 0.0) for x in state.far]
        return out, state.key[:, :, :3], state.value[:, :, :3], *far

    inputs = [arguments[name] for name in names]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.plain_empty
@pytest.mark.parametrize("merge", ["slots", "mass"])
def test_compiled_as_one_graph_equals_eager(merge):
    op = hybrid_attention
    arguments = Case(60, 16, 5, merge, group=2, padding=(3, 0)).arguments()

    def step(arguments):
        return op(**arguments)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = run(op, arguments)
    found = run(lambda **given: compiled(given), arguments)
    for n, (actual, expected) in enumerate(zip(found, wanted, strict=True)):
        helpers.assert_close(actual, expected, 1e-5, f"tensor {n}")


@pytest.mark.plain_empty
def test_compiled_decoding():
    op = hybrid_attention
    arguments = detached(Case(12, 3, 5).arguments())
    wanted = op(**arguments)

    def step(query, key, value, landmarks, state):
        tensors = (query, key, value, landmarks)
        return op(*tensors, window=3, state=state, return_state=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    state, outs = Case(12, 3, 5).empty_state(), []
    for t in range(12):
        tokens = (arguments[x][:, :, t : t + 1] for x in ("query", "key", "value"))
        out, state = compiled(*tokens, arguments["landmarks"], state)
        outs.append(out)
    helpers.assert_close(torch.cat(outs, 2), wanted, 1e-6)


@pytest.mark.parametrize("merge", MERGES)
def test_autocast_runs_in_its_dtype(op, merge):
    arguments = Case(40, 8, 5, merge).arguments()
    with torch.autocast("cpu", torch.bfloat16):
        out = op(**arguments)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert arguments["query"].grad.dtype == arguments["landmarks"].grad.dtype == torch.float32
    helpers.assert_close(out, op(**arguments), 3e-2)


@pytest.mark.parametrize("merge", MERGES)
def test_checkpointing_gives_the_same_gradients(op, merge):
    arguments = Case(40, 8, 5, merge).arguments()
    for actual, expected in zip(
        run(lambda **given: checkpoint(op, **given, use_reentrant=False), arguments),
        run(op, arguments),
        strict=True,
    ):
        helpers.assert_identical(actual, expected)


@pytest.mark.parametrize("merge", MERGES)
def test_gradients_repeat_to_the_bit(op, merge):
    one, two = (run(op, Case(60, 8, 5, merge, group=2).arguments()) for _ in range(2))
    for actual, expected in zip(one, two, strict=True):
        helpers.assert_identical(actual, expected)


@pytest.mark.parametrize("merge", MERGES)
def test_what_autograd_keeps_is_linear_in_the_length(merge):
    """No weights of queries or keys under the landmarks: inputs, outputs and totals of chunks."""

    def kept(n):
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        arguments = Case(n, 32, 64, merge, dim=8, v_dim=8).arguments()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            op_out = hybrid_attention(**arguments, backend="eager")
        assert op_out.requires_grad
        return sum(sizes.values())

    short, long = kept(512), kept(1024)
    assert long < 2.3 * short
    tokens, weights = 512 * 4, 512 * 4 * 64
    assert long - short < weights + 60 * tokens


def test_flops_of_the_far_field():
    """Routing and sums: 3 products of every token with every landmark, 7 more on the way back."""
    arguments = Case(64, 8, 5, dim=4, v_dim=4).arguments()
    with FlopCounterMode(display=False) as counter:
        hybrid_attention(**arguments).sum().backward()
    counts = {str(k).split(".")[-1]: n for k, n in counter.get_flop_counts()["Global"].items()}
    read = 64 - 16  # tokens that a later chunk reads
    assert counts["hybrid_sums_forward"] == 2 * read * 5 * 3 * 4
    assert counts["hybrid_sums_backward"] == 2 * read * 5 * 7 * 4


def test_a_named_backend_runs_or_says_why():
    arguments = Case(40, 8, 5).arguments(torch.float64)
    with pytest.raises(BackendUnavailable, match="^backend: expected one that can run here"):
        hybrid_attention(**arguments, backend="cpu")
    out = hybrid_attention(**arguments, backend="reference")
    helpers.assert_close(hybrid_attention(**arguments), out, 1e-12)


@pytest.mark.parametrize("window", [1, 5, 16, 33])
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (70, 70), (20, 61)])
def test_the_mask_of_local_chunks(window, q_len, kv_len):
    p = torch.arange(q_len)[:, None] + kv_len - q_len
    j = torch.arange(kv_len)
    wanted = (j <= p) & (p // window - j // window <= 1)
    mask = masks.local_chunks(window)
    assert torch.equal(mask.to_dense(1, 1, q_len, kv_len)[0, 0], wanted)
    compiled = flashmark.compile_mask(mask, 1, 1, q_len, kv_len, device="cpu", block_size=16)
    assert torch.equal(compiled.to_dense()[0, 0], wanted)
    assert repr(mask) == f"local_chunks({window})"


@pytest.mark.parametrize(
    "window, slots, first, lead", [(8, 3, 2, 32), (5, 17, 1, 221), (20, 16, 2, 48)]
)
def test_the_mask_of_chunks_and_their_slots(window, slots, first, lead):
    n = lead // slots * window // 2 + 3
    p, j = torch.arange(n)[:, None], torch.arange(lead + n) - lead
    near = (j <= p) & (p // window - j // window <= 1)
    wanted = torch.where(j < 0, (j + lead) // slots + first == p // window, near)
    mask = LocalChunks(window, slots, first, lead)
    compiled = flashmark.compile_mask(mask, 1, 1, n, lead + n, device="cpu", block_size=16)
    assert torch.equal(compiled.to_dense()[0, 0], wanted)


def test_few_distinct_tiles_at_any_length():
    """Positions inside a chunk decide: the mask of half a million tokens is small."""
    mask = LocalChunks(512, 64, 2, (1024 - 2) * 64)
    compiled = flashmark.compile_mask(mask, 1, 1, 1 << 19, mask.lead + (1 << 19), device="cpu")
    assert compiled.tile_bits.shape[0] <= 4
    assert compiled.nbytes < 1 << 20


@pytest.mark.parametrize("window, error", [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_windows_that_are_none(window, error):
    with pytest.raises(error, match="^window: expected an int >= 1, got "):
        masks.local_chunks(window)
