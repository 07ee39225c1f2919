"""Nothing waits for the device: no shape and no branch depends on a value of a tensor.

Fake tensors have no values, and raise where one is asked for.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import flashmark
from flashmark.routed import eager
from flashmark.routed.call import Call
from flashmark.routed.choice import Choice, choose

B, H, HKV, N, D, SIZE, TOP = 1, 4, 2, 200, 16, 8, 3
CALLS = {
    "plain": {},
    "packed": {"starts": torch.zeros(N, dtype=torch.int32)},
    "mask": {"key_mask": torch.ones(B, N, dtype=torch.bool)},
    "lengths": {
        "kv_lengths": torch.full((B,), 100, dtype=torch.int32),
        "query_offset": torch.zeros(B, dtype=torch.int32),
    },
    "sinks": {"sinks": torch.zeros(H)},
}


def call(**options) -> Call:
    query, key, value = (
        torch.zeros(B, H, N, D),
        torch.zeros(B, HKV, N, D),
        torch.zeros(B, HKV, N, D),
    )
    indices = torch.zeros(B, HKV, N, TOP, dtype=torch.int32)
    return Call(query, key, value, indices, SIZE, 1, 0.25, **options)


def run(module, described: Call) -> None:
    saved = module.forward(described)
    module.backward(described, saved, saved.out, None)


@pytest.mark.parametrize("name", CALLS)
def test_eager_attention(name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        run(eager, call(**CALLS[name]))


@pytest.mark.parametrize("name", CALLS)
def test_triton_launchers(name, monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from flashmark.kernels import routed

    launched = []
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *_, **__: launched.append(self.fn.__name__)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        run(routed, call(**CALLS[name]))
    assert "gathered_kernel" in launched and "gathered_keys_kernel" in launched


@pytest.mark.parametrize("packed", [False, True])
def test_choice(packed):
    with FakeTensorMode():
        starts = base = None
        if packed:
            starts, base = torch.zeros(N, dtype=torch.int32), torch.zeros(N, dtype=torch.int64)
        keys, logs = torch.zeros(B, HKV, N // SIZE, 2, D), torch.zeros(B, HKV, N // SIZE, 2)
        chosen = choose(
            Choice(
                torch.zeros(B, H, N, D), keys, logs, TOP, SIZE, 1, 0.25, N, starts=starts, base=base
            )
        )
        assert chosen.shape == (B, HKV, N, TOP)


@pytest.mark.parametrize("landmarks", [None, (HKV, 2, D)], ids=["mean", "landmarks"])
@pytest.mark.parametrize("packed", [False, True])
def test_public_functions(packed, landmarks):
    """The checks of arguments, summaries and training signals, on meta tensors, which have no
    values either and which, as those of a GPU, are not looked at.
    """
    query, key = (torch.zeros(B, h, N, D, device="meta", requires_grad=True) for h in (H, HKV))
    options = {"block_size": SIZE, "top_k": TOP, "backend": "eager"}
    if packed:
        options["cu_seqlens"] = torch.zeros(4, dtype=torch.int32, device="meta")
    if landmarks is not None:
        options["landmarks"] = torch.zeros(landmarks, device="meta", requires_grad=True)
    out, routing = flashmark.routed_attention(query, key, key, **options, return_routing=True)
    (out.sum() + routing.log_probs.sum()).backward()
    options.pop("top_k")
    marks = options.pop("landmarks", None)
    flashmark.block_topk_attention(query, key, key, routing.indices, **options)
    flashmark.block_scores(query, key, marks, **options)


def test_a_value_that_is_asked_for_is_found():
    with FakeTensorMode(), pytest.raises(DynamicOutputShapeException):
        torch.zeros(4).nonzero()
    with pytest.raises(RuntimeError, match="meta tensors"):
        torch.zeros(1, device="meta").item()
