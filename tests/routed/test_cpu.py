"""The C++ kernels against the float64 definition, called as the operators call them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import flashmark
from flashmark import cpu, reference
from flashmark.routed.call import Call, Grads, Saved
from flashmark.routed.operator import OPERATOR
from flashmark.routed.places import starts_of
from tests import helpers
from tests.routed.cases import CASES, Case, integers

if not cpu.available():
    pytest.skip(cpu.why_not(), allow_module_level=True)

FORWARD, GRADIENT = 1e-5, 5e-5  # relative, float32
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
LONG = Case(q_len=1500, kv_len=1500, heads=8, kv_heads=1, choices=4, sinks=True)  # many chunks


class Run:
    """Inputs of one call, and what it gives by the kernels and by the definition."""

    def __init__(self, case: Case, dtype=torch.float32, layout="contiguous", tensors=None):
        self.case, self.indices = case, case.indices()
        self.tensors = tensors or case.tensors(dtype, layout=layout)
        shape = case.batch, case.heads, case.q_len
        self.dout = helpers.randn(*shape, case.v_dim, dtype=dtype, seed=50)
        self.dlse = helpers.randn(*shape, seed=51)

    def call(self) -> Call:
        given = dict(self.case.arguments())
        packed = given.pop("cu_seqlens", None)
        given.setdefault("scale", self.case.dim**-0.5)
        if packed is not None:
            given["starts"] = starts_of(packed, self.case.kv_len)
        return Call(**self.tensors, indices=self.indices, **given)

    def run(self) -> dict[str, torch.Tensor]:
        flat = OPERATOR.flatten(self.call())
        saved = Saved(*OPERATOR.forward["cpu"](*flat))
        grads = Grads(*OPERATOR.backward["cpu"](self.dout, self.dlse, *saved, *flat))
        assert self.case.sinks or grads.dsinks.numel() == 0
        named = {f"d {name}": getattr(grads, f"d{name}") for name in self.tensors}
        return {"out": saved.out, "lse": saved.lse, **named}

    def define(self, dtype=torch.float64) -> dict[str, torch.Tensor]:
        leaves = {n: t.to(dtype).requires_grad_() for n, t in self.tensors.items()}
        out, lse = reference.block_topk_attention(
            **leaves, indices=self.indices, return_lse=True, **self.case.arguments()
        )
        dlse = self.dlse.to(lse.dtype).masked_fill(lse.isinf(), 0.0)
        grads = torch.autograd.grad(
            (out, lse), list(leaves.values()), (self.dout.to(dtype), dlse), allow_unused=True
        )
        found = {
            f"d {n}": torch.zeros_like(leaf) if g is None else g
            for (n, leaf), g in zip(leaves.items(), grads, strict=True)
        }
        return {"out": out.detach(), "lse": lse.detach(), **found}


@pytest.mark.parametrize("name", CASES)
def test_float32_agrees_with_the_definition(name):
    run = Run(CASES[name])
    expected, actual = run.define(), run.run()
    for key, value in expected.items():
        helpers.assert_close(actual[key], value, GRADIENT if key[:2] == "d " else FORWARD, key)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_as_good_as_plain_pytorch(name, dtype):
    run = Run(CASES[name], dtype)
    exact, plain, actual = run.define(), run.define(dtype), run.run()
    for key, expected in exact.items():
        allowed = 2 * helpers.relative_error(plain[key], expected) + 2 * ROUNDING[dtype]
        helpers.assert_close(actual[key], expected, allowed, key)
        assert actual[key].dtype == (torch.float32 if key == "lse" else dtype)


def test_sequences_longer_than_a_chunk():
    run = Run(LONG)
    expected, actual = run.define(), run.run()
    for key, value in expected.items():
        helpers.assert_close(actual[key], value, GRADIENT if key[:2] == "d " else FORWARD, key)


@pytest.mark.parametrize("layout", ["bnhd", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_change_nothing(layout, dtype):
    plain, strided = (Run(CASES["plain"], dtype, x).run() for x in ("contiguous", layout))
    for name, expected in plain.items():
        helpers.assert_identical(strided[name], expected, name)


@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_scores_that_rise_or_fall_by_hundreds(direction):
    case = Case(1, 1, 1, 600, 600, 4, 4, choices=30, options={"scale": 1.0})
    tensors = case.tensors()
    tensors["key"] = tensors["key"] + direction * torch.linspace(-80, 80, 600)[:, None]
    tensors["query"] = tensors["query"].abs()
    run = Run(case, tensors=tensors)
    largest = (tensors["query"] @ tensors["key"].mT).abs().max().item()
    expected, actual = run.define(), run.run()
    allowed = 5e-5 + 2 * torch.finfo(torch.float32).eps * largest
    for name, value in expected.items():
        helpers.assert_close(actual[name], value, allowed, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    run, before = Run(LONG, dtype), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run.run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, expected in results[0].items():
            helpers.assert_identical(other[key], expected, key)


@pytest.mark.parametrize("name", ["plain", "odd-dims", "packed", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_result_depends_on_uninitialised_memory(name, dtype):
    run = Run(CASES[name], dtype)
    expected = run.run()
    torch.use_deterministic_algorithms(True)  # torch then fills what it allocates with NaN
    try:
        actual = run.run()
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in expected.items():
        helpers.assert_identical(actual[key], value, key)


@pytest.mark.parametrize("name", ["key-mask", "lengths", "all-features"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_take_no_part_may_hold_anything(name, dtype):
    case = CASES[name]
    clean = Run(case, dtype)
    keep = torch.arange(case.kv_len) < case.options.get(
        "kv_lengths", torch.full((case.batch,), case.kv_len)
    ).view(-1, 1)
    keep = keep & case.arguments().get("key_mask", torch.tensor(True))
    poisoned = {x: t.clone() for x, t in clean.tensors.items()}
    for key in ("key", "value"):
        poisoned[key].masked_fill_(~keep[:, None, :, None], float("nan"))
    actual = Run(case, dtype, tensors=poisoned).run()
    for key, expected in clean.run().items():
        helpers.assert_identical(actual[key], expected, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [0, 15, 40, 700])
def test_outputs_ignore_the_future_bitwise(last, dtype):
    run = Run(LONG, dtype)
    flat = OPERATOR.flatten(run.call())
    out, lse = OPERATOR.forward["cpu"](*flat)
    later, indices = slice(last + 1, None), run.indices.clone()
    indices[:, :, later] = -1
    for poison in (float("nan"), float("inf"), 1e4):
        changed = {name: t.clone() for name, t in run.tensors.items()}
        changed["query"][:, :, later] = changed["key"][:, :, later] = poison
        changed["value"][:, :, later] = 1e30
        other = Run(LONG, dtype, tensors=changed)
        other.indices = indices
        new_out, new_lse = OPERATOR.forward["cpu"](*OPERATOR.flatten(other.call()))
        for name, new, old in (("out", new_out, out), ("lse", new_lse, lse)):
            helpers.assert_identical(new[:, :, : last + 1], old[:, :, : last + 1], name)


@pytest.mark.parametrize("q_len, kv_len", [(0, 5), (3, 0)])
def test_empty_tensors(q_len, kv_len):
    query, key = torch.randn(2, 2, q_len, 8), torch.randn(2, 2, kv_len, 8)
    indices = torch.zeros(2, 2, q_len, 1, dtype=torch.int32)
    sinks, dlse = torch.tensor([0.5, -1.0]), torch.randn(2, 2, q_len)
    flat = OPERATOR.flatten(Call(query, key, key, indices, 4, 1, 1.0, sinks=sinks))
    saved = Saved(*OPERATOR.forward["cpu"](*flat))
    helpers.assert_identical(saved.lse, sinks[:, None].expand(2, 2, q_len), "lse")
    grads = Grads(*OPERATOR.backward["cpu"](saved.out, dlse, *saved, *flat))
    assert not saved.out.any() and not grads.dkey.any() and grads.dkey.shape == key.shape
    helpers.assert_close(grads.dsinks, dlse.sum((0, 2)), 1e-6, "d sinks")


PROGRAM = """
import sys, torch, flashmark
from flashmark import reference
assert torch.backends.cpu.get_cpu_capability() == "AVX2", "capability"
torch.manual_seed(0)
tensors = [torch.randn(1, h, 130, 24).to(getattr(torch, sys.argv[1])) for h in (4, 2, 2)]
marks, options = torch.randn(2, 3, 24), dict(block_size=20, near=1)
state = dict(block_size=20, top_k=2, return_routing=True)
chosen = [flashmark.routed_attention(*tensors, marks, **state, backend=b)[1].indices
          for b in ("cpu", "eager")]
