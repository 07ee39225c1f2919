"""nystrom_attention in PyTorch: autograd, opcheck, compile, autocast, FLOPs, memory."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flashmark
from flashmark.nystrom import NystromState, nystrom_attention
from flashmark.nystrom.landmark_core import init_landmarks
from tests import helpers
from tests.nystrom.cases import BACKENDS, Case

CASES = {
    "plain": Case(70, 8),
    "grouped-decay-state": Case(70, 8, group=2, decay=0.1, state=True, batch=2),
    "packed": Case(495, 5, packed=True, given_core=True),
    "mass-padding": Case(70, 8, normalize="mass", padding=(3, 2), landmarks="batched"),
    "bidirectional": Case(40, 8, is_causal=False, kv_len=70, landmarks="pair"),
}
pytestmark = pytest.mark.filterwarnings("ignore:untied landmarks")


@pytest.fixture(params=BACKENDS)
def op(request):
    return functools.partial(nystrom_attention, backend=request.param)


def leaves_of(arguments: dict) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]


def run(op, arguments: dict) -> list[torch.Tensor]:
    """Outputs, states and gradients."""
    out, state = op(**arguments, return_state=True)
    loss = out.float().square().sum() + state.L.sum() + state.R.square().sum()
    return [out, *state, *torch.autograd.grad(loss, leaves_of(arguments))]


@pytest.mark.parametrize("op", BACKENDS[-1:], indirect=True)  # C++ where it is built
@pytest.mark.parametrize("case", CASES)
def test_opcheck(op, case):
    """Schema, fake implementation and tracing of both operators."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "flashmark":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        run(op, CASES[case].arguments())
    backend = op.keywords["backend"] if CASES[case].is_causal else "eager"
    overloads = [f"nystrom_forward.{backend}", f"nystrom_backward.{backend}"]
    assert [func.__name__ for func, *_ in calls] == overloads
    for func, args, kwargs in calls:
        args, kwargs = torch.utils._pytree.tree_map_only(
            torch.Tensor, torch.Tensor.detach, (args, kwargs)
        )
        torch.library.opcheck(func, args, kwargs)


GRADCHECK = {
    "plain": Case(20, 3, dim=3, v_dim=2),
    "grouped-decay-state": Case(9, 3, dim=3, v_dim=2, group=2, decay=0.3, state=True),
    "mass-padding": Case(9, 3, dim=3, v_dim=2, normalize="mass", padding=(2, 1), given_core=True),
    "pair-core": Case(9, 3, dim=3, v_dim=2, landmarks="pair", given_core=True),
    "bidirectional": Case(5, 3, dim=3, v_dim=2, is_causal=False, kv_len=8, state=True),
    "two-chunks": Case(66, 2, dim=2, v_dim=1, decay=0.1),
}


@pytest.mark.parametrize("case", GRADCHECK)
def test_gradcheck(case):
    arguments = GRADCHECK[case].arguments(torch.float64)
    leaves, spec = torch.utils._pytree.tree_flatten(arguments)
    places = [n for n, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.requires_grad]

    def call(*tensors):
        filled = list(leaves)
        for n, x in zip(places, tensors, strict=True):
            filled[n] = x
        given = torch.utils._pytree.tree_unflatten(filled, spec)
        out, state = nystrom_attention(**given, return_state=True, backend="eager")
        return out, *state

    inputs = [leaves[n] for n in places]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=case == "two-chunks")


