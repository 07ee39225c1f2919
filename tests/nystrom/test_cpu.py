"""The C++ kernels of causal Nyström attention: what the operator's own tests do not look at."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import flashmark
from flashmark import cpu
from tests import helpers
from tests.nystrom.cases import Case

if not cpu.available():
    pytest.skip(cpu.why_not(), allow_module_level=True)

CASES = [  # with a core: the default one is solved by LAPACK, whose bits follow the threads
    Case(200, 16, group=2, batch=2, kv_heads=2, given_core=True),
    Case(200, 20, decay=0.3, state=True, normalize="mass", given_core=True),
    Case(495, 8, packed=True, state=True, group=2, given_core=True),
    Case(130, 8, spread=60.0, given_core=True),
]
# With few heads a sequence is cut every 1024 tokens, and the parts run side by side.
LONG = [
    Case(2500, 8, given_core=True),
    Case(1024, 8, given_core=True, state=True, decay=0.1),
    Case(1025, 8, given_core=True, state=True),
    Case(2049, 13, group=2, given_core=True, decay=0.001, state=True),
    Case(2100, 8, given_core=True, decay=2.0),
    Case(2300, 8, given_core=True, decay=0.01, state=True, normalize="mass", v_dim=24),
    Case(3100, 8, batch=2, kv_heads=2, given_core=True, padding=(1100, 1100)),
    Case(2200, 8, batch=7, given_core=True, landmarks="batched"),
    Case(1100, 4, batch=8, given_core=True),  # enough samples: no cut
]
STEEP = Case(2200, 8, spread=60.0, given_core=True)
PART = 1024


def results(case: Case, dtype: torch.dtype = torch.float32, backend: str = "cpu") -> list:
    arguments = case.arguments(dtype)
    leaves = [t for t in _tensors(arguments) if t.is_floating_point() and t.requires_grad]
    out, (L, R) = flashmark.nystrom_attention(**arguments, return_state=True, backend=backend)
    weights = [helpers.randn(*t.shape, seed=70 + n) for n, t in enumerate((out, L, R))]
    held = L.isfinite()
    loss = (out.float() * weights[0]).sum() + (R * weights[2]).sum()
    loss = loss + (torch.where(held, L, 0.0) * weights[1]).sum()
    return [out.detach(), L.detach(), R.detach(), *torch.autograd.grad(loss, leaves)]


def _tensors(arguments: dict):
    for value in arguments.values():
        values = value if isinstance(value, tuple | list) else [value]
        yield from (v for v in values if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("case", [*CASES, *LONG, STEEP], ids=str)
def test_any_number_of_threads_gives_the_same_bits(case):
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results(case))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for expected, actual in zip(runs[0], other, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("case", [*CASES, *LONG[3:7]], ids=str)
def test_no_result_depends_on_uninitialised_memory(case):
    expected = results(case)
    torch.use_deterministic_algorithms(True)  # torch then fills what it allocates with NaN
    try:
        actual = results(case)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences_against_float64(case):
    exact = results(case, torch.float64, "eager")
    for n, (actual, expected) in enumerate(zip(results(case), exact, strict=True)):
        helpers.assert_close(actual, expected, 5e-6, f"result {n}")


def test_steep_scores_in_long_sequences_against_float64():
    largest = 60 * 5  # of the scores
    tolerance = 2 * torch.finfo(torch.float32).eps * largest
    exact = results(STEEP, torch.float64, "eager")
    for n, (actual, expected) in enumerate(zip(results(STEEP), exact, strict=True)):
        helpers.assert_close(actual, expected, tolerance, f"result {n}")


def packed(lengths, **options) -> dict:
    case = Case(sum(lengths), 8, given_core=True, **options)
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    return case.arguments() | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


@pytest.mark.parametrize(
    "lengths", [(1024, 0, 1100, 1), (3, 2500), (1500, 40, 30, 20, 10, 900, 1030, 0, 5, 2)], ids=str
)
def test_long_packed_sequences_are_those_sequences_alone(lengths):
    arguments = packed(lengths, decay=0.001, group=2)
    leaves = [t for t in _tensors(arguments) if t.is_floating_point()]
    tokens = leaves[:3]
    out = flashmark.nystrom_attention(**arguments, backend="cpu")
    dout = helpers.randn(*out.shape, seed=60)
    alone = {k: v for k, v in arguments.items() if k not in ("query", "key", "value", "cu_seqlens")}
    parts, first = [], 0
    for n in lengths:
        rows = [t[:, :, first : first + n] for t in tokens]
        first += n
        qkv = dict(zip(("query", "key", "value"), rows, strict=True))
        parts.append(flashmark.nystrom_attention(**qkv, **alone, backend="cpu"))
    expected = torch.cat(parts, 2)
    helpers.assert_close(out, expected, 1e-6, "out")
    grads = torch.autograd.grad(out, leaves, dout)
    for n, e in enumerate(torch.autograd.grad(expected, leaves, dout)):
        helpers.assert_close(grads[n], e, 1e-5, f"gradient {n}")


@pytest.mark.parametrize("seen", [PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 70])
@pytest.mark.parametrize("case", [LONG[3], LONG[5], STEEP], ids=str)
def test_no_later_token_touches_a_bit_across_parts(case, seen):
    arguments = case.arguments()
    expected = flashmark.nystrom_attention(**arguments, backend="cpu")[:, :, :seen]
    changed = dict(arguments)
    for name in ("query", "key", "value"):
        changed[name] = arguments[name].detach().clone()
        changed[name][:, :, seen:] *= -37.0
    actual = flashmark.nystrom_attention(**changed, backend="cpu")[:, :, :seen]
    assert torch.equal(actual, expected)
    for name in ("query", "key", "value"):
        changed[name] = arguments[name][:, :, :seen]
    assert torch.equal(flashmark.nystrom_attention(**changed, backend="cpu"), expected)


@pytest.mark.parametrize("at", [1, 1000, PART, 1500, 2 * PART])
@pytest.mark.parametrize("case", [LONG[3], LONG[5]], ids=str)
def test_a_long_sequence_split_anywhere_gives_the_same(case, at):
    arguments = case.arguments()
    tokens = ("query", "key", "value")

    def run(part, state):
        rows = {name: arguments[name][:, :, part] for name in tokens}
        rest = arguments | rows | {"state": state}
        return flashmark.nystrom_attention(**rest, return_state=True, backend="cpu")

    whole, (L, R) = run(slice(None), arguments["state"])
    left, state = run(slice(None, at), arguments["state"])
    right, (L2, R2) = run(slice(at, None), state)
    helpers.assert_close(torch.cat([left, right], 2), whole, 2e-6, "out")
    helpers.assert_close(L2, L, 1e-6, "L")
    helpers.assert_close(R2, R, 2e-6, "R")


def test_a_part_of_hidden_keys_only():
    arguments = LONG[0].arguments()
    mask = torch.ones(1, LONG[0].n, dtype=torch.bool)
    mask[:, PART : 2 * PART] = False
    arguments["key_mask"] = mask
    for hidden_from_start in (False, True):
        if hidden_from_start:
            mask[:, :PART] = False
        found = []
        for backend in ("cpu", "eager"):
            leaves = [t for t in _tensors(arguments) if t.requires_grad]
            out, (L, R) = flashmark.nystrom_attention(
                **arguments, return_state=True, backend=backend
            )
            dout = helpers.randn(*out.shape, seed=61)
            grads = torch.autograd.grad((out * dout).sum() + L.sum() + R.sum(), leaves)
            found.append([out, L, R, *grads])
        for n, (actual, expected) in enumerate(zip(*found, strict=True)):
            helpers.assert_close(actual, expected, 1e-5, f"result {n}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES[:3], LONG[3]], ids=str)
def test_half_precision_rounds_inputs_and_outputs_only(case, dtype):
    # Half-precision inputs are computed in float32: within a rounding of the same numbers there.
    actual = results(case, dtype)
    arguments = case.arguments(dtype)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    wide = _upcast(arguments)
    out = flashmark.nystrom_attention(**wide, backend="cpu")
    helpers.assert_close(actual[0].float(), out, rounding, "out")


def _upcast(arguments: dict) -> dict:
    def one(x):
        return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {
        name: tuple(one(v) for v in value) if isinstance(value, tuple) else one(value)
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("layout", ["bnhd", "gaps"])
def test_strides_change_nothing(layout):
    for case in CASES[:2]:
        strided = dataclasses.replace(case, layout=layout)
        for expected, actual in zip(results(case), results(strided), strict=True):
            assert torch.equal(actual, expected)


def test_no_samples():
    case = Case(20, 8, batch=2)
    arguments = case.arguments()
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name][:0]
    out = flashmark.nystrom_attention(**arguments, backend="cpu")
    assert out.shape == (0, 1, 20, 16)


UPDATES = [
    Case(20, 8, batch=3, kv_heads=2, given_core=True),
    Case(2300, 8, given_core=True, decay=0.01),
    Case(495, 8, packed=True, given_core=True),
]
TARGETS = {
    "contiguous": lambda x: torch.empty_like(x),
    "float64": lambda x: torch.empty_like(x, dtype=torch.float64),
    "strided": lambda x: x.new_empty(*x.shape, 2)[..., 1],
}


def without_gradients(case: Case) -> dict:
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, case.arguments())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", UPDATES, ids=str)
def test_states_are_overwritten_in_any_memory(case, target):
    arguments = dataclasses.replace(case, state=True)
    arguments = without_gradients(arguments)
    run = functools.partial(flashmark.nystrom_attention, **arguments, backend="cpu")
    out, wanted = run(return_state=True)
    buffers = flashmark.NystromState(*map(TARGETS[target], wanted))
    got, returned = run(return_state=True, state_out=buffers)
    assert returned is buffers
    helpers.assert_identical(got, out)
    for x, y in zip(buffers, wanted, strict=True):
        helpers.assert_identical(x.to(y.dtype), y)


def test_a_state_may_share_memory_with_the_one_before_it():
    """Rows of the new state lie one further than those that are read, in the same tensors."""
    arguments = without_gradients(Case(20, 8, batch=3, given_core=True, state=True))
    before = arguments.pop("state")
    _, wanted = flashmark.nystrom_attention(
        **arguments, state=flashmark.NystromState(*before), return_state=True, backend="cpu"
    )
    memory = [torch.cat((x, x[:1])) for x in before]
    read = flashmark.NystromState(*(x[:3] for x in memory))
    written = flashmark.NystromState(*(x[1:] for x in memory))
    flashmark.nystrom_attention(**arguments, state=read, state_out=written, backend="cpu")
    for x, y in zip(written, wanted, strict=True):
        helpers.assert_identical(x, y)


def test_autograd_sees_that_a_state_was_overwritten():
    arguments = without_gradients(Case(20, 8, given_core=True, state=True))
    state = flashmark.NystromState(*arguments.pop("state"))
    factor = torch.ones((), requires_grad=True)
    product = factor * state.R
    flashmark.nystrom_attention(**arguments, state=state, state_out=state, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_opcheck_of_the_update():
    query, key, value = (helpers.randn(1, 2, 9, 8, seed=n) for n in range(3))
    marks, core = helpers.randn(2, 4, 8), torch.eye(4).repeat(2, 1, 1)
    optional = [None] * 5
    ends = helpers.randn(1, 2, 4), helpers.randn(1, 2, 4, 8)
    given = (query, key, value, marks, marks.clone(), core, 0.5, *optional, False, True, *ends)
    torch.library.opcheck(torch.ops.flashmark.nystrom_update.cpu, given)