assert (chosen[0] == chosen[1]).float().mean() > 0.99
results = []
for backend, dtype in (("cpu", tensors[0].dtype), ("reference", torch.float64)):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out, lse = flashmark.block_topk_attention(
        *leaves, chosen[0], **options, return_lse=True, backend=backend
    )
    ones = torch.ones_like(out), torch.ones_like(lse)
    results.append((out, lse, *torch.autograd.grad((out, lse), leaves, ones)))
for a, e in zip(*results):
    print(((a - e).abs().max() / e.abs().max()).item())
"""


@pytest.mark.parametrize("dtype, tolerance", [("float32", 5e-5), ("bfloat16", 0.02)])
def test_avx2_library_computes_the_same(dtype, tolerance):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype], capture_output=True, text=True, env=environment
    )
    if "were not built" in done.stderr:
        pytest.skip("the AVX2 library was not built")
    assert done.returncode == 0, done.stderr
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 5 and max(errors) < tolerance


@pytest.mark.parametrize("name", ["plain", "packed", "all-features"])
def test_public_function_runs_the_kernels_and_their_gradients(name):
    run = Run(CASES[name])
    expected = run.run()
    leaves = {n: t.clone().requires_grad_() for n, t in run.tensors.items()}
    out, lse = flashmark.block_topk_attention(
        **leaves, indices=run.indices, **run.case.arguments(), return_lse=True, backend="cpu"
    )
    grads = torch.autograd.grad((out, lse), list(leaves.values()), (run.dout, run.dlse))
    for key, value in zip(expected, (out, lse, *grads), strict=True):
        helpers.assert_identical(value.detach(), expected[key], key)


def test_tensors_that_do_not_fit_are_refused():
    run = Run(CASES["plain"])
    run.tensors["value"] = run.tensors["value"][:, :, :40]
    with pytest.raises(RuntimeError, match="expected shapes"):
        run.run()
    run = Run(CASES["plain"])
    run.indices = run.indices.long()
    with pytest.raises(RuntimeError, match="indices: expected int32"):
        run.run()


def test_offsets_of_other_samples_are_refused():
    run = Run(Case(batch=3, q_len=8))
    call = dataclasses.replace(run.call(), query_offset=integers(0, 0))
    with pytest.raises(RuntimeError, match="query_offset: expected one or one a sample, got 2"):
        OPERATOR.forward["cpu"](*OPERATOR.flatten(call))
