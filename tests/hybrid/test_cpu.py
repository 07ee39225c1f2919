"""The C++ kernels of hybrid attention: whole calls without gradients, and decoding in place."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashmark
from flashmark import HybridState, cpu, hybrid_attention, init_landmarks, reference
from tests import helpers
from tests.hybrid.cases import LENGTHS, MERGES, PACKED, Case, detached, tokens

pytestmark = pytest.mark.skipif(bool(cpu.why_not()), reason=cpu.why_not() or "built")
op = functools.partial(hybrid_attention, backend="cpu")


class Operators(TorchDispatchMode):
    """Names of our operators that run."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flashmark":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [str(func).removeprefix("flashmark.") for func, *_ in self.calls]


def wide(arguments: dict) -> dict:
    """Arguments of a call in float64."""

    def cast(x):
        return x.double() if x.is_floating_point() else x

    return torch.utils._pytree.tree_map_only(torch.Tensor, cast, arguments)


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    batch, kv_heads, n = draw.choice([1, 1, 2]), draw.choice([1, 2, 3]), draw.randint(1, 400)
    return Case(
        n, draw.choice([1, 2, 5, 16, 33, 64, 130, 500]), draw.choice([1, 3, 16, 70, 130]),
        draw.choice(MERGES), draw.choice([1, 2, 5]), batch, kv_heads,
        draw.choice([7, 16, 40, 64]), draw.choice([1, 9, 16, 80]),
        draw.choice(["tied", "batched"]),
        padding=draw.choice([None, (draw.randint(0, n), draw.randint(0, n))]),
        layout=draw.choice(["contiguous", "bnhd", "gaps"]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_random_problems_against_float64(seed):
    case = random_case(seed)
    arguments = detached(case.arguments())
    core = {}
    if case.merge != "slots":
        marks, kind = arguments["landmarks"], "softmax" if case.merge == "gate" else "kernel"
        scale = case.dim**-0.5
        core = {"core": flashmark.landmark_core(marks, scale=scale, kind=kind)}
    with Operators() as seen:
        out = op(**arguments, **core)
    assert seen.names[-1] == "hybrid_forward.cpu"
    helpers.assert_close(out, hybrid_attention(**wide(arguments | core)), 2e-5, str(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("window", [4, 64])
def test_half_precision(merge, window, dtype):
    arguments = detached(Case(200, window, 8, merge, group=2, kv_heads=2).arguments(dtype))
    wanted = reference.hybrid_attention(**wide(arguments))
    error = (op(**arguments).double() - wanted).abs().max()
    plain = (wanted.to(dtype).double() - wanted).abs().max()
    assert error < 2 * plain + 1e-3


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("window", [3, 20])
@pytest.mark.parametrize("in_place", [False, True], ids=["new-state", "in-place"])
def test_a_split_at_every_position(merge, window, in_place):
    """Rows one by one, and tiles of rows, on either side of the cut."""
    case = Case(70, window, 5, merge, group=2, v_dim=9, padding=(2, 30))
    arguments = detached(case.arguments())
    whole = op(**arguments)
    wanted = op(**arguments, return_state=True)[1]
    for cut in range(71):
        first, state = op(**tokens(arguments, slice(0, cut)), return_state=True)
        second, end = op(
            **tokens(arguments, slice(cut, None)), state=state, return_state=True,
            state_out=state if in_place else None,
        )  # fmt: skip
        helpers.assert_close(torch.cat([first, second], 2), whole, 1e-6, f"cut at {cut}")
        assert (end is state) == in_place
        for actual, expected in zip(end[:4], wanted[:4], strict=True):
            assert torch.equal(actual, expected), cut
        for actual, expected in zip(end.far, wanted.far, strict=True):
            helpers.assert_close(actual, expected, 1e-5, f"cut at {cut}")


@pytest.mark.parametrize("merge", MERGES)
def test_a_step_is_one_operator_and_makes_no_new_state(merge):
    case = Case(30, 4, 5, merge, batch=2, group=2, given_core=merge != "slots")
    arguments = detached(case.arguments())
    whole, state = op(**arguments), case.empty_state()
    storage = [x.data_ptr() for x in torch.utils._pytree.tree_leaves(state)]
    for t in range(30):
        with Operators() as seen:
            out = op(**tokens(arguments, slice(t, t + 1)), state=state, state_out=state)
        assert seen.names == ["hybrid_update.cpu"]
        helpers.assert_close(out, whole[:, :, t : t + 1], 1e-6)
    assert [x.data_ptr() for x in torch.utils._pytree.tree_leaves(state)] == storage
    assert state.position.tolist() == [30, 30]


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@pytest.mark.parametrize("merge", MERGES)
def test_state_out_of_its_own(backend, merge):
    """Another state than the one that is read, one that is not dense, and none to begin with."""
    case = Case(20, 4, 5, merge)
    arguments, run = detached(case.arguments()), functools.partial(op, backend=backend)
    first, second = (tokens(arguments, part) for part in (slice(0, 9), slice(9, None)))
    _, state = run(**first, return_state=True)
    kept = [x.clone() for x in torch.utils._pytree.tree_leaves(state)]
    wanted_out, wanted = run(**second, state=state, return_state=True)
    sparse = HybridState(
        *(x.repeat_interleave(2, -1)[..., ::2] if x.dim() > 1 else x.clone() for x in state[:4]),
        tuple(x.repeat_interleave(2, -1)[..., ::2] for x in state.far),
    )
    for given, target in ((state, case.empty_state()), (sparse, sparse)):
        out, end = run(**second, state=given, state_out=target, return_state=True)
        assert end is target
        helpers.assert_close(out, wanted_out, 1e-6)
        for actual, expected in zip(
            torch.utils._pytree.tree_leaves(target),
            torch.utils._pytree.tree_leaves(wanted),
            strict=True,
        ):
            helpers.assert_close(actual, expected, 1e-6)
    for actual, expected in zip(torch.utils._pytree.tree_leaves(state), kept, strict=True):
        assert torch.equal(actual, expected)
    target = case.empty_state()
    run(**first, state_out=target)
    assert target.position.tolist() == [9]


@pytest.mark.parametrize("merge", MERGES)
def test_autograd_sees_that_a_state_moved_on(merge):
    case = Case(10, 4, 5, merge)
    state = case.empty_state()
    product = torch.ones((), requires_grad=True) * state.far[-1]
    op(**detached(case.arguments()), state=state, state_out=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_state_out_takes_no_gradient():
    case = Case(10, 4, 5)
    with pytest.raises(ValueError, match="^state_out: expected a call without gradients"):
        op(**case.arguments(), state_out=case.empty_state())
    with pytest.raises(ValueError, match="^state_out.keep: expected shape"):
        op(**detached(case.arguments()), state_out=Case(10, 5, 5).empty_state())


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("group", [1, 4], ids=["rows", "tiles"])
def test_the_future_changes_no_bit(merge, group):
    arguments = detached(Case(60, 8, 5, merge, group=group, kv_heads=2).arguments())
    clean, state = op(**arguments), None
    for i in (0, 7, 16, 40):
        poisoned = {x: arguments[x].clone() for x in ("query", "key", "value")}
        for name, x in poisoned.items():
            x[:, :, i + 1 :] = 1e30 if name == "value" else torch.nan
        out = op(**(arguments | poisoned))
        helpers.assert_identical(out[:, :, : i + 1], clean[:, :, : i + 1], f"after {i}")
    assert state is None


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("window", [4, 32])
def test_what_is_hidden_may_be_nan_and_leaves_no_trace(merge, window):
    def run(poison):
        arguments = detached(Case(90, window, 5, merge, group=2, padding=(19, 30)).arguments())
        hidden = ~arguments["key_mask"][:, None, :, None]
        for name in ("key", "value"):
            arguments[name] = arguments[name].masked_fill(hidden, poison)
        return torch.utils._pytree.tree_leaves(op(**arguments, return_state=True))

    for actual, wanted in zip(run(torch.nan), run(0.0), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("merge", MERGES)
def test_rows_that_see_no_key_are_zero(merge):
    arguments = detached(Case(60, 8, 5, merge, padding=(45, 0)).arguments())
    out = op(**arguments)
    assert not out[:, :, :45].any() and out[:, :, 45:].abs().amax(-1).all()
    arguments["key_mask"][:] = False
    assert not op(**arguments).any()


@pytest.mark.parametrize("merge", MERGES)
def test_one_token(merge):
    arguments = detached(Case(1, 8, 5, merge, group=2, batch=2).arguments())
    helpers.assert_identical(op(**arguments), arguments["value"].repeat_interleave(2, 1))


@pytest.mark.parametrize("merge", MERGES)
def test_packed_sequences_are_streams_of_their_own(merge):
    """Memory does not grow with the longest one times their number; states go on."""
    case = Case(PACKED, 8, 5, merge, packed=True, group=2)
    arguments = detached(case.arguments())
    out, state = op(**arguments, return_state=True)
    again = op(**arguments, state=state, state_out=state)
    assert state.position.tolist() == [2 * n for n in LENGTHS]
    bounds = arguments.pop("cu_seqlens").tolist()
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        part = tokens(arguments, slice(start, stop))
        twice = {
            name: torch.cat([part[name]] * 2, 2)
            for name in ("query", "key", "value", "gate")
            if name in part
        }
        wanted = op(**(part | twice))
        helpers.assert_close(out[:, :, start:stop], wanted[:, :, : stop - start], 1e-6)
        helpers.assert_close(again[:, :, start:stop], wanted[:, :, stop - start :], 1e-6)


@pytest.mark.parametrize("merge", MERGES)
def test_any_number_of_threads_gives_the_same_bits(merge):
    arguments = detached(Case(700, 32, 8, merge, group=2, kv_heads=2, dim=64).arguments())
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(op(**arguments))
    finally:
        torch.set_num_threads(before)
    helpers.assert_identical(*found)


@pytest.mark.parametrize("merge", MERGES)
def test_opcheck(merge):
    case = Case(12, 3, 5, merge, group=2, padding=(3, 2))
    arguments, state = detached(case.arguments()), case.empty_state()
    with Operators() as seen:
        op(**arguments, return_state=True)
        op(**arguments, state=state, state_out=state)
    ours = [call for call in seen.calls if "hybrid" in call[0].__name__]
    assert [str(func) for func, *_ in ours] == [
        "flashmark.hybrid_forward.cpu", "flashmark.hybrid_update.cpu"
    ]  # fmt: skip
    for func, args, kwargs in ours:
        torch.library.opcheck(func, args, kwargs)


def test_large_scores_do_not_overflow():
    arguments = detached(Case(70, 8, 8, spread=2000.0, group=3).arguments())
    wanted = hybrid_attention(**wide(arguments))
    helpers.assert_close(op(**arguments), wanted, 2e-3)


@pytest.mark.plain_empty
def test_compiled_decoding_in_place():
    case = Case(9, 3, 5)
    arguments, state = detached(case.arguments()), case.empty_state()
    wanted = op(**arguments)

    def step(query, key, value, landmarks, state):
        return op(query, key, value, landmarks, window=3, state=state, state_out=state)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for t in range(9):
            now = (arguments[x][:, :, t : t + 1] for x in ("query", "key", "value"))
            out = compiled(*now, arguments["landmarks"], state)
            helpers.assert_close(out, wanted[:, :, t : t + 1], 1e-6)
    assert state.position.tolist() == [9]


@pytest.mark.parametrize("merge", MERGES)
def test_many_rows_of_a_chunk_change_no_bit_with_what_follows(merge):
    """More rows than are taken one by one: later rows of a tile must not move earlier ones."""
    query, key, value = (helpers.randn(2, h, 37, 8, seed=h) for h in (4, 2, 2))
    marks = init_landmarks(2, 4, 8)
    gate = torch.full((1, 4, 1, 1), 0.5) if merge == "gate" else None
    for position in range(0, 36, 5):
        outputs = []
        for later in (None, 1e4, -1e4):
            tokens = [x.clone() for x in (query, key, value)]
            if later is not None:
                for x in tokens:
                    x[:, :, position + 1 :] = later
            outputs.append(
                hybrid_attention(*tokens, marks, window=5, merge=merge, gate=gate, backend="cpu")
            )
        for x in outputs[1:]:
            helpers.assert_identical(x[:, :, : position + 1], outputs[0][:, :, : position + 1])
