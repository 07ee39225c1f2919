"""Bad input raises one sentence that names the argument, the expected and the given."""

from __future__ import annotations

import pytest
import torch

from flashmark import HybridState, hybrid_attention, hybrid_statistics
from tests import helpers
from tests.hybrid.cases import Case


def base(**changes) -> dict:
    """query (2, 4, 10, 16), key and value (2, 2, 10, 16), landmarks (2, 5, 16), with changes."""
    arguments = Case(10, 4, 5, batch=2, kv_heads=2, group=2).arguments()
    return arguments | {"backend": "eager"} | changes


def state(batch=2, heads=2, marks=5, dim=16, **options) -> HybridState:
    return HybridState.empty(batch, heads, marks, dim, **({"window": 4} | options))


def marks(*shape) -> torch.Tensor:
    return helpers.randn(*shape)


def cu(*bounds) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def packed(bounds: torch.Tensor, **changes) -> dict:
    return base(query=marks(1, 4, 10, 16), key=marks(1, 2, 10, 16), value=marks(1, 2, 10, 16),
                cu_seqlens=bounds) | changes  # fmt: skip


GATE = torch.ones(2, 4, 10, 1)
BAD = {
    "window-0": (ValueError, "window", lambda: base(window=0)),
    "window-a-float": (TypeError, "window", lambda: base(window=4.0)),
    "window-a-bool": (TypeError, "window", lambda: base(window=True)),
    "unknown-merge": (ValueError, "merge", lambda: base(merge="sum")),
    "gate-without-its-merge": (ValueError, "gate", lambda: base(gate=GATE)),
    "no-gate": (ValueError, "gate", lambda: base(merge="gate")),
    "gate-of-another-shape": (ValueError, "gate", lambda: base(merge="gate", gate=GATE[:, :3])),
    "gate-of-five-dimensions": (ValueError, "gate", lambda: base(merge="gate", gate=GATE[None])),
    "gate-a-number": (TypeError, "gate", lambda: base(merge="gate", gate=0.5)),
    "integer-gate": (TypeError, "gate", lambda: base(merge="gate", gate=GATE.long())),
    "core-for-slots": (ValueError, "core", lambda: base(core=torch.eye(5).expand(2, 5, 5))),
    "core-of-another-shape": (
        ValueError, "core", lambda: base(core=torch.zeros(2, 5, 6), merge="mass")),
    "a-pair-for-mass": (
        ValueError, "landmarks", lambda: base(landmarks=(marks(2, 5, 16),) * 2, merge="mass")),
    "too-many-landmarks": (ValueError, "landmarks", lambda: base(landmarks=marks(2, 257, 16))),
    "landmarks-of-query-heads": (ValueError, "landmarks", lambda: base(landmarks=marks(4, 5, 16))),
    "landmarks-none": (TypeError, "landmarks", lambda: base(landmarks=None)),
    "unequal-lengths": (
        ValueError, "key", lambda: base(key=marks(2, 2, 11, 16), value=marks(2, 2, 11, 16))),
    "heads-that-do-not-divide": (ValueError, "key", lambda: base(query=marks(2, 3, 10, 16))),
    "mixed-dtypes": (TypeError, "key", lambda: base(key=marks(2, 2, 10, 16).bfloat16())),
    "float-mask": (TypeError, "key_mask", lambda: base(key_mask=torch.ones(2, 10))),
    "mask-of-another-length": (
        ValueError, "key_mask", lambda: base(key_mask=torch.ones(2, 9, dtype=torch.bool))),
    "cu-seqlens-int16": (TypeError, "cu_seqlens", lambda: packed(cu(0, 10).short())),
    "cu-seqlens-and-a-batch": (ValueError, "cu_seqlens", lambda: base(cu_seqlens=cu(0, 10))),
    "cu-seqlens-falling": (ValueError, "cu_seqlens", lambda: packed(cu(0, 6, 4, 10))),
    "infinite-scale": (ValueError, "scale", lambda: base(scale=float("inf"))),
    "unknown-backend": (ValueError, "backend", lambda: base(backend="cuda")),
    "state-a-tuple": (TypeError, "state", lambda: base(state=tuple(state()))),
    "state-of-another-batch": (ValueError, "state.position", lambda: base(state=state(3))),
    "state-of-another-window": (ValueError, "state.keep", lambda: base(state=state(window=5))),
    "state-of-other-landmarks": (ValueError, "state.far", lambda: base(state=state(marks=6))),
    "state-of-another-merge": (ValueError, "state.far", lambda: base(state=state(merge="mass"))),
    "state-of-another-dtype": (
        TypeError, "state.key", lambda: base(state=state(dtype=torch.bfloat16))),
    "state-not-one-a-sequence": (
        ValueError, "state.position", lambda: packed(cu(0, 4, 10), state=state(1))),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, argument, arguments = BAD[name]
    with pytest.raises(error) as raised:
        hybrid_attention(**arguments())
    message = str(raised.value)
    assert message.startswith(argument) and "expected" in message and "got" in message
    assert "\n" not in message and len(message) < 200


def test_the_good_input_passes():
    hybrid_attention(**base(), state=state())
    hybrid_attention(**packed(cu(0, 0, 4, 10)), state=state(3), return_state=True)
    hybrid_attention(**base(merge="gate", gate=GATE[:1, :, :1]))


@pytest.mark.parametrize(
    "argument, changes",
    [("window", {"window": -1}), ("merge", {"merge": "sum"}), ("landmarks", {"landmarks": None})],
)
def test_bad_input_of_the_statistics(argument, changes):
    good = {x: base()[x] for x in ("query", "key", "landmarks", "window")}
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected .* got "):
        hybrid_statistics(**(good | changes))
