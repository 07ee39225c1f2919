"""Bad input raises one sentence that names the argument, the expected and the given."""

from __future__ import annotations

import pytest
import torch

import flashmark
from flashmark import RoutedState
from tests import helpers


def numbers(*shape: int) -> torch.Tensor:
    return helpers.randn(*shape)


def base(**changes) -> dict:
    """query (2, 4, 20, 8), key and value (2, 2, 20, 8), blocks of 4."""
    key, value = numbers(2, 2, 20, 8), numbers(2, 2, 20, 8)
    given = {"query": numbers(2, 4, 20, 8), "key": key, "value": value, "block_size": 4}
    return given | {"backend": "eager"} | changes


def cu(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def packed(bounds: torch.Tensor, **changes) -> dict:
    return base(query=numbers(1, 4, 20, 8), key=numbers(1, 2, 20, 8),
                value=numbers(1, 2, 20, 8), cu_seqlens=bounds) | changes  # fmt: skip


def state(batch=2, heads=2, marks=1, dim=8, blocks=2, **options) -> RoutedState:
    return RoutedState.empty(batch, heads, marks, dim, blocks=blocks, **options)


def chosen(*blocks: int, dtype=torch.int32) -> torch.Tensor:
    """A choice for the last query of every head, the same for all; none for the others."""
    indices = torch.full((2, 2, 20, len(blocks)), -1, dtype=dtype)
    indices[:, :, 19] = torch.tensor(blocks, dtype=dtype)
    return indices


ROUTED = {
    "block-size-0": (ValueError, "block_size", lambda: base(block_size=0)),
    "block-size-1025": (ValueError, "block_size", lambda: base(block_size=1025)),
    "block-size-a-float": (TypeError, "block_size", lambda: base(block_size=4.0)),
    "top-k-negative": (ValueError, "top_k", lambda: base(top_k=-1)),
    "top-k-a-bool": (TypeError, "top_k", lambda: base(top_k=True)),
    "near-negative": (ValueError, "near", lambda: base(near=-1)),
    "near-a-float": (TypeError, "near", lambda: base(near=1.0)),
    "no-landmarks": (ValueError, "landmarks", lambda: base(landmarks=numbers(2, 0, 8))),
    "257-landmarks": (ValueError, "landmarks", lambda: base(landmarks=numbers(2, 257, 8))),
    "landmarks-of-query-heads": (
        ValueError, "landmarks", lambda: base(landmarks=numbers(4, 3, 8))),
    "landmarks-of-another-batch": (
        ValueError, "landmarks", lambda: base(landmarks=numbers(3, 2, 3, 8))),
    "landmarks-a-pair": (TypeError, "landmarks", lambda: base(landmarks=(1, 2))),
    "integer-landmarks": (TypeError, "landmarks", lambda: base(landmarks=chosen(0)[..., 0])),
    "scores-and-landmarks": (
        ValueError, "scores",
        lambda: base(scores=numbers(2, 2, 20, 5), landmarks=numbers(2, 3, 8))),
    "scores-of-query-heads": (ValueError, "scores", lambda: base(scores=numbers(2, 4, 20, 5))),
    "scores-of-too-few-blocks": (ValueError, "scores", lambda: base(scores=numbers(2, 2, 20, 4))),
    "integer-scores": (
        TypeError, "scores", lambda: base(scores=torch.zeros(2, 2, 20, 5, dtype=torch.int32))),
    "mixed-dtypes": (TypeError, "key", lambda: base(key=numbers(2, 2, 20, 8).bfloat16())),
    "heads-that-do-not-divide": (ValueError, "key", lambda: base(query=numbers(2, 3, 20, 8))),
    "float-mask": (TypeError, "key_mask", lambda: base(key_mask=torch.ones(2, 20))),
    "mask-of-another-length": (
        ValueError, "key_mask", lambda: base(key_mask=torch.ones(2, 19, dtype=torch.bool))),
    "sinks-of-key-heads": (ValueError, "sinks", lambda: base(sinks=numbers(2))),
    "infinite-scale": (ValueError, "scale", lambda: base(scale=float("inf"))),
    "negative-softcap": (ValueError, "softcap", lambda: base(softcap=-1.0)),
    "offset-behind-the-keys": (
        ValueError, "query_offset", lambda: base(query_offset=torch.tensor([0, 1]))),
    "one-length-for-two": (ValueError, "kv_lengths", lambda: base(kv_lengths=torch.tensor([20]))),
    "packed-with-a-batch": (ValueError, "cu_seqlens", lambda: base(cu_seqlens=cu(0, 20))),
    "packed-falling": (ValueError, "cu_seqlens", lambda: packed(cu(0, 12, 8, 20))),
    "packed-with-an-offset": (
        ValueError, "query_offset", lambda: packed(cu(0, 20), query_offset=0)),
    "packed-with-a-state": (
        NotImplementedError, "state", lambda: packed(cu(0, 20), state=state(batch=1))),
    "packed-and-a-state-wanted": (
        NotImplementedError, "state", lambda: packed(cu(0, 20), return_state=True)),
    "state-a-tuple": (TypeError, "state", lambda: base(state=tuple(state()))),
    "state-of-another-batch": (ValueError, "state.keys", lambda: base(state=state(batch=3))),
    "state-of-other-landmarks": (ValueError, "state.keys", lambda: base(state=state(marks=3))),
    "state-of-unfinished-blocks": (ValueError, "state", lambda: base(state=state(blocks=6))),
    "state-in-half": (TypeError, "state.keys", lambda: base(state=state(dtype=torch.bfloat16))),
    "reference-with-a-state": (
        NotImplementedError, "backend", lambda: base(backend="reference", return_state=True)),
    "unknown-backend": (ValueError, "backend", lambda: base(backend="cuda")),
}  # fmt: skip
CHOSEN = {
    "an-unfinished-block": (ValueError, "indices", lambda: base(indices=chosen(4))),
    "a-near-block": (ValueError, "indices", lambda: base(indices=chosen(3), near=1)),
    "minus-two": (ValueError, "indices", lambda: base(indices=chosen(-2))),
    "a-block-twice": (ValueError, "indices", lambda: base(indices=chosen(1, 0, 1))),
    "float-indices": (TypeError, "indices", lambda: base(indices=numbers(2, 2, 20, 1))),
    "int16-indices": (
        TypeError, "indices", lambda: base(indices=chosen(0, dtype=torch.int16))),
    "indices-of-query-heads": (
        ValueError, "indices", lambda: base(indices=torch.zeros(2, 4, 20, 1).int())),
    "indices-none": (TypeError, "indices", lambda: base(indices=None)),
    "indices-of-three-dimensions": (ValueError, "indices", lambda: base(indices=chosen(0)[0])),
}  # fmt: skip


def assert_refused(operator, error, argument, arguments):
    with pytest.raises(error) as raised:
        operator(**arguments())
    message = str(raised.value)
    assert message.startswith(argument) and "expected" in message
    assert "\n" not in message and len(message) < 200


@pytest.mark.parametrize("name", ROUTED)
def test_routed_attention_refuses(name):
    assert_refused(flashmark.routed_attention, *ROUTED[name])


@pytest.mark.parametrize("name", CHOSEN)
def test_block_topk_attention_refuses(name):
    assert_refused(flashmark.block_topk_attention, *CHOSEN[name])


@pytest.mark.parametrize("name", ["block-size-0", "257-landmarks", "near-negative", "float-mask"])
def test_block_scores_refuse(name):
    error, argument, arguments = ROUTED[name]
    given = {key: x for key, x in arguments().items() if key != "value"}
    assert_refused(flashmark.block_scores, error, argument, lambda: given)


def test_the_good_input_passes():
    flashmark.routed_attention(**base())
    flashmark.routed_attention(**packed(cu(0, 12, 20)))
    flashmark.routed_attention(**base(state=state(blocks=5)))
    flashmark.block_topk_attention(**base(indices=chosen(3, 0, -1)))
