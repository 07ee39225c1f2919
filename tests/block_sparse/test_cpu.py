"""The C++ kernels against the float64 definition, called as the operators call them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from flashmark import cpu, masks, reference
from flashmark.block_sparse.call import Call, Grads, Saved
from flashmark.block_sparse.operator import OPERATOR
from flashmark.masks.block_mask import plain_mask
from tests import helpers

if not cpu.available():
    pytest.skip(cpu.why_not(), allow_module_level=True)

FORWARD, GRADIENT = 1e-5, 5e-5  # relative, float32
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
WINDOW = masks.causal() & masks.sliding_window(70)
NAMES = ("query", "key", "value", "bias", "sinks")


def seed_of(n: int) -> torch.Tensor:
    return torch.tensor([n])


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def forward(call: Call) -> Saved:
    return Saved(*OPERATOR.forward["cpu"](*OPERATOR.flatten(call)))


def backward(call: Call, saved: Saved, dout: torch.Tensor, dlse: torch.Tensor | None) -> Grads:
    return Grads(*OPERATOR.backward["cpu"](dout, dlse, *saved, *OPERATOR.flatten(call)))


class Case:
    """Inputs of one call, and what it gives by the kernels and by the definition."""

    def __init__(self, tensors, mask, *, rows=None, block_size=64, **options):
        query, key, value = (tensors[name].detach() for name in NAMES[:3])
        self.tensors = {name: t.detach() for name, t in tensors.items()}
        self.options = options
        sizes = (*query.shape[:2], rows or query.shape[2], key.shape[2])
        self.mask = masks.compile_mask(mask, *sizes, device="cpu", block_size=block_size)
        shape = (*query.shape[:3], value.shape[3])
        self.dout = helpers.randn(*shape, dtype=query.dtype, seed=50)
        self.dlse = helpers.randn(*shape[:3], seed=51)

    def run(self) -> dict[str, torch.Tensor]:
        options = {"scale": self.tensors["query"].shape[3] ** -0.5} | self.options
        call = Call(**self.tensors, mask=self.mask, **options)
        saved = forward(call)
        grads = backward(call, saved, self.dout, self.dlse)
        given = {name: g for name, g in zip(NAMES, grads, strict=True) if name in self.tensors}
        absent = [g for name, g in zip(NAMES, grads, strict=True) if name not in self.tensors]
        assert all(g.numel() == 0 for g in absent)
        named = {f"d {name}": g for name, g in given.items()}
        return {"out": saved.out, "lse": saved.lse, **named}

    def define(self, dtype=torch.float64) -> dict[str, torch.Tensor]:
        leaves = {n: t.to(dtype).requires_grad_() for n, t in self.tensors.items()}
        options = dict(self.options)
        options["softcap"] = options.get("softcap") or None
        out, lse = reference.block_sparse_attention(
            **leaves, mask=self.mask, return_lse=True, **options
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

    def check(self, gradient: float = GRADIENT) -> None:
        expected, actual = self.define(), self.run()
        for name, value in expected.items():
            tolerance = gradient if name.startswith("d ") else FORWARD
            helpers.assert_close(actual[name], value, tolerance, name)


def inputs(batch=2, heads=4, q_len=150, dim=32, *, bias=None, sinks=False, **shape):
    tensors = dict(
        zip(NAMES, helpers.qkv(batch, heads, q_len, dim, grad=False, **shape), strict=False)
    )
    if bias is not None:
        tensors["bias"] = helpers.randn(*bias, seed=8)
    if sinks:
        tensors["sinks"] = helpers.randn(heads, seed=9)
    return tensors


MASKS = {
    "causal": masks.causal(),
    "dense": masks.sliding_window(10**6),
    "window": WINDOW,
    "sink-window": masks.causal() & (masks.sliding_window(70) | masks.prefix(5)),
    "pinned": masks.pinned(3),
    "documents": masks.causal() & masks.documents(torch.arange(150) // 47 - 1),
    "head-wise": masks.mask_mod(lambda b, h, q, kv: (q * (h + 2) + b) % 7 < kv % 5),
}


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, (128, 32), (16, 64)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_and_block_size(name, block_size):
    Case(inputs(kv_heads=2), MASKS[name], block_size=block_size).check()


@pytest.mark.parametrize("dim, v_dim", [(1, 1), (3, 40), (64, 64), (33, 17), (256, 255)], ids=str)
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 130), (17, 16), (65, 130), (127, 129)])
def test_odd_shapes(q_len, kv_len, dim, v_dim):
    Case(inputs(1, 2, q_len, dim, kv_len=kv_len, v_dim=v_dim), masks.causal()).check()


@pytest.mark.parametrize("name", ["causal", "window", "sink-window"])
def test_sequences_longer_than_every_internal_tile(name):
    Case(inputs(1, 2, 1100, 16, kv_heads=1), MASKS[name], block_size=128).check()


FEATURES = {
    "relative-bias": ({"bias": (4, 349)}, {}),
    "sinks": ({"sinks": True}, {}),
    "softcap": ({}, {"softcap": 1.5}),
    "dropout": ({}, {"dropout_p": 0.3, "dropout_seed": seed_of(2**40 + 17)}),
    "negative-scale": ({}, {"scale": -0.4}),
    "lengths": ({}, {"kv_lengths": lengths(200, 93)}),
    "no-keys": ({"sinks": True}, {"kv_lengths": lengths(0, 7)}),
    "all": (
        {"bias": (4, 349), "sinks": True},
        {
            "softcap": 2.0,
            "dropout_p": 0.2,
            "dropout_seed": seed_of(-5),
            "kv_lengths": lengths(200, 93),
        },
    ),
}


@pytest.mark.parametrize("mask", ["causal", "window"])
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(feature, mask):
    extra, options = FEATURES[feature]
    Case(inputs(kv_len=200, kv_heads=2, **extra), MASKS[mask], **options).check()


@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 150, 200),
        (1, 4, 150, 200),
        (2, 1, 150, 200),
        (1, 1, 1, 200),
        (2, 4, 150, 1),
        (1, 1, 1, 1),
    ],
    ids=str,
)
def test_dense_bias_of_every_broadcast_shape(shape):
    tensors = inputs(kv_len=200, kv_heads=2, bias=shape)
    one_sum = max(shape) == 1  # of all terms, which cancel: to within their rounding
    Case(tensors, WINDOW, softcap=2.0).check(gradient=4 * GRADIENT if one_sum else GRADIENT)


@pytest.mark.parametrize("q_len", [1, 5, 40, 90])
@pytest.mark.parametrize("offsets", [(100,), (0, 210), (63, 64)], ids=str)
def test_decoding_rows_of_a_mask_of_the_whole_cache(q_len, offsets):
    tensors = inputs(q_len=q_len, kv_len=300, kv_heads=2, bias=(4, 599))
    options = {"query_offset": lengths(*offsets), "kv_lengths": lengths(300, 222)}
    Case(tensors, WINDOW, rows=300, **options).check()
    Case(tensors, masks.causal(), rows=300, **options).check()


@pytest.mark.parametrize("layout", ["bnhd", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_change_nothing(layout, dtype):
    plain = Case(inputs(dtype=dtype, kv_heads=2), WINDOW)
    strided = Case(inputs(dtype=dtype, kv_heads=2, layout=layout), WINDOW)
    for (name, expected), actual in zip(plain.run().items(), strided.run().values(), strict=True):
        helpers.assert_identical(actual, expected, name)


@pytest.mark.parametrize("dim, v_dim", [(32, 32), (33, 17), (64, 20)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "window", "head-wise"])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_half_precision_is_as_good_as_plain_pytorch(dtype, mask, dim, v_dim):
    case = Case(inputs(dim=dim, v_dim=v_dim, kv_heads=2, dtype=dtype), MASKS[mask])
    exact, plain, actual = case.define(), case.define(dtype), case.run()
    for name, expected in exact.items():
        allowed = 2 * helpers.relative_error(plain[name], expected) + 2 * ROUNDING[dtype]
        helpers.assert_close(actual[name], expected, allowed, name)
        assert actual[name].dtype == (torch.float32 if name == "lse" else dtype)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_half_precision_with_every_feature(dtype):
    extra, options = FEATURES["all"]
    case = Case(inputs(kv_len=200, dim=33, kv_heads=2, dtype=dtype, **extra), WINDOW, **options)
    exact, plain, actual = case.define(), case.define(dtype), case.run()
    for name, expected in exact.items():
        allowed = 2 * helpers.relative_error(plain[name], expected) + 2 * ROUNDING[dtype]
        helpers.assert_close(actual[name], expected, allowed, name)


@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_scores_that_rise_or_fall_by_hundreds(direction):
    tensors = inputs(1, 1, 600, 4)
    ramp = torch.linspace(-80, 80, 600)[:, None]
    tensors["key"] = tensors["key"] + direction * ramp
    tensors["query"] = tensors["query"].abs()
    case = Case(tensors, masks.causal(), scale=1.0)
    largest = (tensors["query"] @ tensors["key"].mT).abs().max().item()
    expected, actual = case.define(), case.run()
    allowed = 5e-5 + 2 * torch.finfo(torch.float32).eps * largest
    for name, value in expected.items():
        helpers.assert_close(actual[name], value, allowed, name)


THREADED = {
    "causal": lambda: Case(inputs(1, 2, 400), masks.causal()),
    "window-bfloat16": lambda: Case(inputs(1, 2, 400, dtype=torch.bfloat16), WINDOW),
    "grouped-relative-bias": lambda: Case(
        inputs(2, 4, 300, kv_heads=2, bias=(4, 599), sinks=True), WINDOW
    ),
    "shared-dense-bias": lambda: Case(inputs(2, 4, 300, kv_heads=2, bias=(1, 1, 300, 1)), WINDOW),
}


@pytest.mark.parametrize("name", THREADED)
def test_any_number_of_threads_gives_the_same_bits(name):
    case = THREADED[name]()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(case.run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, expected in results[0].items():
            helpers.assert_identical(other[key], expected, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_keys_that_nobody_sees_may_hold_anything(mask, dtype):
    tensors = inputs(q_len=100, kv_len=101, dtype=dtype)
    poisoned = {name: t.clone() for name, t in tensors.items()}
    for name in ("key", "value"):
        poisoned[name][1, :, 60:] = float("nan")
    options = {"kv_lengths": lengths(101, 60)}
    clean, actual = (Case(t, MASKS[mask], **options).run() for t in (tensors, poisoned))
    for name, expected in clean.items():
        helpers.assert_identical(actual[name], expected, name)


@pytest.mark.parametrize("name", THREADED)
def test_no_result_depends_on_uninitialised_memory(name):
    case = THREADED[name]()
    expected = case.run()
    torch.use_deterministic_algorithms(True)  # torch then fills what it allocates with NaN
    try:
        actual = case.run()
    finally:
        torch.use_deterministic_algorithms(False)
    for key, value in expected.items():
        helpers.assert_identical(actual[key], value, key)


@pytest.mark.parametrize("batch, q_len, kv_len", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty_tensors(batch, q_len, kv_len):
    mask = masks.sliding_window(10**6)
    query, key, value = helpers.qkv(batch, 2, max(q_len, 1), 8, kv_len=max(kv_len, 1), grad=False)
    query, key, value = query[:, :, :q_len], key[:, :, :kv_len], value[:, :, :kv_len]
    compiled = masks.compile_mask(
        mask, max(batch, 1), 2, q_len, kv_len, device="cpu", block_size=64
    ) if min(q_len, kv_len) else plain_mask("dense", q_len, kv_len)  # fmt: skip
    call = Call(query, key, value, compiled, 1.0)
    saved = forward(call)
    grads = backward(call, saved, saved.out, None)
    assert saved.out.shape == query.shape and not saved.out.any()
    assert (saved.lse == float("-inf")).all() if kv_len == 0 else saved.lse.numel() == 0
    for grad, tensor in zip(grads, (query, key, value), strict=False):
        assert grad.shape == tensor.shape and not grad.any()


def test_sinks_of_a_call_without_keys_have_the_gradient_of_lse():
    query, key = torch.randn(2, 2, 3, 8), torch.empty(2, 2, 0, 8)
    sinks, dlse = torch.tensor([0.5, -1.0]), torch.randn(2, 2, 3)
    call = Call(query, key, key, plain_mask("dense", 3, 0), 1.0, sinks=sinks)
    saved = forward(call)
    helpers.assert_identical(saved.lse, sinks[:, None].expand(2, 2, 3), "lse")
    grads = backward(call, saved, torch.randn_like(query), dlse)
    helpers.assert_close(grads.dsinks, dlse.sum((0, 2)), 1e-6, "d sinks")


PROGRAM = """
import sys, torch
from flashmark import cpu
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 90, 24).to(getattr(torch, sys.argv[1])) for _ in range(3))
from flashmark import masks, reference, block_sparse_attention
assert torch.backends.cpu.get_cpu_capability() == "AVX2", "capability"
mask = masks.compile_mask(masks.sliding_window(20, 0), 1, 2, 90, 90, device="cpu", block_size=32)
inputs = [t.requires_grad_() for t in (q, k, v)]
out, lse = block_sparse_attention(*inputs, mask, scale=0.2, return_lse=True, backend="cpu")
grads = torch.autograd.grad((out, lse), inputs, (out.detach(), lse.detach()))
leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
expected = reference.block_sparse_attention(*leaves, mask=mask, scale=0.2, return_lse=True)
wanted = torch.autograd.grad(expected, leaves, (out.double().detach(), lse.double().detach()))
for a, e in zip((out, lse, *grads), (*expected, *wanted)):
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


def test_loader_says_why_it_cannot_run():
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    program = "from flashmark import cpu; print(cpu.available(), cpu.why_not())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith("False") and "AVX2" in done.stdout


def test_mask_for_another_length_is_refused():
    case = Case(inputs(), masks.causal())
    case.tensors["key"], case.tensors["value"] = (
        case.tensors[name][:, :, :90] for name in ("key", "value")
    )
    with pytest.raises(RuntimeError, match="mask: expected 90 keys, got 150"):
        case.run()
