"""Other people's attention, as far as it can be held to its interface without a GPU."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from bench.oracle import Oracle
from bench.patterns import PATTERNS
from bench.peers import Unavailable, Work, flash_sparse

CPU = torch.device("cpu")


def work(name: str, n: int = 700) -> Work:
    return Work(PATTERNS[name](n, CPU), 1, 2, n, 16, torch.float32, CPU, backward=True)


@pytest.mark.parametrize("name", PATTERNS)
def test_what_a_pattern_says_of_first_and_last_keys_is_its_formula(name):
    n = 700
    pattern = PATTERNS[name](n, CPU)
    if pattern.near is None:
        return
    sink, size = pattern.near
    i, j = torch.arange(n)[:, None], torch.arange(n)
    zero = torch.zeros((), dtype=torch.long)
    expected = (j <= i) & ((j > i - size) | (j < sink))
    assert torch.equal(pattern.formula(zero, zero, i, j).expand(n, n), expected)


def dense_attention(query, key, value, is_causal=False, window_sizes=None):
    """Attention (B, N, H, D) with flash-sparse-attn's documented mask: for each head a number of
    first keys, a band further left, a gap, the window."""
    n = query.shape[1]
    back = torch.arange(n)[:, None] - torch.arange(n)
    seen = back >= 0
    if window_sizes is not None:
        assert window_sizes.shape == (key.shape[2], 4) and window_sizes.dtype == torch.int32
        sink, left, gap, near = window_sizes[0].tolist()
        band = (back >= near + gap) & (back < near + gap + left)
        seen = seen & ((back < near) | band | (torch.arange(n) < sink))
    assert is_causal
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


@pytest.mark.parametrize("name", ["causal", "window", "sink_window"])
def test_flash_sparse_attn_is_given_the_same_attention(name, monkeypatch):
    module = types.ModuleType("flash_sparse_attn")
    module.flash_dense_attn_func = dense_attention
    monkeypatch.setitem(sys.modules, "flash_sparse_attn", module)
    attention = flash_sparse().prepare(work(name))
    errors = Oracle(work(name)).errors(attention)
    assert all(error <= allowed for error, allowed in errors.values())


def test_flash_sparse_attn_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_sparse_attn", None)
    with pytest.raises(Unavailable, match="flash_sparse_attn"):
        flash_sparse().prepare(work("window"))
    with pytest.raises(Unavailable, match="windows and first keys"):
        flash_sparse().prepare(work("documents"))
