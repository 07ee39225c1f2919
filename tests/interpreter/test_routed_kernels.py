"""Attention over chosen blocks in Triton agrees with its float64 definition."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import flashmark
from flashmark.kernels.routed import arguments, decode, forward
from flashmark.kernels.routed.lists import sort_choices
from tests.helpers import qkv
from tests.interpreter.routed_cases import Call, Case, check, run
from tests.interpreter.running import INTERPRETED

HALF, BFLOAT = torch.float16, torch.bfloat16
EITHER = (True, False)  # deterministic, or atomic

CASES = {
    # a tile holds several blocks, and a block several tiles
    "plain": (Case(), EITHER),
    "many-to-a-block": (Case(q_len=70, block=16, top_k=1, near=0, popular=True), EITHER),
    "half": (Case(dtype=HALF, dim=32), (True,)),
    "bfloat16": (Case(dtype=BFLOAT, dim=32), (True,)),
    "wide-values": (Case(dim=12, v_dim=24), (True,)),
    "heads-of-three": (Case(heads=6, kv_heads=2, q_len=27), EITHER),
    "two-samples": (Case(batch=2, heads=2, kv_heads=2, q_len=27), (True,)),
    "odd-block": (Case(block=5, top_k=3), (True,)),
    "block-of-one": (Case(q_len=21, block=1, top_k=5, near=2), (True,)),
    # several tiles of keys to a block, the last of them short
    "large-block": (Case(q_len=99, block=40, top_k=1, near=0), EITHER),
    "near-alone": (Case(near=2, top_k=0), (True,)),
    "block-of-all": (Case(block=64, near=0), (True,)),
    "softcap": (Case(softcap=1.5), (True,)),
    "negative-scale": (Case(scale=-0.4), (True,)),
    "no-scale": (Case(scale=0.0), (True,)),
    "sinks": (Case(sinks=True), (True,)),
    "mask": (Case(masked=0.4, sinks=True), EITHER),
    "masked-whole": (Case(masked=0.95), (True,)),
    "packed": (Case(bounds=(0, 3, 4, 23, 40)), EITHER),
    "packed-mask": (Case(bounds=(0, 17, 17, 40), masked=0.3, near=0), (True,)),
    "later-queries": (Case(q_len=24, kv_len=45), (True,)),
    "more-queries-than-keys": (Case(q_len=37, kv_len=20, sinks=True), (True,)),
    "offsets": (
        Case(batch=2, q_len=18, kv_len=48, query_offset=(30, 11), kv_lengths=(48, 29)),
        EITHER,
    ),
    "lengths": (Case(batch=2, kv_lengths=(40, 13)), (True,)),
    "gaps": (Case(layout="gaps"), (True,)),
    "bnhd": (Case(layout="bnhd", heads=4, kv_heads=2, q_len=25), (True,)),
    "no-lse-gradient": (Case(lse_gradient=False, q_len=25), (True,)),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, device):
    case, modes = CASES[name]
    check(case, device, modes=modes)


DECODE = {
    "one-token": Case(q_len=1, kv_len=50, heads=4, top_k=3, sinks=True),
    "many-heads": Case(q_len=1, kv_len=18, heads=70, top_k=1),
    "half": Case(q_len=1, kv_len=50, heads=4, dtype=HALF, dim=32),
    "several": Case(
        batch=2, q_len=3, kv_len=48, kv_heads=2, query_offset=(37, 11), kv_lengths=(40, 14)
    ),
    "mask-softcap": Case(q_len=2, kv_len=50, masked=0.5, softcap=2.0),
    "large-block": Case(q_len=1, kv_len=99, block=40, top_k=1, near=0),
    "packed": Case(q_len=12, block=4, top_k=1, near=0, bounds=(0, 1, 12)),
    "one-key": Case(q_len=1, kv_len=1),
    "no-key": Case(q_len=4, kv_len=2, sinks=True),
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", DECODE)
def test_decoding(name, splits, device, monkeypatch):
    monkeypatch.setattr(decode, "number_of_splits", lambda *_: splits)
    check(DECODE[name], device, modes=(True,))


def test_few_queries_are_decoded_and_many_are_not():
    described = [
        arguments.describe(Call(Case(q_len=n, kv_len=40), torch.device("cpu")).checked())
        for n in (16, 17)
    ]
    assert [decode.is_decode(x) for x in described] == [True, False]


@pytest.mark.parametrize("deterministic", EITHER)
def test_chunks_of_queries_change_no_result(deterministic, device, monkeypatch):
    """Partial results of a few queries at a time: 13 of 40, and 2 of them beyond the last."""
    call = Call(Case(sinks=True, bounds=(0, 11, 40)), device)
    whole = run(call, True)
    row = 2 * 2 * 16 * 4  # heads, choices, width, bytes
    monkeypatch.setattr(arguments, "PART_BYTES", 14 * row)
    described = arguments.describe(call.checked())
    assert [x.start for x in described.chunks(1, 16, 4)] == [0, 14, 28]
    found = run(call, deterministic)
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_a_deterministic_backward_repeats_bitwise(device):
    call = Call(Case(heads=4, kv_heads=2, popular=True), device)
    first, second = run(call), run(call)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["plain", "packed", "decode"])
def test_no_bit_depends_on_later_tokens(name, device):
    """Keys and queries after a position become NaN, values 1e30, choices other ones."""
    case = {
        "plain": Case(q_len=33),
        "packed": Case(q_len=33, bounds=(0, 7, 33)),
        "decode": Case(q_len=12, block=2),
    }[name]
    call = Call(case, device)
    clean = forward(call.checked())
    for last in (0, case.q_len // 2, case.q_len - 2):
        changed = Call(case, device)
        changed.query[:, :, last + 1 :] = math.nan
        changed.key[:, :, last + 1 :] = math.nan
        changed.value[:, :, last + 1 :] = 1e30
        changed.indices[:, :, last + 1 :] = 0
        found = forward(changed.checked())
        assert torch.equal(found.out[:, :, : last + 1], clean.out[:, :, : last + 1]), last
        assert torch.equal(found.lse[:, :, : last + 1], clean.lse[:, :, : last + 1]), last


def test_gradients_into_the_future_are_zero(device):
    call = Call(Case(lse_gradient=False), device)
    call.dout[:, :, 20:] = 0.0
    found = run(call)
    for name in ("d query", "d key", "d value"):
        assert not found[name][:, :, 20:].any(), name
        assert found[name][:, :, :20].any(), name


def test_choices_are_sorted_by_block_and_then_by_query(device):
    call = Call(Case(q_len=30, top_k=3, near=0), device)
    described = arguments.describe(call.checked())
    (lists,) = sort_choices(call.indices, described, [described.sizes])
    own = torch.arange(30, device=device)[:, None] // 8
    chosen = call.indices[0, 0]
    expected = torch.where((chosen >= 0) & (chosen < own), chosen * 8, 2**31 - 1).flatten()
    assert torch.equal(lists.tokens[0].long(), expected.long())
    assert torch.equal(lists.ordered[0], lists.tokens[0].sort(stable=True).values)
    assert torch.equal(lists.tokens[0][lists.order[0]], lists.ordered[0])
    same = lists.ordered[0].diff() == 0
    assert (lists.order[0].diff()[same] > 0).all()


@pytest.mark.skipif(not INTERPRETED, reason="the public functions take CPU tensors as such")
def test_public_functions_on_the_triton_backend():
    """The choice, the attention, and that neither depends on later tokens."""
    query, key, value = qkv(1, 2, 26, 16, kv_heads=1, grad=False)
    options = {"block_size": 4, "top_k": 2, "backend": "triton"}
    report = flashmark.check(flashmark.routed_attention, query, key, value, **options)
    assert report.ok and report.rows[-1].name == "choice", str(report)
    attention = functools.partial(flashmark.routed_attention, **options)
    inputs = {"query": query, "key": key, "value": value}
    causality = flashmark.check_causality(attention, positions=[11], gradients=False, **inputs)
    assert causality.ok, str(causality)
