"""Decoding through the Triton kernels: few queries against a long preallocated cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashmark import masks
from flashmark.kernels.block_sparse import decode
from tests.helpers import assert_close
from tests.interpreter.attention_cases import Call, Case

CACHE = 300

CASES = {
    "one-query": Case(mask=masks.causal(), batch=2, query_offset=(13, 299), kv_lengths=(14, 300)),
    "no-mask": Case(kv_lengths=(40, 299), batch=2, query_offset=(0, 5)),
    "grouped-heads": Case(mask=masks.causal(), heads=6, kv_heads=2, query_offset=(250,)),
    "several-queries": Case(mask=masks.causal(), q_len=5, query_offset=(201,), kv_heads=1),
    "across-two-blocks": Case(mask=masks.sliding_window(70), q_len=7, query_offset=(61,)),
    "sixteen-queries": Case(mask=masks.sliding_window(100), q_len=16, query_offset=(170,)),
    "full-rows": Case(
        mask=masks.causal() & masks.dilated(2), q_len=3, block=64, query_offset=(280,)
    ),
    "one-block": Case(mask=masks.sliding_window(3), query_offset=(290,), kv_heads=1),
    "nothing-visible": Case(mask=masks.sliding_window(9), query_offset=(200,), kv_lengths=(100,)),
    "relative-bias": Case(
        mask=masks.causal(), q_len=2, kv_heads=1, bias=(2, 599), query_offset=(255,), batch=2
    ),
    "dense-bias": Case(mask=masks.causal(), q_len=2, bias=(1, 2, 2, 300), query_offset=(255,)),
    "sinks": Case(mask=masks.causal(), kv_heads=1, sinks=True, query_offset=(100,)),
    "sinks-and-nothing-visible": Case(
        mask=masks.causal(), sinks=True, query_offset=(100,), kv_lengths=(0,)
    ),
    "softcap-and-dropout": Case(
        mask=masks.causal(), q_len=4, kv_heads=1, softcap=2.0, dropout_p=0.3, query_offset=(200,)
    ),
    "mask-per-head": Case(
        mask=masks.dense(
            torch.rand(1, 4, 300, 300, generator=torch.Generator().manual_seed(0)) < 0.2
        ),
        heads=4,
        kv_heads=2,
        q_len=2,
        query_offset=(150,),
    ),
    "tiles-apart": Case(
        mask=masks.dense(torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) < 0.004),
        q_len=2,
        query_offset=(150,),
    ),
    "head-dimensions": Case(mask=masks.causal(), dim=72, v_dim=40, query_offset=(150,)),
    "strides": Case(mask=masks.causal(), layout="bnhd", kv_heads=1, query_offset=(150,), batch=2),
    "bfloat16": Case(mask=masks.causal(), dtype=torch.bfloat16, query_offset=(150,)),
    "float16": Case(mask=masks.sliding_window(80), dtype=torch.float16, query_offset=(150,)),
}


def decoding(case: Case, device: torch.device) -> Call:
    q_len = 1 if case.q_len == Case().q_len else case.q_len
    return Call(dataclasses.replace(case, q_len=q_len, kv_len=CACHE, rows=CACHE), device)


@pytest.mark.parametrize("name", CASES)
def test_decode(name, device):
    call = decoding(CASES[name], device)
    expected = call.reference()
    budget = call.budget(expected)
    out, lse = call.forward()
    assert_close(out, expected["out"], budget["out"], "out")
    assert_close(lse, expected["lse"], budget["lse"], "lse")


@pytest.mark.parametrize("splits", [1, 2, 20])
@pytest.mark.parametrize("name", ["several-queries", "sixteen-queries", "tiles-apart"])
def test_any_number_of_splits_gives_the_same(name, splits, device, monkeypatch):
    call = decoding(CASES[name], device)
    expected = call.reference()
    monkeypatch.setattr(decode, "number_of_splits", lambda *_: splits)
    out, lse = call.forward()
    assert_close(out, expected["out"], 1e-5)
    assert_close(lse, expected["lse"], 1e-5)


def test_backward_after_decoding(device):
    """The gradient of a few queries against many keys goes through the general kernels."""
    call = decoding(CASES["several-queries"], device)
    expected = call.reference()
    out, lse = call.forward()
    for deterministic in (True, False):
        for name, grad in call.backward(out, lse, deterministic).items():
            assert_close(grad, expected[name], 5e-5, name)
