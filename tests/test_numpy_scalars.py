"""Numbers and truth values of NumPy mean what Python's mean."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashmark import (
    block_sparse_attention,
    block_topk_attention,
    generation,
    hybrid_attention,
    masks,
    models,
    nn,
    nystrom_attention,
    variants,
)
from tests import helpers

np = pytest.importorskip("numpy")
LANDMARKS = helpers.randn(2, 4, 16)


def window(n):
    def attend(*inputs, **options):
        return block_sparse_attention(*inputs, masks.causal() & masks.sliding_window(n), **options)

    return attend


def with_landmarks(op):
    return lambda *inputs, **options: op(*inputs, LANDMARKS, **options)


CALLS = {
    "is_causal-true": (with_landmarks(nystrom_attention), {"is_causal": np.bool_(True)}),
    "is_causal-false": (with_landmarks(nystrom_attention), {"is_causal": np.bool_(False)}),
    "window-of-hybrid": (with_landmarks(hybrid_attention), {"window": np.int64(4)}),
    "window-of-a-mask": (window(np.int32(5)), {"scale": np.float32(0.5)}),
    "deterministic": (block_sparse_attention, {"deterministic": np.bool_(True)}),
    "segment": (variants.segment_attention, {"segment": np.int64(4)}),
    "first": (variants.first_k_attention, {"first": np.int16(6), "num_landmarks": np.int64(2)}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_scalar_of_numpy_is_one_of_python(name):
    op, options = CALLS[name]
    inputs = helpers.qkv(1, 2, 24, 16, grad=False)
    plain = {key: x.item() for key, x in options.items()}
    helpers.assert_identical(op(*inputs, **options), op(*inputs, **plain))


@pytest.mark.parametrize("value", ["yes", 1, None, np.int64(1)], ids=repr)
def test_is_causal_is_a_truth_value(value):
    with pytest.raises(TypeError, match="is_causal: expected a bool, got "):
        nystrom_attention(*helpers.qkv(1, 2, 8, 16), LANDMARKS, is_causal=value)


@pytest.mark.parametrize("value", ["no", 1, 0.0, np.int64(1)], ids=repr)
def test_deterministic_is_a_truth_value(value):
    query, key, value_ = helpers.qkv(1, 2, 8, 16)
    chosen = torch.full((1, 2, 8, 1), -1)
    for call in (
        lambda: block_sparse_attention(query, key, value_, deterministic=value),
        lambda: block_topk_attention(query, key, value_, chosen, deterministic=value),
    ):
        with pytest.raises(TypeError, match="deterministic: expected a bool, got "):
            call()


SMALL = models.DecoderConfig(vocab_size=20, width=32, layers=1, heads=4)


def model_of(config: models.DecoderConfig) -> models.Decoder:
    torch.manual_seed(0)
    return models.Decoder(config).eval()


def new_tokens(way, **sizes):
    ids = torch.arange(6).view(2, 3)
    models_needed = [model_of(SMALL)] * (2 if way is generation.generate_assisted else 1)
    return way(*models_needed, ids, **sizes)


def cropped(length, rollback):
    model = model_of(dataclasses.replace(SMALL, attention="nystrom", landmarks=3))
    cache = model.init_cache(2, 8, rollback=rollback)
    with torch.no_grad():
        model(torch.arange(6).view(2, 3), cache=cache)
    cache.crop(length)
    return cache.length


def of_module(kind, *sizes, **options):
    torch.manual_seed(0)
    module = kind(*sizes, **options).eval()
    with torch.no_grad():
        return module(helpers.randn(2, 9, 32))


SIZES = {
    "dropout_seed": lambda n: block_sparse_attention(
        *helpers.qkv(1, 2, 8, 16, grad=False), dropout_p=0.5, dropout_seed=n(7)
    ),
    "exact": lambda n: of_module(nn.BlockSparseAttention, n(32), n(4), num_kv_heads=n(2)),
    "rotary": lambda n: of_module(
        nn.BlockSparseAttention, 32, 4, head_dim=n(8), rotary=n(100), rotary_dim=n(4)
    ),
    "nystrom": lambda n: of_module(nn.NystromAttention, n(32), n(4), n(5)),
    "hybrid": lambda n: of_module(nn.HybridAttention, n(32), n(4), n(5), window=n(4)),
    "routed": lambda n: of_module(
        nn.RoutedAttention, n(32), n(4), n(2), block_size=n(3), top_k=n(1), near=n(0)
    ),
    "decoder": lambda n: model_of(
        models.DecoderConfig(vocab_size=n(20), width=n(32), layers=n(1), heads=n(4))
    )(torch.arange(6).view(2, 3)).detach(),
    "cache": lambda n: nn.BlockSparseAttention(32, 4).init_cache(n(2), n(5)).key,
    "routed-cache": lambda n: nn.RoutedAttention(32, 4).init_cache(n(2), n(5)).key,
    "crop": lambda n: cropped(n(2), n(2)),
    "generate": lambda n: new_tokens(
        generation.generate, max_new_tokens=n(3), chunk=n(2), temperature=n(1), top_k=n(1),
        end_token=n(3), padding_token=n(0),
    ),
    "beams": lambda n: new_tokens(
        generation.beam_search, max_new_tokens=n(3), beams=n(2), length_penalty=n(1)
    ).tokens,
    "draft": lambda n: new_tokens(generation.generate_assisted, max_new_tokens=n(3), ahead=n(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_numpy(name):
    helpers.assert_identical(SIZES[name](np.int64), SIZES[name](int))


def test_sizes_are_kept_as_those_of_python():
    module = nn.HybridAttention(np.int64(32), np.int64(4), np.int64(5), window=np.int32(4))
    assert type(module.window) is type(module.embed_dim) is type(module.head_dim) is int
