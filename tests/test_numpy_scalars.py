"""Numbers and truth values of NumPy mean what Python's mean."""

from __future__ import annotations

import pytest

from flashmark import (
    block_sparse_attention,
    hybrid_attention,
    masks,
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
