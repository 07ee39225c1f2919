"""The variants raise one sentence for bad input: argument, expected, got."""

from __future__ import annotations

import functools

import pytest
import torch

import flashmark
from flashmark import variants
from tests import helpers

SEGMENT = functools.partial(variants.segment_attention, segment=4)
FIRST = functools.partial(variants.first_k_attention, first=4)
CLASSIC = functools.partial(variants.nystromformer_attention, num_landmarks=4)


def tensors() -> dict[str, torch.Tensor]:
    names = "query", "key", "value"
    return dict(zip(names, helpers.qkv(2, 4, 10, 8, kv_heads=2, grad=False), strict=True))


EVERY = {
    "another-length": (
        ValueError, "key", {"key": torch.zeros(2, 2, 9, 8), "value": torch.zeros(2, 2, 9, 8)}),
    "heads-that-do-not-divide": (ValueError, "key", {"query": torch.zeros(2, 3, 10, 8)}),
    "another-dtype": (TypeError, "value", {"value": torch.zeros(2, 2, 10, 8).double()}),
    "not-a-tensor": (TypeError, "query", {"query": None}),
    "nan-scale": (ValueError, "scale", {"scale": float("nan")}),
    "key-mask-of-another-shape": (
        ValueError, "key_mask", {"key_mask": torch.ones(2, 9, dtype=torch.bool)}),
    "key-mask-of-numbers": (TypeError, "key_mask", {"key_mask": torch.ones(2, 10)}),
    "unknown-backend": (ValueError, "backend", {"backend": "cuda"}),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "op", [SEGMENT, FIRST, CLASSIC], ids=["segment", "first-k", "nystromformer"]
)
def test_what_all_refuse(op, name):
    error, argument, changes = EVERY[name]
    with pytest.raises(error, match=f"^{argument}: expected .*, got "):
        op(**tensors() | changes)


OWN = {
    "segment-zero": (ValueError, "segment", SEGMENT, {"segment": 0}),
    "segment-a-float": (TypeError, "segment", SEGMENT, {"segment": 4.0}),
    "jitter-zero": (ValueError, "jitter", SEGMENT, {"jitter": 0.0}),
    "first-zero": (ValueError, "first", FIRST, {"first": 0}),
    "first-a-bool": (TypeError, "first", FIRST, {"first": True}),
    "more-landmarks-than-tokens": (ValueError, "num_landmarks", FIRST, {"num_landmarks": 5}),
    "too-many-landmarks": (ValueError, "num_landmarks", FIRST, {"first": 300}),
    "unknown-normalisation": (ValueError, "normalize", FIRST, {"normalize": "rows"}),
    "no-landmarks": (ValueError, "num_landmarks", CLASSIC, {"num_landmarks": 0}),
    "unknown-inverse": (ValueError, "inverse", CLASSIC, {"inverse": "pinv"}),
    "no-iterations": (ValueError, "iterations", CLASSIC, {"iterations": 0}),
    "even-taps": (ValueError, "conv_weight", CLASSIC, {"conv_weight": torch.zeros(2, 4)}),
    "taps-of-query-heads": (ValueError, "conv_weight", CLASSIC, {"conv_weight": torch.zeros(4, 3)}),
    "taps-a-number": (TypeError, "conv_weight", CLASSIC, {"conv_weight": 3}),
}


@pytest.mark.parametrize("name", OWN)
def test_what_each_refuses(name):
    error, argument, op, changes = OWN[name]
    with pytest.raises(error, match=f"^{argument}: expected .*, got "):
        op(**tensors() | changes)


def test_sequence_to_sequence_wants_three_tensors_a_side():
    three, landmarks = tuple(tensors().values()), flashmark.init_landmarks(2, 4, 8)
    for source, target, name in ((three[:2], three, "source"), (three, three[0], "target")):
        with pytest.raises(TypeError, match=f"^{name}: expected .*, got "):
            variants.sequence_to_sequence_attention(source, target, landmarks)
