"""One description of a call of block-sparse attention: what validation makes and backends take."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypedDict

from torch import Tensor

from flashmark.masks.block_mask import BlockMask


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """All checked arguments, in the order of the operator's schema."""

    query: Tensor  # (B, Hq, Nq, D), like key and value with stride 1 in the last dimension
    key: Tensor  # (B, Hkv, Nk, D)
    value: Tensor  # (B, Hkv, Nk, Dv)
    mask: BlockMask
    scale: float
    bias: Tensor | None = None  # (Hq, rows + Nk - 1), or broadcastable to (B, Hq, Nq, Nk)
    sinks: Tensor | None = None  # (Hq,)
    query_offset: Tensor | None = None  # int32 (1,) or (B,)
    kv_lengths: Tensor | None = None  # int32 (B,)
    dropout_seed: Tensor | None = None  # int64 (1,)
    softcap: float = 0.0  # 0.0: none
    dropout_p: float = 0.0
    deterministic: bool = True  # bitwise repeatable gradients


class Saved(NamedTuple):
    """Outputs of the forward, which the backward reads again."""

    out: Tensor  # (B, Hq, Nq, Dv)
    lse: Tensor  # (B, Hq, Nq), float32 or float64
    residual: Tensor  # rounding residual of lse, of the same shape; empty without a bias


class Grads(NamedTuple):
    """Gradients of the fields of a call; None where there is no such field."""

    dquery: Tensor
    dkey: Tensor
    dvalue: Tensor
    dbias: Tensor | None
    dsinks: Tensor | None


class Options(TypedDict, total=False):
    """Keyword arguments of the public function, for type checkers."""

    query_offset: int | Tensor | None
    kv_lengths: Tensor | None
    bias: Tensor | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    deterministic: bool | None
    backend: str
