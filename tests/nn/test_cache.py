"""Caches of the modules: any cutting of the tokens into calls gives what one call gives."""

from __future__ import annotations

import pytest
import torch

from flashmark import masks
from flashmark.nn import (
    BlockSparseAttention,
    HybridAttention,
    NystromAttention,
    RoutedAttention,
)
from tests import helpers

N, WIDTH = 37, 32

MODULES = {
    "exact": lambda: BlockSparseAttention(WIDTH, 4, num_kv_heads=2, rotary=10_000.0),
    "exact-window": lambda: BlockSparseAttention(
        WIDTH, 4, mask=masks.causal() & masks.sliding_window(9), rotary=100.0, rotary_dim=4
    ),
    "exact-sinks-softcap": lambda: BlockSparseAttention(
        WIDTH, 4, mask=masks.causal() & (masks.sliding_window(5) | masks.prefix(2)), sinks=True,
        softcap=5.0, bias=True,
    ),
    "nystrom": lambda: NystromAttention(WIDTH, 4, 6, num_kv_heads=2),
    "nystrom-decay": lambda: NystromAttention(WIDTH, 4, 6, decay=True, bias=True),
    "slots": lambda: HybridAttention(WIDTH, 4, 4, window=5, num_kv_heads=2, rotary=10_000.0),
    "mass": lambda: HybridAttention(WIDTH, 4, 4, window=5, merge="mass", rotary=10_000.0),
    "gate": lambda: HybridAttention(WIDTH, 4, 4, window=5, merge="gate", rotary=10_000.0),
    "routed": lambda: RoutedAttention(
        WIDTH, 4, 3, num_kv_heads=2, block_size=4, top_k=2, rotary=10_000.0
    ),
    "routed-mean": lambda: RoutedAttention(
        WIDTH, 4, block_size=5, top_k=1, near=0, sinks=True, softcap=5.0, bias=True
    ),
}  # fmt: skip


@pytest.fixture(params=MODULES)
def module(request):
    return made(request.param)


def made(name):
    module = MODULES[name]().eval().requires_grad_(False)
    if getattr(module, "sinks", None) is not None:
        module.sinks.copy_(torch.linspace(-1, 1, 4))
    return module


def cut(module, x, sizes, key_mask=None, max_length=N):
    cache = module.init_cache(x.shape[0], max_length)
    mask = [None] * len(sizes) if key_mask is None else key_mask.split(sizes, 1)
    calls = zip(x.split(sizes, 1), mask, strict=True)
    return torch.cat([module(part, key_mask=m, cache=cache) for part, m in calls], 1), cache


@pytest.mark.parametrize("sizes", [[1] * N, [N], [20, 1, 1, 15], [0, 36, 1]], ids=str)
def test_any_cut_gives_what_one_call_gives(module, sizes):
    x = helpers.randn(2, N, WIDTH)
    out, cache = cut(module, x, sizes)
    helpers.assert_close(out, module(x), 1e-5)
    assert cache.length.tolist() == [N, N]


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padded_prompts_of_different_lengths_then_tokens(module, padding):
    x = helpers.randn(3, N, WIDTH)
    key_mask = torch.ones(3, N, dtype=torch.bool)
    key_mask[1, :7] = key_mask[2, :19] = False
    if padding == "right":
        key_mask[:, :20] = key_mask[:, :20].flip(1)
    if padding == "holes":
        key_mask[0, 3:20:3] = False
    out, cache = cut(module, x, [20] + [1] * (N - 20), key_mask)
    helpers.assert_close(out, module(x, key_mask=key_mask), 1e-5)
    assert cache.length.tolist() == key_mask.sum(1).tolist()
    assert not out[~key_mask].any()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_padding_is_as_if_it_were_not_there(name, padding):
    module = made(name)
    x = helpers.randn(2, N, WIDTH)
    key_mask = torch.ones(2, N, dtype=torch.bool)
    key_mask[
        0, {"left": slice(0, 6), "right": slice(24, 30), "holes": slice(4, 28, 3)}[padding]
    ] = 0
    short = x[:1, key_mask[0]]
    padded = x.masked_fill(~key_mask[..., None], float("nan"))
    for out in (
        module(padded, key_mask=key_mask),
        cut(module, padded, [30] + [1] * (N - 30), key_mask)[0],
    ):
        helpers.assert_close(out[:1, key_mask[0]], module(short), 1e-5)
        helpers.assert_close(out[1:], module(x[1:]), 1e-5)


