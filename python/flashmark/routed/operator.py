"""`flashmark::block_topk_forward` and `flashmark::block_topk_backward`."""

from __future__ import annotations

import torch

from flashmark.library import Operator
from flashmark.routed.call import Call, Grads, Saved


def _forward_fake(call: Call) -> Saved:
    query, shape = call.query, call.query.shape[:3]
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(*shape, call.value.shape[3])
    return Saved(out, query.new_empty(shape, dtype=lse_dtype))


def _pairs(call: Call) -> int:
    """(query, key) pairs of all samples and heads, where every choice names a block."""
    (batch, heads, q_len, _), size = call.query.shape, call.block_size
    seen = (call.indices.shape[3] + call.near) * size + (size + 1) // 2
    return batch * heads * q_len * min(seen, (call.key.shape[2] + 1) // 2)


def _forward_flops(call: Call) -> int:
    """S over D and out over Dv."""
    return 2 * _pairs(call) * (call.query.shape[3] + call.value.shape[3])


def _backward_flops(call: Call) -> int:
    """S, dQ, dK over D; dP, dV over Dv."""
    return 2 * _pairs(call) * (3 * call.query.shape[3] + 2 * call.value.shape[3])


OPERATOR = Operator(
    "block_topk",
    Call,
    Saved,
    Grads,
    {"eager": "flashmark.routed.eager", "triton": "flashmark.kernels.routed", "cpu": None},
    forward_fake=_forward_fake,
    composed="flashmark.routed.composed",
    dims={
        **dict.fromkeys(("query", "key", "value", "indices", "out"), ("BH..",)),
        "lse": ("BH.",),
        "sinks": ("H",),
        "query_offset": ("b",),
        "kv_lengths": ("B",),
        "key_mask": ("B.",),
    },
    unfoldable={"starts": "B"},
    forward_flops=_forward_flops,
    backward_flops=_backward_flops,
)