@pytest.mark.parametrize("op", BACKENDS[-1:], indirect=True)  # C++ where it is built
@pytest.mark.plain_empty
@pytest.mark.parametrize("case", CASES)
def test_compiled_as_one_graph_equals_eager(op, case):
    arguments = CASES[case].arguments()

    def step(arguments):
        return op(**arguments, return_state=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted = run(op, arguments)
    found = run(lambda return_state, **given: compiled(given), arguments)
    for n, (actual, expected) in enumerate(zip(found, wanted, strict=True)):
        helpers.assert_close(actual, expected, 1e-5, f"tensor {n}")


@pytest.mark.plain_empty
def test_compiled_decoding_updates_the_state_in_place(op):
    arguments = torch.utils._pytree.tree_map_only(
        torch.Tensor, torch.Tensor.detach, Case(12, 8).arguments()
    )
    wanted = op(**arguments)
    state = NystromState.empty(1, 1, 8, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, key, value, landmarks, state):
        return op(query, key, value, landmarks, state=state, state_out=state)

    torch._dynamo.reset()
    tokens = zip(*(arguments[x].split(1, 2) for x in ("query", "key", "value")), strict=True)
    with torch.no_grad():
        rows = [step(*(x.clone() for x in qkv), arguments["landmarks"], state) for qkv in tokens]
    helpers.assert_close(torch.cat(rows, 2), wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_query_key_and_value_only(op, dtype):
    arguments = Case(70, 8, decay=0.1, state=True).arguments()
    with torch.autocast("cpu", dtype=dtype):
        out, state = op(**arguments, return_state=True)
        loss = out.float().sum() + state.R.sum()
    assert out.dtype == dtype and state.L.dtype == state.R.dtype == torch.float32
    grads = torch.autograd.grad(loss, leaves_of(arguments))
    assert all(grad.dtype == torch.float32 for grad in grads)
    halves = {x: arguments[x].detach().to(dtype) for x in ("query", "key", "value")}
    wanted, wanted_state = op(**(arguments | halves), return_state=True)
    helpers.assert_identical(out, wanted)
    helpers.assert_identical(state.R, wanted_state.R)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-hooks", "reentrant"])
def test_checkpointing(op, reentrant):
    arguments = Case(70, 8, given_core=True).arguments()
    names = ("query", "key", "value", "landmarks", "core")

    def call(query, key, value, landmarks, core):
        return op(query * 1.0, key, value, landmarks, core=core)

    leaves = [arguments[x] for x in names]
    wanted = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    checkpoint(call, *leaves, use_reentrant=reentrant).square().sum().backward()
    for leaf, grad in zip(leaves, wanted, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("case", CASES)
def test_results_repeat_bitwise(op, case):
    arguments = CASES[case].arguments()
    for first, second in zip(run(op, arguments), run(op, arguments), strict=True):
        assert torch.equal(first, second)


def test_only_what_requires_a_gradient_gets_one(op):
    arguments = Case(20, 4, state=True).arguments()
    for name in ("query", "key"):
        arguments[name] = arguments[name].detach()
    out, state = op(**arguments, return_state=True)
    out.sum().backward()
    assert arguments["query"].grad is None and arguments["value"].grad is not None
    assert arguments["state"][0].grad is not None
    with torch.no_grad():
        assert not op(**arguments).requires_grad


def test_the_state_alone_gives_gradients(op):
    arguments = Case(80, 4).arguments()
    _, state = op(**arguments, return_state=True)
    (state.R.sum() + state.L.sum()).backward()
    assert not arguments["query"].grad.any()
    assert arguments["key"].grad.any() and arguments["value"].grad.any()


def test_flops_are_those_of_the_recurrence(op):
    arguments = Case(96, 8, group=4, batch=2, kv_heads=2, dim=16, v_dim=24).arguments()
    keys, queries, M, D, Dv = 2 * 2 * 96, 2 * 8 * 96, 8, 16, 24
    with FlopCounterMode(display=False) as counter:
        out = op(**arguments | {"core": torch.eye(8).expand(2, 8, 8)})
    assert counter.get_total_flops() == 2 * M * (keys * (D + Dv) + queries * (D + M + Dv))
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    wanted = 2 * M * (keys * (3 * D + 3 * Dv) + queries * (3 * D + 3 * M + 2 * Dv))
    assert counter.get_total_flops() == wanted


def test_meta_tensors_have_shapes():
    q = torch.empty(2, 4, 30, 16, device="meta")
    k, v = (torch.empty(2, 2, 30, n, device="meta") for n in (16, 24))
    landmarks, decay = (torch.empty(2, 8, *rest, device="meta") for rest in ((16,), ()))
    out, state = nystrom_attention(
        q, k, v, landmarks, decay=decay, return_state=True, backend="eager"
    )
    assert out.shape == (2, 4, 30, 24) and out.device.type == "meta"
    assert state.L.shape == (2, 2, 8) and state.R.shape == (2, 2, 8, 24)


def largest_allocations(call) -> tuple[int, int]:
    """(largest single allocation, peak of what is held) in bytes."""
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        call()
    sizes = [e.cpu_memory_usage for e in profile.events() if e.name == "[memory]"]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return max(sizes), peak


def test_memory_is_linear(op):
    """Forward and backward: four times the tokens hold at most about four times the memory."""

    def peak(n):
        arguments = Case(n, 16, dim=16, given_core=True).arguments()
        return largest_allocations(lambda: op(**arguments).sum().backward())

    (_, before), (largest, after) = peak(4096), peak(16384)
    assert after <= 4.4 * before
    assert largest <= 16384 * 64 * 4  # nothing larger than a few of the inputs


def test_check_reports_every_tensor(op):
    report = flashmark.check(
        nystrom_attention, **Case(65, 8, decay=0.1).arguments(), backend=op.keywords["backend"]
    )
    assert report.ok
    names = [row.name for row in report.rows]
    assert names == ["out", "d query", "d key", "d value", "d landmarks", "d decay"]


def test_landmarks_train(op):
    """A few steps on landmarks alone lower a loss that only they can lower."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 64, 16, generator=generator) for _ in range(3))
    target = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    landmarks = torch.nn.Parameter(init_landmarks(2, 8, 16, generator=generator))
    optimizer = torch.optim.Adam([landmarks], lr=0.05)
    losses = []
    for _ in range(30):
        loss = (op(query, key, value, landmarks) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared landmarks", "per sample"])
def test_a_batch_of_no_samples_gives_no_rows_and_zero_gradients(backend, per_sample):
    query = torch.zeros(0, 2, 40, 16, requires_grad=True)
    shape = (0, 2, 8, 16) if per_sample else (2, 8, 16)
    landmarks = torch.ones(shape, requires_grad=True)
    out = flashmark.nystrom_attention(query, query, query, landmarks, backend=backend)
    out.sum().backward()
    assert out.shape == query.shape == query.grad.shape
    assert torch.equal(landmarks.grad, torch.zeros(shape))