@pytest.mark.parametrize("name", ["slots", "mass", "gate"])
def test_rotary_in_the_hybrid_depends_on_distances_only(name):
    module, x = made(name), helpers.randn(2, N, WIDTH)
    moved = module.init_cache(2, N)
    moved.length += 1000
    helpers.assert_close(module(x, cache=moved), module(x), 1e-4)


@pytest.mark.parametrize("name", ["exact-window", "routed", "routed-mean"])
def test_a_sample_at_the_end_of_the_cache_beside_one_at_its_beginning(name):
    module, x = made(name), helpers.randn(2, 12, WIDTH)
    key_mask = torch.zeros(2, 12, dtype=torch.bool)
    key_mask[0, :3] = key_mask[1, 8:] = key_mask[0, 3:10] = True  # 10 and 4 tokens
    cache = module.init_cache(2, 12)
    first = module(x, key_mask=key_mask, cache=cache)
    more = helpers.randn(2, 8, WIDTH, seed=5)
    more_mask = torch.zeros(2, 8, dtype=torch.bool)
    more_mask[0, 4:6] = more_mask[1] = True  # 12 and 12 in the end
    second = module(more, key_mask=more_mask, cache=cache)
    whole = module(torch.cat([x, more], 1), key_mask=torch.cat([key_mask, more_mask], 1))
    helpers.assert_close(torch.cat([first, second], 1), whole, 1e-5)
    assert cache.length.tolist() == [12, 12]


@pytest.mark.parametrize("name", ["exact", "routed"])
def test_a_cache_may_have_another_dtype(name):
    module, x = made(name), helpers.randn(2, N, WIDTH)
    cache = module.init_cache(2, N, dtype=torch.bfloat16)
    out = module(x, cache=cache)
    assert out.dtype == torch.float32 and cache.key.dtype == torch.bfloat16
    helpers.assert_close(out, module(x), 2e-2)


@pytest.mark.parametrize(
    ("name", "call", "error", "words"),
    [
        ("exact", lambda m, x: m(x, cache=m.init_cache(2, 9)), ValueError, "at most 9 tokens"),
        ("exact", lambda m, x: twice(m, x), ValueError, "expected room for 74 tokens"),
        ("exact", lambda m, x: m(x, cache=m.init_cache(3, N)), ValueError, "a batch of 2"),
        ("exact", lambda m, x: m(x, cache=[]), TypeError, "KeyValueCache"),
        ("nystrom", lambda m, x: m(x, cache=m.init_cache(3, N)), ValueError, "a batch of 2"),
        ("routed", lambda m, x: twice(m, x), ValueError, "expected room for 74 tokens"),
        ("exact", lambda m, x: m(x, cache=made("routed").init_cache(2, N)), TypeError, "Routed"),
        ("routed", lambda m, x: m(x, cache=made("exact").init_cache(2, N)), TypeError, "Routed"),
        ("slots", lambda m, x: m(x, cache=[]), TypeError, "StateCache"),
    ],
    ids=["call-longer-than-cache", "full", "batch", "not-a-cache", "batch-of-state", "routed-full",
         "routed-for-exact", "exact-for-routed", "not-a-state"],
)  # fmt: skip
def test_a_cache_that_does_not_fit(name, call, error, words):
    with pytest.raises(error, match=words):
        call(made(name), helpers.randn(2, N, WIDTH))


def twice(module, x):
    cache = module.init_cache(2, N + 1)
    module(x, cache=cache)
    module(x, cache=cache)


def test_a_cache_refuses_gradients(module):
    with pytest.raises(ValueError, match="without gradients"):
        module(helpers.randn(1, 3, WIDTH, grad=True), cache=module.init_cache(1, 8))


@pytest.mark.parametrize("name", ["exact", "routed"])
@pytest.mark.parametrize("max_length", [0, None, 2.0])
def test_the_size_of_a_cache_of_keys(name, max_length):
    with pytest.raises((ValueError, TypeError), match="max_length: expected an int >= 1"):
        made(name).init_cache(1, max_length)


@pytest.mark.parametrize("batch", [-1, None, 2.0, True])
def test_the_batch_of_a_cache(module, batch):
    with pytest.raises((ValueError, TypeError), match="batch: expected an int >= 0"):
        module.init_cache(batch, 8)


def test_no_cache_without_causality():
    with pytest.raises(ValueError, match="is_causal=False"):
        BlockSparseAttention(WIDTH, 4, is_causal=False).init_cache(1, 8)
