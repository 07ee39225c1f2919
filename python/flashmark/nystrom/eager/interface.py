"""Nyström attention in plain PyTorch: the interface that every backend of the operator implements.

    forward(query, key, value, landmark_queries, landmark_keys, core, decay, key_mask, cu_seqlens,
            L0, R0, scale, normalize, is_causal) -> (out, L_end, R_end)
    backward(dout, dL_end, dR_end, <the same inputs>)
        -> (dquery, dkey, dvalue, dlandmark_queries, dlandmark_keys, dcore, ddecay, dL0, dR0)

All arguments are validated before. query (B, Hq, Nq, D), key (B, Hkv, Nk, D), value
(B, Hkv, Nk, Dv), stride(-1) == 1, other strides arbitrary; Nq == Nk when `is_causal` or packed.
Landmarks (Hkv, M, D) or (B, Hkv, M, D), both alike; core (Hkv, M, M) or (B, Hkv, M, M), for
normalize="mass" in the scale where S has a unit diagonal. decay (Hkv, M) or None. key_mask bool
(B, Nk) or None, True = takes part. cu_seqlens int32 (S + 1,) or None, B = 1. L0 (rows, Hkv, M) and
R0 (rows, Hkv, M, Dv), both or neither, rows = B or S; L = -inf means that nothing is held.

out has the dtype of query and is contiguous. States are float32 (float64 for float64 inputs).
Gradients have the shape and dtype of their inputs, those of decay and state None where the input
is; tied landmarks come twice and autograd adds the two gradients. dL_end and dR_end may be None.
Keys that a mask hides get gradient 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmark.nystrom.eager.backward import causal_backward
from flashmark.nystrom.eager.bidirectional import bidirectional_backward, bidirectional_forward
from flashmark.nystrom.eager.forward import causal_forward


def forward(
    query, key, value, landmark_queries, landmark_keys, core, decay, key_mask, cu_seqlens,
    L0, R0, scale, normalize, is_causal,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shared = landmark_queries, landmark_keys, core
    if is_causal:
        return causal_forward(
            query, key, value, *shared, decay, key_mask, cu_seqlens, L0, R0, scale, normalize
        )
    if cu_seqlens is None:
        return bidirectional_forward(query, key, value, *shared, key_mask, L0, R0, scale, normalize)
    ends = [
        bidirectional_forward(*(x[:, :, part] for x in (query, key, value)), *shared,
                              mask, L0_s, R0_s, scale, normalize)
        for part, mask, L0_s, R0_s in _sequences(cu_seqlens, key_mask, L0, R0)
    ]  # fmt: skip
    outs, L_end, R_end = zip(*ends, strict=True)
    return torch.cat(outs, 2), torch.cat(L_end), torch.cat(R_end)


def backward(
    dout, dL_end, dR_end, query, key, value, landmark_queries, landmark_keys, core, decay, key_mask,
    cu_seqlens, L0, R0, scale, normalize, is_causal,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    shared = landmark_queries, landmark_keys, core
    if is_causal:
        return causal_backward(
            dout, dL_end, dR_end, query, key, value, *shared, decay, key_mask, cu_seqlens, L0, R0,
            scale, normalize,
        )  # fmt: skip
    if cu_seqlens is None:
        return bidirectional_backward(
            dout, dL_end, dR_end, query, key, value, *shared, key_mask, L0, R0, scale, normalize
        )
    parts = []
    for s, (part, mask, L0_s, R0_s) in enumerate(_sequences(cu_seqlens, key_mask, L0, R0)):
        ends = (None if x is None else x[s : s + 1] for x in (dL_end, dR_end))
        tokens = (x[:, :, part] for x in (query, key, value))
        parts.append(
            bidirectional_backward(
                dout[:, :, part], *ends, *tokens, *shared, mask, L0_s, R0_s, scale, normalize
            )
        )
    dq, dk, dv, dlq, dlk, dcore, _, dL0, dR0 = zip(*parts, strict=True)
    starts = (None, None) if L0 is None else (torch.cat(dL0), torch.cat(dR0))
    return *(torch.cat(x, 2) for x in (dq, dk, dv)), sum(dlq), sum(dlk), sum(dcore), None, *starts


def _sequences(cu_seqlens: Tensor, key_mask, L0, R0):
    """(tokens, key mask, L0, R0) of each packed sequence."""
    bounds = cu_seqlens.tolist()
    for s, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        mask = None if key_mask is None else key_mask[:, start:stop]
        state = (None, None) if L0 is None else (L0[s : s + 1], R0[s : s + 1])
        yield slice(start, stop), mask, *state
