"""A bias so low that float32 holds no score beside it gives means, finite lse, exact gradients."""

from __future__ import annotations

import pytest
import torch

import flashmark
from tests import helpers
from tests.block_sparse.test_large_biases import check, definition

LOWS = {"-1e9": -1e9, "finfo.min": torch.finfo(torch.float32).min}


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("deterministic", [True, False], ids=["two-passes", "one-pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_rows_under_one_low_bias_are_means(low, deterministic, dtype, device):
    leaves = [
        x.detach().to(device).requires_grad_() for x in helpers.qkv(1, 2, 70, 16, dtype=dtype)
    ]
    bias = torch.zeros(1, 1, 70, 70, device=device)
    bias[:, :, -1] = LOWS[low]
    check(
        lambda *x: flashmark.block_sparse_attention(
            *x, bias=bias, return_lse=True, deterministic=deterministic, backend="triton"
        ),
        leaves, lambda *x: definition(*x, bias), 2e-3 if dtype == torch.float32 else 2e-2, [69],
    )  # fmt: skip


@pytest.mark.parametrize("low", LOWS)
def test_decoding_beside_a_sink(low, device):
    """Keys are shared among programs, whose sums must not drown beside the bias."""
    leaves = [x.detach().to(device).requires_grad_() for x in helpers.qkv(1, 2, 3, 16, kv_len=600)]
    bias = torch.zeros(1, 1, 3, 600, device=device)
    bias[:, :, 1] = LOWS[low]
    sinks = torch.tensor([LOWS["finfo.min"], 0.5], device=device)
    check(
        lambda *x: flashmark.block_sparse_attention(
            *x, bias=bias, sinks=sinks, return_lse=True, backend="triton"
        ),
        leaves, lambda *x: definition(*x, bias, sinks=sinks.double()), 2e-3,
    )  # fmt: skip
