"""Launchers of all kernels: the operator's triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.nystrom.call import Call, Grads, Saved
from flashmark.nystrom.eager import interface as eager

from . import arguments as args
from . import columns, configs
from .backward import causal_backward
from .bidirectional import bidirectional_forward, bidirectional_sweep
from .forward import causal_forward


def forward(call: Call) -> Saved:
    if not call.query.shape[0]:  # a grid of no programs
        return eager.forward(call)
    run = causal_forward if call.is_causal else bidirectional_forward
    out, ends = run(args.describe(call))
    return Saved(out, ends.L, ends.R)


def update(call: Call, L: Tensor, R: Tensor) -> Tensor:
    """The output; the states after the last token are written over L and R."""
    few = 1 <= call.query.shape[2] <= configs.DECODE_TOKENS and call.cu_seqlens is None
    plain = all(x.is_contiguous() and x.dtype == torch.float32 for x in (L, R))
    if few and plain and call.is_causal and call.query.shape[0]:
        return causal_forward(args.describe(call), (L, R))[0]
    saved = forward(call)
    L.copy_(saved.L)
    R.copy_(saved.R)
    return saved.out


def backward(call: Call, saved: Saved, dout: Tensor, dL: Tensor | None, dR: Tensor | None) -> Grads:
    if not call.query.shape[0]:
        return eager.backward(call, saved, dout, dL, dR)
    own = args.describe(call)
    if call.is_causal:
        grads = causal_backward(own, dout, dL, dR)
    else:
        grads = columns.backward(bidirectional_sweep, own, dout, dL, dR)
    inputs = {
        "query": call.query, "key": call.key, "value": call.value, "lq": call.landmark_queries,
        "lk": call.landmark_keys, "core": call.core, "decay": call.decay, "L0": call.L0,
        "R0": call.R0,
    }  # fmt: skip
    found = (
        None if x is None else grads[name].sum_to_size(x.shape).view(x.shape).to(x.dtype)
        for name, x in inputs.items()
    )
    return Grads(*found)  # type: ignore[arg-type]
