"""The Triton kernels of Nyström attention compute its definition: outputs, states, every gradient.

Against the float64 reference, in Triton's interpreter. Spans are made short, so that small inputs
already have several stretches, and the gradients of parameters several shares.
"""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

import flashmark
from flashmark.kernels.nystrom import chunks, configs
from tests import helpers
from tests.interpreter.nystrom_backend import op, shorten
from tests.interpreter.running import INTERPRETED
from tests.nystrom.cases import COVERING, Case


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    shorten(monkeypatch, 64)
    monkeypatch.setattr(configs, "SERIAL_TOKENS", 50)
    monkeypatch.setattr(configs, "PROGRAMS", 2)


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    report = flashmark.check(op, **case.arguments(dtype), return_state=True)
    assert report.ok, f"\n{report}"


def is_small(case: Case) -> bool:
    """True for cases that interpret in a second or two; the others repeat what these show."""
    return case.n < 300 and case.marks <= 128 or case.packed and case.group == 1


SMALL = [case for case in COVERING if is_small(case)] + [
    Case(90, 128, group=2, dim=32, v_dim=8),
    Case(140, 13, group=4, decay=3.0),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_float32_against_float64(case):
    check(case)


HALF = [
    Case(65, 13, group=4, decay=0.1),
    Case(200, 8, state=True),
    Case(100, 64, v_dim=24, padding=(3, 5)),
    Case(65, 8, normalize="mass", decay=0.1),
    Case(12, 8, state=True),
    Case(60, 8, is_causal=False, kv_len=90, group=2),
    Case(70, 8, spread=30.0),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision_is_as_good_as_plain_pytorch(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(200, 40, group=2, state=True),
        Case(200, 40, decay=0.1, padding=(3, 70)),
        Case(495, 40, normalize="mass", packed=True),
    ],
    ids=str,
)
def test_slots_that_are_one_chunk(monkeypatch, case):
    """The form of up to 64 landmarks and columns in bfloat16, on a GPU."""
    shorten(monkeypatch, 128)
    check(case, torch.bfloat16)


STEEP = [
    Case(70, 8, spread=30.0),
    Case(130, 4, spread=300.0, group=2, state=True),
    Case(140, 8, spread=300.0, decay=0.1),
    Case(140, 8, spread=2000.0, decay=0.1, padding=(3, 3)),
    Case(80, 8, spread=100.0, normalize="mass"),
    Case(60, 8, spread=2000.0, is_causal=False, state=True),
]


@pytest.mark.parametrize("case", STEEP, ids=str)
def test_scores_up_to_ten_thousand(case):
    """Within 2 eps max|score|: an exponent is no better than its rounding."""
    check(case)


@pytest.mark.parametrize("decay", [3.0, 8.0])
def test_decay_of_many_nats_a_token(decay):
    """Pieces keep the times of a chunk small: no slack for them."""
    check(Case(60, 8, group=2, decay=decay))


WIDE = [
    Case(20, 4, dim=1, v_dim=1, given_core=True),
    Case(20, 128, dim=256, v_dim=256),
    Case(40, 5, dim=200, v_dim=150, group=2, state=True, decay=0.1),
    Case(20, 70, dim=17, v_dim=33, normalize="mass"),
    Case(18, 6, normalize="mass", state=True, v_dim=140),
    Case(70, 5, dim=16, v_dim=140),
    Case(40, 5, dim=200, v_dim=150, is_causal=False, kv_len=30, state=True),
]


@pytest.mark.parametrize("case", WIDE, ids=lambda c: f"M{c.marks}-D{c.dim}-Dv{c.v_dim}")
def test_widths_from_1_to_256(case):
    check(case)


def test_a_rise_inside_a_chunk_and_back():
    """Stretches that are cut into pieces alternate with whole ones, within one head only."""
    arguments = Case(100, 4, kv_heads=2, batch=2).arguments()
    key = arguments["key"].detach().clone()
    key[0, 1, 50:53] *= 200.0
    key[1, 0, 99] *= 1000.0
    report = flashmark.check(op, **(arguments | {"key": key.requires_grad_()}), return_state=True)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize(
    "case",
    [
        Case(80, 8, group=2, state=True),
        Case(80, 5, decay=0.1, padding=(40, 3)),
        Case(40, 8, normalize="mass", decay=0.05),
    ],
    ids=str,
)
@pytest.mark.parametrize("rise", [2.0, -1.0], ids=["a-few-pieces", "many-pieces"])
def test_pieces_agree_with_whole_chunks(monkeypatch, case, rise):
    if not INTERPRETED:
        pytest.skip("a compiled kernel keeps its threshold")

    def run():
        arguments = case.arguments()
        out, state = op(**arguments, return_state=True)
        leaves = [arguments[x] for x in ("query", "key", "value", "landmarks")]
        leaves += arguments.get("state", ())
        loss = (out * helpers.randn(*out.shape, seed=3)).sum() + state.R.sum()
        return out.detach(), *state, *torch.autograd.grad(loss, leaves)

    fast = run()
    monkeypatch.setattr(chunks, "RISE", tl.constexpr(rise))
    exact = run()
    assert not torch.equal(fast[0], exact[0]), "no chunk was cut"
    for actual, wanted in zip(exact, fast, strict=True):
        helpers.assert_close(actual, wanted, 2e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale):
    arguments = Case(80, 8, given_core=scale <= 0).arguments() | {"scale": scale}
    report = flashmark.check(op, **arguments)
    assert report.ok, f"\n{report}"


def test_gradients_repeat_to_the_bit():
    def gradients():
        arguments = Case(140, 8, group=2, batch=2, decay=0.05, state=True).arguments()
        out = op(**arguments)
        leaves = [arguments[x] for x in ("query", "key", "value", "landmarks", "decay")]
        return torch.autograd.grad(out.square().sum(), [*leaves, *arguments["state"]])

    for one, two in zip(gradients(), gradients(), strict=True):
        helpers.assert_identical(one, two)


@pytest.mark.parametrize("normalize", ["landmark", "mass"])
def test_rows_that_see_no_key_are_zero_and_have_no_gradient(normalize):
    arguments = Case(90, 8, padding=(70, 0), normalize=normalize).arguments()
    out = op(**arguments)
    assert not out[:, :, :70].any()
    out.sum().backward()
    for name in ("query", "key", "value"):
        assert not arguments[name].grad[:, :, :70].any(), name


def test_hidden_keys_and_values_may_hold_anything():
    def run(poison):
        arguments = Case(100, 8, padding=(9, 40), state=True, decay=0.1).arguments()
        hidden = ~arguments["key_mask"][:, None, :, None]
        for name in ("key", "value"):
            x = arguments[name].detach().masked_fill(hidden, poison)
            arguments[name] = x.requires_grad_()
        out = op(**arguments)
        leaves = [arguments[x] for x in ("query", "key", "value", "landmarks", "decay")]
        return out.detach(), *torch.autograd.grad(out.sum(), leaves)

    for actual, wanted in zip(run(torch.nan), run(0.0), strict=True):
        helpers.assert_identical(actual, wanted)


def test_a_constant_value_comes_back():
    arguments = Case(100, 13, group=2).arguments()
    value = torch.full_like(arguments["value"], 3.0)
    out = op(**(arguments | {"value": value}))
    helpers.assert_close(out, torch.full_like(out, 3.0), 1e-5)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_no_token_leaves_the_state_as_it_is(is_causal):
    case = Case(4, 8, state=True, decay=0.1 * is_causal, is_causal=is_causal)
    arguments = case.arguments()
    for name in ("query", "key", "value"):
        arguments[name] = arguments[name][:, :, :0]
    out, state = op(**arguments, return_state=True)
    assert out.shape == (1, 1, 0, 16)
    helpers.assert_close(state.L, arguments["state"][0], 1e-6)
    helpers.assert_close(state.R, arguments["state"][1], 1e-6)
    (state.L.sum() + state.R.sum()).backward()
    helpers.assert_close(arguments["state"][1].grad, torch.ones_like(state.R), 1e-6)
