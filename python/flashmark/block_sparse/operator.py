"""`flashmark::block_sparse_forward` and `flashmark::block_sparse_backward`.

A BlockMask crosses the boundary as its tensors, its layout and its kind (`pack_mask`); masks that a
comparison decides ("causal", "dense") send no tensors at all.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from flashmark.library import register
from flashmark.masks.block_mask import BlockMask

_MODULES = {
    "eager": "flashmark.block_sparse.eager",
    "triton": "flashmark.kernels.block_sparse",
    "cpu": "flashmark.block_sparse.cpu",
}

_COMMON = (
    "Tensor[] mask, SymInt[] layout, str kind, Tensor? bias, Tensor? sinks, Tensor? query_offset, "
    "Tensor? kv_lengths, Tensor? dropout_seed, float scale, float softcap, float dropout_p"
)


def pack_mask(mask: BlockMask) -> tuple[list[Tensor], list[int], str]:
    return (mask.tensors() if mask.kind == "sparse" else []), mask.layout, mask.kind


def plain_mask(kind: str, q_len: int, kv_len: int) -> BlockMask:
    """A causal or dense mask without lists: backends compare positions."""
    no_lists: Any = None
    return BlockMask(no_lists, no_lists, no_lists, no_lists, q_len, kv_len, 128, 128, 1, 1, kind)


def _unpack_mask(tensors: list[Tensor], layout: list[int], kind: str) -> BlockMask:
    if kind == "sparse":
        return BlockMask.from_tensors(tensors, layout, kind)
    return plain_mask(kind, layout[0], layout[1])


def _backend(name: str, query: Tensor, key: Tensor):
    """The module that runs. Empty tensors leave kernels nothing to launch."""
    empty = query.numel() == 0 or key.numel() == 0
    return importlib.import_module(_MODULES["eager" if empty else name])


def _forward(
    query, key, value, mask, layout, kind, bias, sinks, query_offset, kv_lengths, dropout_seed,
    scale, softcap, dropout_p, backend,
):  # fmt: skip
    return _backend(backend, query, key).forward(
        query, key, value, _unpack_mask(mask, layout, kind), bias, sinks, query_offset, kv_lengths,
        dropout_seed, scale, softcap, dropout_p,
    )  # fmt: skip


def _forward_fake(query, key, value, mask, layout, kind, bias, *_):
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    shape = query.shape[:3]
    lse = query.new_empty(shape, dtype=lse_dtype)
    residual = lse.new_empty(0) if bias is None else torch.empty_like(lse)
    return query.new_empty(*shape, value.shape[3]), lse, residual


def _backward(
    dout, dlse, query, key, value, out, lse, residual, mask, layout, kind, bias, sinks,
    query_offset, kv_lengths, dropout_seed, scale, softcap, dropout_p, deterministic, backend,
):  # fmt: skip
    grads = _backend(backend, query, key).backward(
        dout, dlse, query, key, value, out, lse, residual, _unpack_mask(mask, layout, kind), bias,
        sinks, query_offset, kv_lengths, dropout_seed, scale, softcap, dropout_p, deterministic,
    )  # fmt: skip
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(
    dout, dlse, query, key, value, out, lse, residual, mask, layout, kind, bias, sinks, *_
):  # fmt: skip
    def like(x):
        return query.new_empty(0) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (query, key, value, bias, sinks))


register(
    f"block_sparse_forward(Tensor query, Tensor key, Tensor value, {_COMMON}, str backend) "
    "-> (Tensor out, Tensor lse, Tensor residual)",
    _forward,
    _forward_fake,
)
register(
    "block_sparse_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor lse, Tensor residual, {_COMMON}, bool deterministic, str backend) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias, Tensor dsinks)",
    _backward,
    _backward_fake,
)
