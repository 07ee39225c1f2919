"""`flashmark::nystrom_forward` and `flashmark::nystrom_backward`."""

from __future__ import annotations

import importlib

import torch

from flashmark.flops import FORMULAS
from flashmark.library import register

_MODULES = {
    "eager": "flashmark.nystrom.eager.interface",
    "triton": "flashmark.kernels.nystrom",
    "cpu": "flashmark.nystrom.cpu",
}

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor landmark_queries, Tensor landmark_keys, "
    "Tensor core, Tensor? decay, Tensor? key_mask, Tensor? cu_seqlens, Tensor? L0, Tensor? R0, "
    "float scale, str normalize, bool is_causal, str backend"
)


def _forward(*inputs):
    *inputs, backend = inputs
    if not inputs[0].shape[0]:  # no sample: nothing to compute
        return _forward_fake(*inputs)
    return importlib.import_module(_MODULES[backend]).forward(*inputs)


def _forward_fake(
    query, key, value, landmark_queries, landmark_keys, core, decay, key_mask, cu_seqlens, *_
):  # fmt: skip
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    L = query.new_empty(rows, key.shape[1], landmark_queries.shape[-2], dtype=dtype)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    return out, L, L.new_empty(*L.shape, value.shape[3])


def _backward(dout, dL, dR, query, *rest):
    *rest, backend = rest
    if not query.shape[0]:
        return tuple(x.zero_() for x in _backward_fake(dout, dL, dR, query, *rest))
    module = importlib.import_module(_MODULES[backend])
    grads = module.backward(dout, dL, dR, query, *rest)
    return tuple(query.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _backward_fake(
    dout, dL, dR, query, key, value, landmark_queries, landmark_keys, core, decay, key_mask,
    cu_seqlens, L0, R0, *_,
):  # fmt: skip
    inputs = query, key, value, landmark_queries, landmark_keys, core, decay, L0, R0
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


register(f"nystrom_forward({_INPUTS}) -> (Tensor out, Tensor L, Tensor R)", _forward, _forward_fake)
register(
    f"nystrom_backward(Tensor dout, Tensor? dL, Tensor? dR, {_INPUTS}) -> (Tensor dquery, "
    "Tensor dkey, Tensor dvalue, Tensor dlandmark_queries, Tensor dlandmark_keys, Tensor dcore, "
    "Tensor ddecay, Tensor dL0, Tensor dR0)",
    _backward,
    _backward_fake,
)


def _flops(query, key, value, landmarks, per_key, per_query) -> int:
    """The recurrence's products: 2 M times a sum of (D, M, Dv) for every key, and for every query.

    What a backend adds by working in chunks is not counted.
    """
    widths = query.shape[3], landmarks.shape[-2], value.shape[3]
    keys = key.shape[0] * key.shape[1] * key.shape[2]
    queries = query.shape[0] * query.shape[1] * query.shape[2]
    key_work, query_work = (
        sum(n * width for n, width in zip(counts, widths, strict=True))
        for counts in (per_key, per_query)
    )
    return 2 * widths[1] * (keys * key_work + queries * query_work)


def _forward_flops(query, key, value, landmark_queries, *args, **kwargs) -> int:
    """s and R; F, W and out."""
    return _flops(query, key, value, landmark_queries, (1, 0, 1), (1, 1, 1))


def _backward_flops(dout, dL, dR, query, key, value, landmark_queries, *args, **kwargs) -> int:
    """s, dk, dq~ and R, G . v, dv; F, dq, dk~ and W, dF, dcore and dW, G."""
    return _flops(query, key, value, landmark_queries, (3, 0, 3), (3, 3, 2))


FORMULAS |= {"nystrom_forward": _forward_flops, "nystrom_backward": _backward_flops}
