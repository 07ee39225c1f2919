"""A decoding step in which some samples have no token, without asking the device which."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.autograd import unit_stride
from flashmark.hybrid.attention import hybrid_attention
from flashmark.hybrid.call import Call, parts_of
from flashmark.hybrid.operator import step
from flashmark.hybrid.state import HybridState, tensors_of


def masked_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    *,
    state: HybridState,
    active: Tensor,
    window: int,
    merge: str,
    scale: float,
    core: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """`hybrid_attention` to one token a sample, whose arguments have been checked; `state` moves on
    in place. Samples where `active`, bool (B,), is False stay as they are; their output means
    nothing.
    """
    tensors = tensors_of(state)
    parts = parts_of("auto", merge, query, landmarks.shape[-2])
    if parts == ("triton", "triton") and all(x.is_contiguous() for x in tensors):
        held = tensors if merge == "slots" else (*tensors[:5], None, tensors[5])
        marks = unit_stride(landmarks)
        call = Call(
            unit_stride(query), unit_stride(key), unit_stride(value), marks, marks, window, merge,
            scale, None if core is None else unit_stride(core), gate, None, None, *held, True,
        )  # fmt: skip
        return step(call, active)
    before = [x.clone() for x in tensors]
    out = hybrid_attention(
        query, key, value, landmarks, window=window, merge=merge, scale=scale, core=core, gate=gate,
        state=state, state_out=state,
    )  # fmt: skip
    for x, old in zip(tensors, before, strict=True):
        x.copy_(torch.where(active.view(-1, *[1] * (x.dim() - 1)), x, old))
    return out
