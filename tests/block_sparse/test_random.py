"""block_sparse_attention on random masks, shapes and features against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmark
from tests import helpers
from tests.masks.strategies import random_masks


@st.composite
def calls(draw):
    """(case, tensors, options, compile the mask beforehand?)"""
    case = draw(random_masks(max_leaves=3))
    batch, heads, q_len, kv_len = case.batch, case.heads, case.q_len, case.kv_len
    group = draw(st.sampled_from([g for g in (1, 2, 3) if heads % g == 0]))
    dim, v_dim = draw(st.sampled_from([(8, 8), (1, 3), (24, 17), (33, 64)]))
    layout = draw(st.sampled_from(["contiguous", "bnhd", "gaps"]))
    seed = draw(st.integers(0, 1000))
    q, k, v = helpers.qkv(
        batch,
        heads,
        q_len,
        dim,
        kv_heads=heads // group,
        kv_len=kv_len,
        v_dim=v_dim,
        layout=layout,
        seed=seed,
    )
    tensors, options = {"query": q, "key": k, "value": v}, {}
    bias = draw(st.sampled_from([None, "relative", "dense"]))
    if bias == "relative":
        tensors["bias"] = helpers.randn(heads, q_len + kv_len - 1, seed=seed, grad=True)
    if bias == "dense":
        shape = [n if draw(st.booleans()) else 1 for n in (batch, heads, q_len, kv_len)]
        tensors["bias"] = helpers.randn(*shape, seed=seed, grad=True)
    if draw(st.integers(0, 3)) == 0:
        tensors["sinks"] = helpers.randn(heads, seed=seed, grad=True)
    if draw(st.integers(0, 3)) == 0:
        tensors["kv_lengths"] = torch.tensor(
            [draw(st.integers(0, kv_len)) for _ in range(batch)], dtype=torch.int32
        )
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([0.5, 3.0, 50.0]))
    if draw(st.integers(0, 3)) == 0:
        options |= {"dropout_p": 0.3, "dropout_seed": seed}
    options["deterministic"] = draw(st.booleans())
    return case, tensors, options


@pytest.mark.parametrize("backend", helpers.BACKENDS)
@settings(max_examples=100)
@given(call=calls())
def test_random_calls(backend, call):
    case, tensors, options = call
    expected = helpers.outputs_and_grads(
        flashmark.reference.block_sparse_attention,
        helpers.upcast(tensors),
        mask=case.expected(),
        **options,
    )
    actual = helpers.outputs_and_grads(
        flashmark.block_sparse_attention,
        tensors,
        mask=case.compile(),
        backend=backend,
        **options,
    )
    gradients = [
        value.abs().max().item() for name, value in expected.items() if name.startswith("d ")
    ]
    for name, value in expected.items():
        if name.startswith("d "):
            # a gradient that cancels to nothing is measured against the others
            error = (actual[name].double() - value).abs().max().item()
            assert error <= 5e-5 * max(value.abs().max().item(), 1e-2 * max(gradients)), name
        else:
            helpers.assert_close(actual[name], value, 1e-5, name)
