"""`flashmark::block_sparse_forward` and `flashmark::block_sparse_backward`."""

from __future__ import annotations

import torch

from flashmark.block_sparse.call import Call, Grads, Saved
from flashmark.library import Operator


def _forward_fake(call: Call) -> Saved:
    query, shape = call.query, call.query.shape[:3]
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(*shape, call.value.shape[3])
    lse = query.new_empty(shape, dtype=lse_dtype)
    return Saved(out, lse, lse.new_empty(0 if call.bias is None else shape))


def _pairs(call: Call) -> int:
    """(query, key) pairs of all samples and heads: whole tiles for a compiled mask."""
    (batch, heads, q_len, _), kv_len, mask = call.query.shape, call.key.shape[2], call.mask
    if mask.kind == "sparse" and not isinstance(mask.kept, torch._subclasses.FakeTensor):
        repeats = (batch // mask.batch) * (heads // mask.heads)
        return int(mask.rows.counts.sum()) * mask.block_q * mask.block_kv * repeats
    if mask.kind == "causal":
        seeing = min(q_len, kv_len)  # the first of more queries than keys see nothing
        return batch * heads * (seeing * kv_len - seeing * (seeing - 1) // 2)
    return batch * heads * q_len * kv_len


def _forward_flops(call: Call) -> int:
    """S over D and out over Dv."""
    return 2 * _pairs(call) * (call.query.shape[3] + call.value.shape[3])


def _backward_flops(call: Call) -> int:
    """S, dQ, dK over D; dP, dV over Dv: the five products of the mathematics."""
    return 2 * _pairs(call) * (3 * call.query.shape[3] + 2 * call.value.shape[3])


OPERATOR = Operator(
    "block_sparse",
    Call,
    Saved,
    Grads,
    {
        "eager": "flashmark.block_sparse.eager",
        "triton": "flashmark.kernels.block_sparse",
        "cpu": None,
    },
    forward_fake=_forward_fake,
    constants=("residual",),
    composed="flashmark.block_sparse.composed",
    dims={
        "query": ("BH..",),
        "key": ("BH..",),
        "value": ("BH..",),
        "bias": ("H.", "bh.."),
        "sinks": ("H",),
        "query_offset": ("b",),
        "kv_lengths": ("B",),
        "out": ("BH..",),
        "lse": ("BH.",),
        "residual": ("BH.",),
    },
    unfoldable={"dropout_seed": "BH"},
    jvp={
        "eager": "flashmark.block_sparse.eager_jvp",
        "triton": "flashmark.kernels.block_sparse",
        "cpu": None,
    },
    forward_flops=_forward_flops,
    backward_flops=_backward_flops,
)
