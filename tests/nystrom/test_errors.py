"""Bad input is refused in one sentence that names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from flashmark.nystrom import NystromState, nystrom_attention
from tests import helpers
from tests.nystrom.cases import Case


def base(**changes) -> dict:
    """query (2, 4, 10, 16), key and value (2, 2, 10, 16), landmarks (2, 8, 16), with changes."""
    arguments = Case(10, 8, batch=2, kv_heads=2, group=2).arguments()
    return arguments | {"backend": "eager"} | changes


def state(*shape, dim=16) -> NystromState:
    return NystromState(torch.zeros(*shape), torch.zeros(*shape, dim))


def cu(*bounds) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def marks(*shape) -> torch.Tensor:
    return helpers.randn(*shape)


def packed(bounds: torch.Tensor, **changes) -> dict:
    return base(query=marks(1, 4, 10, 16), key=marks(1, 2, 10, 16), value=marks(1, 2, 10, 16),
                cu_seqlens=bounds) | changes  # fmt: skip


BAD = {
    "too-many-landmarks": (ValueError, "landmarks", lambda: base(landmarks=marks(2, 257, 16))),
    "no-landmarks": (ValueError, "landmarks", lambda: base(landmarks=marks(2, 0, 16))),
    "landmarks-of-query-heads": (ValueError, "landmarks", lambda: base(landmarks=marks(4, 8, 16))),
    "landmarks-of-other-width": (ValueError, "landmarks", lambda: base(landmarks=marks(2, 8, 17))),
    "landmarks-of-another-batch": (
        ValueError, "landmarks", lambda: base(landmarks=marks(3, 2, 8, 16))),
    "unequal-pair": (
        ValueError, "landmarks", lambda: base(landmarks=(marks(2, 8, 16), marks(2, 9, 16)))),
    "three-landmarks": (TypeError, "landmarks", lambda: base(landmarks=(marks(2, 8, 16),) * 3)),
    "landmarks-none": (TypeError, "landmarks", lambda: base(landmarks=None)),
    "integer-landmarks": (
        TypeError, "landmarks", lambda: base(landmarks=torch.ones(2, 8, 16, dtype=torch.int64))),
    "core-of-another-shape": (ValueError, "core", lambda: base(core=torch.zeros(2, 8, 9))),
    "core-of-query-heads": (ValueError, "core", lambda: base(core=torch.zeros(4, 8, 8))),
    "core-of-another-batch": (ValueError, "core", lambda: base(core=torch.zeros(3, 2, 8, 8))),
    "core-a-name": (TypeError, "core", lambda: base(core="cholesky")),
    "negative-decay": (ValueError, "decay", lambda: base(decay=torch.full((2, 8), -0.1))),
    "nan-decay": (ValueError, "decay", lambda: base(decay=torch.full((2, 8), torch.nan))),
    "decay-of-another-shape": (ValueError, "decay", lambda: base(decay=torch.zeros(2, 7))),
    "decay-bidirectional": (
        ValueError, "decay", lambda: base(decay=torch.zeros(2, 8), is_causal=False)),
    "unequal-lengths": (
        ValueError, "key", lambda: base(key=marks(2, 2, 11, 16), value=marks(2, 2, 11, 16))),
    "heads-that-do-not-divide": (ValueError, "key", lambda: base(query=marks(2, 3, 10, 16))),
    "wide-head": (ValueError, "query", lambda: base(query=marks(2, 4, 10, 257))),
    "mixed-dtypes": (TypeError, "key", lambda: base(key=marks(2, 2, 10, 16).bfloat16())),
    "state-of-another-batch": (ValueError, "state.L", lambda: base(state=state(3, 2, 8))),
    "state-of-another-width": (ValueError, "state.R", lambda: base(state=state(2, 2, 8, dim=15))),
    "state-of-query-heads": (ValueError, "state.L", lambda: base(state=state(2, 4, 8))),
    "state-one-tensor": (TypeError, "state", lambda: base(state=torch.zeros(2, 2, 8))),
    "state-not-one-a-sequence": (
        ValueError, "state.L", lambda: packed(cu(0, 4, 10), state=state(1, 2, 8))),
    "state-out-of-another-batch": (ValueError, "state_out", lambda: base(state_out=state(3, 2, 8))),
    "state-out-with-gradients": (ValueError, "state_out", lambda: base(state_out=state(2, 2, 8))),
    "float-mask": (TypeError, "key_mask", lambda: base(key_mask=torch.ones(2, 10))),
    "mask-of-another-length": (
        ValueError, "key_mask", lambda: base(key_mask=torch.ones(2, 9, dtype=torch.bool))),
    "cu-seqlens-int16": (TypeError, "cu_seqlens", lambda: packed(cu(0, 10).short())),
    "cu-seqlens-beyond-int32": (
        ValueError, "cu_seqlens", lambda: packed(torch.tensor([0, 2**32 + 10]))),
    "cu-seqlens-wrapping": (
        ValueError, "cu_seqlens", lambda: packed(torch.tensor([0, 2**32 + 4, 10]))),
    "cu-seqlens-and-a-batch": (ValueError, "cu_seqlens", lambda: base(cu_seqlens=cu(0, 10))),
    "cu-seqlens-short": (ValueError, "cu_seqlens", lambda: packed(cu(0, 9))),
    "cu-seqlens-falling": (ValueError, "cu_seqlens", lambda: packed(cu(0, 6, 4, 10))),
    "cu-seqlens-empty": (ValueError, "cu_seqlens", lambda: packed(cu(0))),
    "unknown-normalize": (ValueError, "normalize", lambda: base(normalize="softmax")),
    "infinite-scale": (ValueError, "scale", lambda: base(scale=float("inf"))),
    "is-causal-none": (TypeError, "is_causal", lambda: base(is_causal=None)),
    "unknown-backend": (ValueError, "backend", lambda: base(backend="cuda")),
    "meta-landmarks": (
        ValueError, "landmarks", lambda: base(landmarks=torch.empty(2, 8, 16, device="meta"))),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, argument, arguments = BAD[name]
    with pytest.raises(error) as raised:
        nystrom_attention(**arguments())
    message = str(raised.value)
    assert message.startswith(argument) and "expected" in message and "got" in message
    assert "\n" not in message and len(message) < 200


def test_the_good_input_passes():
    nystrom_attention(**base())
    nystrom_attention(**packed(cu(0, 0, 4, 10)))


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError):
        nystrom_attention(**base(), causal=True)
