"""Block-sparse attention by the C++ kernels: the interface of every backend."""

from __future__ import annotations

from torch import Tensor

from flashmark.cpu import operators


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask,
    bias: Tensor | None,
    sinks: Tensor | None,
    query_offset: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (B, Hq, Nq, Dv) in query's dtype, lse (B, Hq, Nq) float32, residual of lse).

    query (B, Hq, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv), float32, bfloat16 or
    float16, stride 1 in the last dimension. `softcap` 0 means none.
    """
    rest = (bias, sinks, query_offset, kv_lengths, dropout_seed, scale, softcap, dropout_p)
    return operators().block_sparse_forward(query, key, value, *_mask_arguments(mask), *rest)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    residual: Tensor,
    mask,
    bias: Tensor | None,
    sinks: Tensor | None,
    query_offset: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dquery, dkey, dvalue, dbias or None, dsinks or None) of `forward`.

    Sums run in an order fixed by the shapes and the mask: the same bits for any number of threads,
    whatever `deterministic` says.
    """
    rest = (bias, sinks, query_offset, kv_lengths, dropout_seed, scale, softcap, dropout_p)
    arguments = (dout, dlse, query, key, value, out, lse, residual, *_mask_arguments(mask), *rest)
    dquery, dkey, dvalue, dbias, dsinks = operators().block_sparse_backward(*arguments)
    dbias = None if bias is None else dbias
    return dquery, dkey, dvalue, dbias, None if sinks is None else dsinks


def _mask_arguments(mask) -> tuple[list[Tensor], list[int], str]:
    # By comparison alone: the tensors of a causal or dense mask may be missing.
    return (mask.tensors() if mask.kind == "sparse" else []), mask.layout, mask.kind
